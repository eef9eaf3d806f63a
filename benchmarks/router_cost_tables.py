"""Tables of what benchmarks/router_cost.py measured, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

Result = dict[str, Any]
NAMES = {
    "tiny/specialised": "tiny, specialised",
    "tiny/mixed": "tiny, well mixed",
    "tiny/apart": "tiny, far apart",
    "real/specialised": "SmolLM2-135M, specialised",
    "real/mixed": "SmolLM2-135M, well mixed",
}


def print_tables(results: dict[str, Result]) -> None:
    """Print all tables of which there are results."""
    found = list(results.values())
    for title, lines in (
        ("CPU seconds of the whole stage", costs(found)),
        ("Memory, MiB", memory(found)),
        ("Quality", quality(found)),
    ):
        print(f"\n{title}\n")
        print("\n".join(lines))


def grouped(results: Iterable[Result]) -> dict[tuple[str, int, int], dict[str, list[Result]]]:
    """Results by model, experts and samples, and by what was run."""
    groups: dict[tuple[str, int, int], dict[str, list[Result]]] = {}
    for result in results:
        size = result["model"], result["experts"], result["samples"]
        groups.setdefault(size, {}).setdefault(result["what"], []).append(result)
    return dict(sorted(groups.items()))


def name_of(model: str) -> str:
    kind, _, seed = model.partition("-")
    return NAMES[kind] + (f", seed {seed}" if seed else "")


def cell(runs: list[Result] | None, key: str, form: str = ",.1f") -> str:
    """Median over equal runs; nothing where there are none."""
    values = [run[key] for run in runs or () if run.get(key) is not None]
    return format(median(values), form) if values else ""


def ratio(runs: list[Result] | None, others: list[Result] | None, key: str) -> float | None:
    if not runs or not others:
        return None
    return median(run[key] for run in runs) / median(other[key] for other in others)


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x"


def costs(results: list[Result]) -> list[str]:
    """One row for each size: seconds of every version, and how many times less than 0.5.0's."""
    lines = [
        "| model | experts | samples (tokens) | 0.5.0 | `exact` | `first_order` | **`auto`** | "
        "0.5.0 / `exact` | 0.5.0 / `auto` | mergekit-moe, `hidden` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, experts, samples), runs in grouped(results).items():
        old, exact, auto = (runs.get(what) for what in ("0.5.0", "exact", "auto"))
        if not old and "mergekit-moe" not in runs:
            continue
        tokens = cell(old or auto, "tokens", ",d")
        cells = [name_of(model), str(experts), f"{samples:,} ({tokens})", cell(old, "cpu")]
        cells += [cell(runs.get(what), "cpu") for what in ("exact", "first_order", "auto")]
        cells += [times(ratio(old, exact, "cpu")), times(ratio(old, auto, "cpu"))]
        lines.append(f"| {' | '.join(cells)} | {cell(runs.get('mergekit-moe'), 'cpu')} |")
    return lines


def memory(results: list[Result]) -> list[str]:
    """Peak of the whole process, imports included, against 0.5.0's and what is foretold."""
    lines = [
        "| model | experts | samples | 0.5.0 | `exact` | `first_order` | `auto` | "
        "`auto` / 0.5.0 | foretold for `auto` | `auto` / foretold |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, experts, samples), runs in grouped(results).items():
        if "0.5.0" not in runs:
            continue
        cells = [name_of(model), str(experts), f"{samples:,}"]
        for what in ("0.5.0", "exact", "first_order", "auto"):
            cells.append(cell(runs.get(what), "peak", ",.0f"))
        auto = runs.get("auto")
        share = ratio(auto, runs["0.5.0"], "peak")
        cells += ["" if share is None else f"{share:.2f}", cell(auto, "foretold", ",.0f")]
        told = [run["peak"] / run["foretold"] for run in auto or () if run.get("foretold")]
        lines.append(f"| {' | '.join(cells)} | {f'{median(told):.2f}' if told else ''} |")
    return lines


def quality(results: list[Result]) -> list[str]:
    """Held-out perplexity by exact and estimated losses; what the choice gives up of its gain."""
    lines = [
        "| model | experts | perplexity, `exact` | `first_order` | `auto` | gain over the best single "
        "expert, nats | given up by `first_order` | by `auto` | same expert, `first_order` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, experts, _samples), runs in grouped(results).items():
        if not all("perplexity" in runs.get(w, [{}])[0] for w in ("exact", "auto")):
            continue
        exact, auto = runs["exact"][0], runs["auto"][0]
        first = runs.get("first_order", [auto])[0]
        cells = [name_of(model), str(experts), f"{exact['perplexity']:.3f}"]
        for run in (first, auto):
            change = 100 * (run["perplexity"] / exact["perplexity"] - 1)
            cells.append(f"{run['perplexity']:.3f} ({change:+.2f} %)")
        cells.append(f"{auto['gain']:.4f}")
        cells += [f"{100 * run['given_up'] / run['gain']:.1f} %" for run in (first, auto)]
        lines.append(f"| {' | '.join(cells)} | {100 * first['agreement']:.0f} % |")
    return lines
