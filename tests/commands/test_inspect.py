"""`upit-merge inspect`: its numbers, its files, what it refuses; the folder it looks at stays."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import Family, build_family, byte_tokenizer
from tests.support.commands import done, invoke, refused
from tests.support.families import FORMAT_KINDS
from tests.support.naive import load_model
from tests.support.pages import headless_browser, made_document
from tests.support.seeds import KINDS, held_out
from upit_merge.commands.inspect import _experts as table_of
from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.report.tables import show


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts with a trained router; do not write into it."""
    root = tmp_path_factory.mktemp("inspected")
    family = build_family(root / "family")
    router = {"data": str(family.seed_file())}
    document = family.recipe(parameters={"num_experts": 4}, router=router)
    run_recipe(parse_recipe(document), json.dumps(document), root / "out", RunOptions(quiet=True))
    return root / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def inspect(out: Path, data: Path, *words: object) -> dict[str, Any]:
    """Return the numbers."""
    path = data.parent / "numbers.json"
    done("inspect", out, "--data", data, "--json", path, "--quiet", *words)
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_numbers_are_those_of_the_whole_model(made: Path, tmp_path: Path) -> None:
    data = held_out(tmp_path)
    found = inspect(made, data, "--group-by", "kind")
    model = AutoModelForCausalLM.from_pretrained(made).eval()
    counts = {kind: torch.zeros(2, 4) for kind in KINDS}
    weight = torch.zeros(2, 4)
    tokens = 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([byte_tokenizer()(row["text"])["input_ids"][:64]])
        tokens += ids.shape[1]
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        for layer, of_layer in enumerate(logits):
            top, chosen = of_layer.softmax(1).topk(2)
            top = top / top.sum(1, keepdim=True)
            counts[row["kind"]][layer] += torch.bincount(chosen.flatten(), minlength=4)
            weight[layer].scatter_add_(0, chosen.flatten(), top.flatten())
    assert found["tokens"] == tokens
    assert found["layers"] == [0, 1]
    assert [*found["groups"]] == ["letters", "digits", "all"]
    counts["all"] = sum(counts.values())
    for kind, expected in counts.items():
        shares = torch.tensor(found["groups"][kind]["shares"])
        torch.testing.assert_close(shares, expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(
        torch.tensor(found["gate_weight"]), weight / weight.sum(1, keepdim=True), rtol=1e-4, atol=0
    )
    shares = counts["all"] / counts["all"].sum(1, keepdim=True)
    places = {(p["layer"], p["expert"]) for p in found["usage"]["dead"]}
    assert places == {(a, b) for a, b in (shares < 0.025).nonzero().tolist()}
    rare = {(p["layer"], p["expert"]) for p in found["usage"]["rare"]}
    assert rare == {(a, b) for a, b in ((shares >= 0.025) & (shares < 0.125)).nonzero().tolist()}


def ffn(tensors: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
    parts = [t.flatten() for name, t in sorted(tensors.items()) if f".experts.{expert}." in name]
    return torch.cat(parts).double()


def test_distances_are_those_of_the_weights(made: Path, tmp_path: Path) -> None:
    found = inspect(made, held_out(tmp_path))
    tensors = load_model(made)
    weights = [ffn(tensors, expert) for expert in range(4)]
    mean = torch.stack(weights).mean(0)
    pairs = {tuple(pair["experts"]): pair for pair in found["pairs"]}
    assert len(pairs) == 6
    for (a, b), pair in pairs.items():
        size = ((weights[a].square().sum() + weights[b].square().sum()) / 2).sqrt()
        distance = (weights[a] - weights[b]).norm() / size
        assert pair["distance"] == pytest.approx(float(distance), rel=1e-6)
        cosine = torch.cosine_similarity(weights[a] - mean, weights[b] - mean, dim=0)
        assert pair["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    middle = sorted(pair["distance"] for pair in pairs.values())[2]
    assert found["pairs"][0]["of_median"] == pytest.approx(found["pairs"][0]["distance"] / middle)


@pytest.mark.parametrize("scale", [0.0, 1e-5])
def test_twins_are_found(out: Path, tmp_path: Path, scale: float) -> None:
    """Experts 1 and 3 have the same weights, but for rounding; 0 and 2 the same gates."""
    data = held_out(tmp_path)
    before = inspect(out, data)
    assert not any(pair["by_weights"] or pair["by_routing"] for pair in before["pairs"])
    tensors = load_model(out)
    for name in list(tensors):
        if ".experts.3." in name:
            one = tensors[name.replace(".experts.3.", ".experts.1.")]
            tensors[name] = one + scale * one.std() * torch.randn_like(one)
        if name.endswith("gate.weight"):
            tensors[name][2] = tensors[name][0] * 1.1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = inspect(out, data)
    twins = {
        tuple(pair["experts"]): (pair["by_weights"], pair["by_routing"])
        for pair in found["pairs"]
        if pair["by_weights"] or pair["by_routing"]
    }
    assert twins == {(1, 3): (True, False), (0, 2): (False, True)}
    distance = found["pairs"][0]["distance"]
    assert distance == (0 if scale == 0 else pytest.approx(scale, rel=0.05))
    commands = " ".join(advice.get("command", "") for advice in found["advice"])
    idle = {row["expert"] for row in found["experts"] if row["state"] != "used"}
    left = max(2, 4 - len(idle | {3}))
    shrink = f"upit-merge shrink out --data seed.jsonl --experts {left}"  # not what is measured on
    assert commands.count(shrink) == commands.count("shrink") == 1
    assert "upit-merge router out" in commands


def test_a_dead_expert_is_found(out: Path, tmp_path: Path) -> None:
    data = held_out(tmp_path)
    tensors = load_model(out)
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor[3] = -(tensor[0] + tensor[1] + tensor[2]) / 3 * 50
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = inspect(out, data)
    shares = torch.tensor(found["groups"]["all"]["shares"])
    dead = [(place["layer"], place["expert"]) for place in found["usage"]["dead"]]
    assert dead == [(a, b) for a, b in (shares < 0.025).nonzero().tolist()]
    for row in found["experts"]:
        inside = [layer for layer, expert in dead if expert == row["expert"]]
        assert row["dead_in"] == inside


def test_few_tokens_are_called_few(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text('{"text": "abcdef"}\n')
    found = inspect(made, data)
    assert found["few_tokens"]
    assert "give more text" in found["advice"][0]["text"]
    assert "command" not in found["advice"][0]


def test_the_summary_and_the_page(made: Path, tmp_path: Path) -> None:
    data, page = held_out(tmp_path), tmp_path / "page.html"
    before = contents(made)
    words = ["inspect", made, "--data", data, "--group-by", "kind"]
    told = done(*words).stdout
    assert "What the router does with every expert" in told
    assert "To see it token by token, give --html FILE." in told.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.jsonl"]
    told = done(*words, "--html", page, "--tokens", "50").stdout
    assert told.splitlines()[-1] == f"The page is {page}; open it in a browser."
    assert contents(made) == before
    text = page.read_text(encoding="utf-8")
    assert text.count('role="option"') == 50
    assert "Shown: 50 of" in text
    assert str(tmp_path) not in text
    assert "letters" in text
    # Its own page is replaced.
    done(*words, "--html", page, "--tokens", "20", "--quiet")
    assert page.read_text(encoding="utf-8").count('role="option"') == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.jsonl", "page.html"]


@pytest.mark.parametrize("experts", [8, 64])
def test_the_table_fits_on_eighty_columns(
    experts: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row for each expert, whatever is in it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    document = made_document(experts, 128, (), 100)
    for row in document["experts"]:
        row |= {"share": 1.0, "state": "rare", "dead_in": [*range(100)], "rare_in": [*range(128)]}
    pair = {**document["pairs"][0], "distance": 0.000123456, "of_median": 0.0}
    document["pairs"] = [{**pair, "experts": [e, e ^ 1]} for e in range(0, experts, 2)]
    show(table_of(document))
    told = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert told[0].rstrip() == "What the router does with every expert, in 128 layers"
    assert max(map(len, told)) <= 80
    rows = [line.strip("│").replace(" ", "").split("│") for line in told if line[0] == "│"]
    assert rows == [
        [str(e), "100.0%", "rare", "100", "128", str(e ^ 1), "0.00012", "0.00"]
        for e in range(experts)
    ]


def test_another_file_is_not_replaced(made: Path, tmp_path: Path) -> None:
    data, page = held_out(tmp_path), tmp_path / "page.html"
    page.write_text("<!doctype html><p>Mine")
    sentence = refused("inspect", made, "--data", data, "--html", page)
    assert "is no page of `upit-merge inspect`" in sentence
    assert page.read_text() == "<!doctype html><p>Mine"
    done("inspect", made, "--data", data, "--html", page, "--force", "--quiet")
    assert page.read_text().startswith("<!doctype html>\n<!-- A page of upit-merge inspect")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--html", "no/where.html"], "The folder of no/where.html does not exist"),
        (["--json", "no/where.json"], "The folder of no/where.json does not exist"),
        (["--html", "OUT/page.html"], "which is only looked at"),
        (["--json", "OUT/more.json"], "which is only looked at"),
        (["--html", "a.html", "--json", "a.html"], "both name a.html"),
        (["--group-by", "nothing"], "has no column `nothing`"),
        (["--max-length", "1"], "--max-length is 1, expected"),
        (["--device", "tpu"], "The device 'tpu' does not exist"),
    ],
)
def test_mistakes_are_told(
    made: Path, tmp_path: Path, arguments: list[str], sentence: str, monkeypatch: Any
) -> None:
    data = held_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(made)
    words = [word.replace("OUT", str(made)) for word in arguments]
    page = [] if "--html" in words else ["--html", "page.html"]
    assert sentence in refused("inspect", made, "--data", data, *words, *page)
    assert [path.name for path in tmp_path.iterdir()] == ["held-out.jsonl"]
    assert contents(made) == before


@pytest.mark.parametrize("change", ["dense", "no tokenizer", "expert", "gate"])
def test_folders_that_do_not_fit(
    out: Path, shared_family: Family, tmp_path: Path, change: str
) -> None:
    data, page = held_out(tmp_path), tmp_path / "page.html"
    folder, sentence = out, ""
    if change == "dense":
        folder, sentence = shared_family.base, "has model_type 'llama'"
    elif change == "no tokenizer":
        (out / "tokenizer.json").unlink()
        sentence = "tokenizer"
    else:
        tensors = load_model(out)
        name = {"expert": "experts.2.w2.weight", "gate": "gate.weight"}[change]
        tensors[f"model.layers.1.block_sparse_moe.{name}"][0, 0] = float("nan")
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        what = {"expert": "weights", "gate": "router logits"}[change]
        sentence = f"NaN or infinite {what} in layer 1"
    assert sentence in refused("inspect", folder, "--data", data, "--html", page, "--quiet")
    assert not page.exists()


def test_odd_places(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A pipe is not read from, and a folder that may not be written to is told of first."""
    data, page = held_out(tmp_path), tmp_path / "page.html"
    os.mkfifo(page)
    words = ["inspect", made, "--data", data, "--html", page]
    assert "is no page of `upit-merge inspect`" in refused(*words)
    page.unlink()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert f"The folder of {page} cannot be written to" in refused(*words)
    assert not page.exists()


def test_a_full_disk_is_told(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(_path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("upit_merge.commands.inspect.replace_text", full)
    page = tmp_path / "page.html"
    words = ["inspect", made, "--data", held_out(tmp_path), "--html", page, "--quiet"]
    assert f"The disk of {page} is full" in refused(*words)


def test_a_wrong_number_of_tokens(made: Path, tmp_path: Path) -> None:
    result = invoke("inspect", made, "--data", held_out(tmp_path), "--tokens", "0")
    assert result.exit_code == 2


def test_hostile_data_in_a_browser(made: Path, tmp_path: Path) -> None:
    """From the data to the screen: markup, control and direction characters, several alphabets."""
    texts = ["</script><b>x</b>\u2028", "a\x00\x1b[2J\u202eb", "שלום 中 é", "tab\t\n\n end"]
    data, page = tmp_path / "odd.jsonl", tmp_path / "page.html"
    rows = [{"text": text, "kind": f"<i>{n % 2}\u202e"} for n, text in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done("inspect", made, "--data", data, "--group-by", "kind", "--html", page, "--quiet")
    wrong: list[str] = []
    with headless_browser() as browser:
        tab = browser.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(page.as_uri())
        seen = tab.locator(".tokens").all_text_contents()
        assert tab.locator(".samples b").count() == 0
    assert wrong == []
    expected = ["</script><b>x</b>⟨U+2028⟩", "a␀␛[2J⟨U+202E⟩b", "שלום 中 é", "tab\t\n\n end"]
    assert [text.replace("\u2027", "") for text in seen] == [f"<s>{text}" for text in expected]


@pytest.fixture
def wide(tmp_path: Path, merge: Callable[..., Path]) -> Path:
    """Sixteen layers, so that a page has much to hold."""
    family = build_family(tmp_path / "wide", num_hidden_layers=16, max_position_embeddings=512)
    return merge(family.recipe(parameters={"num_experts": 8}))


def test_2000_tokens_of_a_deep_mixture(wide: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "long.jsonl", tmp_path / "page.html"
    rows = [{"text": chr(97 + n) + " <words> &c. " * 30} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done("inspect", wide, "--data", data, "--html", page, "--quiet")
    text = page.read_text(encoding="utf-8")
    assert text.count('role="option"') == 2000
    assert len(text.encode()) < 700_000


def test_layers_keep_their_numbers(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """Where the first layer is dense, the mixtures begin with layer 1."""
    kind, architecture, settings, parameters = FORMAT_KINDS["ernie4_5_moe, split, dense"]
    family = build_family(tmp_path / "family", kind=kind, noise=0.2, **settings)
    recipe = family.recipe(
        architecture=architecture, parameters={"seed": 5, "num_experts": 4, **parameters}
    )
    data, page = held_out(tmp_path), tmp_path / "page.html"
    found = inspect(merge(recipe), data, "--html", page)
    assert found["layers"] == [1, 2]
    assert '"layers":[1,2]' in page.read_text(encoding="utf-8")


def test_one_choice_and_one_kind(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """A token that goes to one expert gives it all its weight; a single kind is all text."""
    family = build_family(tmp_path / "family")
    out = merge(family.recipe(parameters={"num_experts": 2, "experts_per_token": 1}))
    data, page = tmp_path / "data.jsonl", tmp_path / "page.html"
    data.write_text('{"text": "abc abc", "kind": "only"}\n' * 3)
    found = inspect(out, data, "--group-by", "kind", "--html", page)
    assert [*found["groups"]] == [found["whole"]] == ["only"]
    assert found["chosen"] == 1
    assert len(found["pairs"]) == 1
    assert found["pairs"][0]["of_median"] is None
    assert "What every expert gets" in page.read_text(encoding="utf-8")
