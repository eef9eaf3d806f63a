// The page of `upit-merge inspect`: shows a layer, a token, one expert's tokens alone.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;
  root.classList.add("js");

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = (text) => new Uint16Array(bytes(text).buffer); // little-endian, as it was written
  // One block of tokens for each view: all layers together, then layer after layer.
  const chosen = data.experts > 256 ? words(data.chosen) : bytes(data.chosen);
  const shares = bytes(data.shares);
  const certainty = bytes(data.certainty);
  const groups = words(data.groups);
  const tokens = [...document.querySelectorAll(".t")];
  const samples = [...document.querySelectorAll(".sample")];
  const chips = [...document.querySelectorAll(".legend .chip")];
  const cells = [...document.querySelectorAll("#kinds td")];
  const size = tokens.length;
  const lineKinds = ["solid", "dashed", "dotted", "double"];
  let view = 0;
  let current = 0;
  let alone = -1;

  const percent = (share) => {
    const value = 100 * share;
    return `${value < 10 ? value.toFixed(1) : Math.round(value)}%`;
  };
  const look = (expert) => {
    const line = Math.floor(expert / data.hues) % lineKinds.length;
    return `u${expert % data.hues}${line ? ` k${line}` : ""}`;
  };
  // How far from an even share (0) to all of it (the last step), on a scale of ratios.
  const step = (sure) => {
    const way = Math.log(Math.max(1, sure * data.experts)) / Math.log(Math.max(2, data.experts));
    return Math.min(data.steps - 1, Math.floor(way * data.steps));
  };
  const first = (token, of) => chosen[(of * size + token) * data.kept];
  const sure = (token, of) => certainty[of * size + token] / 255;
  const viewName = (of) => (of ? `layer ${data.layers[of - 1]}` : "all layers");
  const node = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // ---- a view -----------------------------------------------------------------------------

  const paint = () => {
    const numbers = at("numbers").checked;
    at("samples").classList.toggle("numbers", numbers);
    at("samples").classList.toggle("alone", alone >= 0);
    tokens.forEach((token, index) => {
      const expert = first(index, view);
      const on = expert === alone ? " on" : "";
      token.className = `t ${look(expert)} c${step(sure(index, view))}${on}`;
      if (numbers) token.dataset.e = expert;
    });
    let shown = 0;
    chips.forEach((chip, expert) => {
      chip.setAttribute("aria-pressed", String(expert === alone));
      const share = groups[view * data.groupCount * data.experts + data.whole * data.experts + expert];
      chip.lastElementChild.textContent = percent(share / 65535);
    });
    const block = groups.subarray(view * data.groupCount * data.experts, (view + 1) * data.groupCount * data.experts);
    const most = Math.max(1, ...block);
    for (const cell of cells) {
      const value = block[shown % data.groupCount * data.experts + Math.floor(shown / data.groupCount)];
      cell.className = `h${Math.round((10 * value) / most)}`;
      cell.textContent = percent(value / 65535);
      shown += 1;
    }
    at("layer").value = view;
    at("layer").setAttribute("aria-valuetext", viewName(view));
    at("layer-name").textContent = viewName(view);
    at("kinds-view").textContent = view ? `in ${viewName(view)}` : "mean over all layers";
  };

  const show = (next) => {
    view = Math.min(data.layers.length, Math.max(0, next));
    paint();
    if (!at("token").hidden) detail(current);
  };

  // ---- a token ----------------------------------------------------------------------------

  const sampleOf = (index) => data.samples.findLastIndex((sample) => sample.start <= index);
  const spoken = (index) => tokens[index].getAttribute("aria-label") || tokens[index].textContent;

  const detail = (index) => {
    const number = sampleOf(index);
    const sample = data.samples[number];
    const id = data.ids[index];
    at("hint").hidden = true;
    at("token").hidden = false;
    at("token-text").textContent = `“${tokens[index].textContent}”`;
    const place = [`${sample.name}, token ${index - sample.start + 1}`, `id ${id}`, `vocabulary: ${data.vocabulary[id]}`];
    if (tokens[index].dataset.part) place.push(`piece ${tokens[index].dataset.part}`);
    at("token-place").textContent = place.join(" · ");
    at("token-view").textContent = view ? `In ${viewName(view)}` : "All layers together";
    const rows = [];
    for (let rank = 0; rank < data.kept; rank += 1) {
      const where = (view * size + index) * data.kept + rank;
      const share = shares[where] / 255;
      if (rank && !share) break;
      const row = node("li");
      row.append(node("span", `chip ${look(chosen[where])}`, chosen[where]));
      const track = node("span", `track ${look(chosen[where])}`);
      const fill = node("span", "fill");
      fill.style.width = `${100 * share}%`;
      track.append(fill);
      row.append(track, node("span", "value", percent(share)));
      rows.push(row);
    }
    at("token-bars").replaceChildren(...rows);
    const expert = first(index, view);
    at("token-sure").textContent = view
      ? `Expert ${expert} has ${percent(sure(index, view))} of all experts’ scores; an even share would be ${percent(1 / data.experts)}.`
      : `Expert ${expert} took ${percent(sure(index, view))} of the gate weight of all layers.`;
    const trace = data.layers.map((layer, place) => {
      const one = first(index, place + 1);
      const cell = node("li", `${look(one)} c${step(sure(index, place + 1))}${place + 1 === view ? " now" : ""}`);
      cell.append(node("i", "", `L${layer}`), one);
      return cell;
    });
    at("token-trace").replaceChildren(...trace);
    return `${spoken(index)}: ${rows.map((row) => `expert ${row.firstChild.textContent}, ${row.lastChild.textContent}`).join("; ")}; ${viewName(view)}`;
  };

  const select = (index, focus) => {
    tokens[current].tabIndex = -1;
    tokens[current].removeAttribute("aria-selected");
    current = index;
    tokens[index].tabIndex = 0;
    tokens[index].setAttribute("aria-selected", "true");
    const text = detail(index);
    if (focus) {
      at("live").textContent = text;
      if (document.activeElement !== tokens[index]) tokens[index].focus();
    }
  };

  const visible = (index) => tokens[index] && !tokens[index].closest(".sample").hidden;
  const along = (from, by) => {
    let index = from + by;
    while (tokens[index] && !visible(index)) index += by;
    return tokens[index] ? index : from;
  };
  // The token above or below: on the next line that has one, the nearest to where we are.
  const line = (from, by) => {
    const box = (index) => tokens[index].getClientRects()[0] || tokens[index].getBoundingClientRect();
    const here = box(from);
    const middle = (here.left + here.right) / 2;
    let best = from;
    let top;
    for (let index = along(from, by), last = from; index !== last; last = index, index = along(index, by)) {
      const there = box(index);
      if (top === undefined && (there.top - here.top) * by < here.height / 2) continue;
      if (top !== undefined && Math.abs(there.top - top) > here.height / 2) break;
      const off = (one) => Math.abs((box(one).left + box(one).right) / 2 - middle);
      if (top === undefined || off(index) < off(best)) best = index;
      top = there.top;
    }
    return best;
  };
  const sampleStep = (by) => {
    let number = sampleOf(current) + by;
    while (samples[number]?.hidden) number += by;
    return samples[number] ? data.samples[number].start : current;
  };

  at("samples").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.classList.contains("t")) return;
    const forward = getComputedStyle(event.target).direction === "rtl" ? -1 : 1;
    const sample = data.samples[sampleOf(current)];
    const moves = {
      ArrowRight: () => along(current, forward),
      ArrowLeft: () => along(current, -forward),
      ArrowDown: () => line(current, 1),
      ArrowUp: () => line(current, -1),
      Home: () => sample.start,
      End: () => sample.start + sample.count - 1,
      PageDown: () => sampleStep(1),
      PageUp: () => sampleStep(-1),
    };
    if (moves[event.key]) select(moves[event.key](), true);
    else if (event.key === "," || event.key === ".") {
      show(view + (event.key === "." ? 1 : -1));
      select(current, true);
    } else return;
    event.preventDefault();
  });
  const tokenAt = (event) => event.target.closest?.(".t");
  at("samples").addEventListener("focusin", (event) => tokenAt(event) && select(tokens.indexOf(tokenAt(event)), true));
  at("samples").addEventListener("click", (event) => tokenAt(event) && select(tokens.indexOf(tokenAt(event)), true));
  at("samples").addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && tokenAt(event)) detail(tokens.indexOf(tokenAt(event)));
  });
  at("samples").addEventListener("pointerleave", () => {
    if (!at("token").hidden) detail(current);
  });

  // ---- controls ---------------------------------------------------------------------------

  const say = (text) => { at("live").textContent = text; };
  at("layer").addEventListener("input", (event) => show(Number(event.target.value)));
  at("before").addEventListener("click", () => { show(view - 1); say(viewName(view)); });
  at("after").addEventListener("click", () => { show(view + 1); say(viewName(view)); });
  at("numbers").addEventListener("change", paint);
  chips.forEach((chip, expert) => chip.addEventListener("click", () => {
    alone = alone === expert ? -1 : expert;
    paint();
    const count = tokens.filter((_, index) => first(index, view) === alone).length;
    say(alone < 0 ? "All experts." : `Expert ${alone} alone: ${count} of ${size} tokens, ${viewName(view)}.`);
  }));
  at("group").addEventListener("change", (event) => {
    const wanted = event.target.value;
    let shown = 0;
    samples.forEach((sample, number) => {
      sample.hidden = wanted !== "" && data.samples[number].group !== Number(wanted);
      shown += !sample.hidden;
    });
    if (!visible(current) && along(-1, 1) >= 0) select(along(-1, 1), false);
    say(`${shown} samples.`);
  });
  at("theme").addEventListener("change", (event) => {
    if (event.target.value) root.dataset.theme = event.target.value;
    else delete root.dataset.theme;
  });

  paint();
  if (size) tokens[0].tabIndex = 0;
})();
