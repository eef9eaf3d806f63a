"""Which checkpoints are kept and who is crossed with whom: do the rules matter?

python benchmarks/rules.py --folder F [--mixed] [--seeds 0 1 2] [--sample 600] [--json FILE]
python benchmarks/rules.py --tables FILE [FILE ...]                # of earlier runs

On the checkpoints of benchmarks/router_models.py that specialised, or with --mixed on those of a
well-mixed run (of which only the choice among too many is measured); models that are in F already
are used again and not written to. Every rule's MoE is built whole, with the router's defaults on
the seed data, and its held-out perplexity measured before any further training; that takes about
a minute a row, ten minutes a seed, on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.router import spread  # noqa: E402
from benchmarks.router_fits import CPU  # noqa: E402
from benchmarks.router_models import build, merged  # noqa: E402
from upit_merge.config.router import RouterSettings  # noqa: E402
from upit_merge.engine.layerwise import LayerwiseMixture  # noqa: E402
from upit_merge.models.mixture import opened_mixture  # noqa: E402
from upit_merge.router.evaluation import Evaluation, Groups, run_mixture  # noqa: E402
from upit_merge.router.pretrain import seed_set_for  # noqa: E402
from upit_merge.router.stage import RouterStage  # noqa: E402

Result = dict[str, Any]
Rules = dict[str, dict[str, Any]]

FEW, MANY = 4, 8
FARTHEST = {"parents": "farthest_child"}

# `parameters:` of the recipe, by what the table calls them.
TOO_FEW: Rules = {
    "no expansion": {"num_experts": FEW},
    "most_dissimilar (default)": {},
    "most_dissimilar, repeat_pairs": {"repeat_pairs": True},
    "random": {"parents": "random"},
    "farthest_child": FARTHEST,
    "most_dissimilar, by layer": {"granularity": "layer"},
    "farthest_child, by layer": {**FARTHEST, "granularity": "layer"},
    "most_dissimilar, by tensor": {"granularity": "tensor"},
    "farthest_child, by tensor": {**FARTHEST, "granularity": "tensor"},
}
TOO_MANY: Rules = {
    "last (default)": {},
    "diverse": {"select": "diverse"},
    "merge_similar": {"select": "merge_similar"},
}


def evenly(checkpoints: list[Path], count: int) -> list[Path]:
    """So many of them, spread over the run, the first and the last among them."""
    last = len(checkpoints) - 1
    return [checkpoints[round(index * last / (count - 1))] for index in range(count)]


def perplexity(folder: Path, data: Path, sample: int | None) -> float:
    """Of a finished mixture on held-out text: geometric mean over the domains."""
    settings = RouterSettings(data=str(data), sample=sample)
    with opened_mixture(folder) as moe, tempfile.TemporaryDirectory() as scratch:
        model = LayerwiseMixture(moe, CPU)
        samples = seed_set_for(model, folder, settings, 0, column="domain")
        stage = RouterStage(model, samples, settings, 0, Path(scratch), quiet=True)
        sums, routing = run_mixture(stage)
    groups = Groups.of(samples.samples)
    found = Evaluation(samples.samples, groups, sums, routing)
    return geometric_mean(
        found.perplexity(members)
        for name, members in groups.members.items()
        if name != groups.whole
    )


def measure_rule(
    folder: Path, checkpoints: list[Path], parameters: dict[str, Any], sample: int
) -> Result:
    """Build one MoE; how far apart its experts are, and its perplexity."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        out = merged(folder, checkpoints, Path(scratch) / "moe", parameters, sample=sample)
        built = time.perf_counter() - started
        report = json.loads((out / "upit_report.json").read_text(encoding="utf-8"))
        value = perplexity(out, folder / "held-out.jsonl", None)
    norm = mean(report["checkpoint_gram"][i][i] ** 0.5 for i in range(len(checkpoints)))
    lineage = report["lineage"]
    return {
        "smallest": lineage["smallest_distance"] / norm,
        "mean": lineage["mean_distance"] / norm,
        "perplexity": value,
        "seconds": built,
    }


def measure(folder: Path, seed: int, sample: int, *, mixed: bool) -> dict[str, dict[str, Result]]:
    """All rules on the models of one seed."""
    checkpoints = sorted(
        (folder / "sft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    found: dict[str, dict[str, Result]] = {"too few": {}, "too many": {}}
    for situation, rules, listed, experts in (
        ("too few", TOO_FEW, evenly(checkpoints, FEW), MANY),
        ("too many", TOO_MANY, checkpoints, FEW),
    ):
        if mixed and situation == "too few":
            continue
        for name, rule in rules.items():
            parameters = {"num_experts": experts, "seed": seed, **rule}
            result = measure_rule(folder, listed, parameters, sample)
            found[situation][name] = result
            print(f"{folder.name}: {name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return found


def print_tables(results: list[dict[str, dict[str, Result]]]) -> None:
    titles = {
        "too few": f"{FEW} checkpoints to {MANY} experts",
        "too many": f"all checkpoints to {FEW} experts",
    }
    for situation, title in titles.items():
        if not results[0][situation]:
            continue
        print(f"\n{title}, {len(results)} seed(s): minimum / mean / maximum\n")
        print("| | smallest distance | mean distance | held-out perplexity | build, s |")
        print("|---|---|---|---|---|")
        for name in results[0][situation]:
            rows = [result[situation][name] for result in results]
            cells = [
                spread([row[key] for row in rows], digits)
                for key, digits in (("smallest", 3), ("mean", 3), ("perplexity", 2), ("seconds", 0))
            ]
            print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\nDistances of the experts' deltas, divided by the mean norm of the checkpoints' deltas."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the models; 100 MB a seed")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE", help="of earlier runs")
    parser.add_argument(
        "--mixed", action="store_true", help="on checkpoints that did not specialise"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sample", type=int, default=600, help="seed samples of the router")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    if not arguments.folder and not arguments.tables:
        parser.error("give --folder or --tables")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    results = []
    for path in arguments.tables or ():
        results += json.loads(path.read_text(encoding="utf-8"))
    if not arguments.tables:
        for seed in arguments.seeds:
            kind = "mixed" if arguments.mixed else "specialised"
            folder = arguments.folder / f"{kind}-{seed}"
            build(folder, seed, mixed=arguments.mixed)
            results.append(measure(folder, seed, arguments.sample, mixed=arguments.mixed))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_tables(results)


if __name__ == "__main__":
    main()
