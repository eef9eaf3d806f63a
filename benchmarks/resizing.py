"""An expert more, or some less: what does it do to the mixture?

python benchmarks/resizing.py --folder F [--seeds 0 1 2] [--json FILE]
python benchmarks/resizing.py --folder F --fewer --assign balanced [--mixed]   # shrink alone
python benchmarks/resizing.py --tables FILE [FILE ...]             # of earlier runs

On the checkpoints that specialised of benchmarks/router_models.py, or did not (--mixed); models
that are in F already are used again and not written to. About ten minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.router import spread  # noqa: E402
from benchmarks.router_models import build, merged  # noqa: E402
from benchmarks.rules import perplexity  # noqa: E402
from upit_merge.commands.extend import extend_output  # noqa: E402
from upit_merge.commands.options import ResizeOptions  # noqa: E402
from upit_merge.commands.shrink import mean_gates, shrink_output  # noqa: E402
from upit_merge.config.router import RouterSettings  # noqa: E402
from upit_merge.io.checkpoint import Checkpoint  # noqa: E402
from upit_merge.models.formats import PROJECTIONS  # noqa: E402
from upit_merge.models.mixture import inspect_mixture, opened_mixture  # noqa: E402
from upit_merge.resizing.rewriting import rewritten_layout, write_model  # noqa: E402
from upit_merge.resizing.sources import Group, Groups, ShrunkMixture  # noqa: E402

Result = dict[str, Any]
QUIET = ResizeOptions(quiet=True)
COUNTS = (6, 4, 3, 2)


def measure_extension(folder: Path, checkpoints: Sequence[Path], scratch: Path) -> Result:
    """A mixture of all but the last checkpoint, to which that one is added."""
    held_out = folder / "held-out.jsonl"
    settings = RouterSettings(data=str(folder / "seed.jsonl"))
    found: Result = {}
    small = merged(folder, checkpoints[:-1], scratch / "small", {})
    found["without the last checkpoint"] = perplexity(small, held_out, None)
    for name, all_gates in (("its own gate row", False), ("all gates fitted", True)):
        out = shutil.copytree(small, scratch / name)
        started = time.perf_counter()
        extend_output(out, str(checkpoints[-1]), settings, QUIET, all_gates=all_gates)
        found[f"seconds, {name}"] = time.perf_counter() - started
        found[f"extended, {name}"] = perplexity(out, held_out, None)
    found["built from all checkpoints"] = perplexity(
        merged(folder, checkpoints, scratch / "all", {}), held_out, None
    )
    return found


def shrunk_otherwise(out: Path, folder: Path, groups: Groups) -> Path:
    """Write a mixture with these groups into another folder."""
    with opened_mixture(out) as moe:
        architecture = inspect_mixture(moe)
        gates = mean_gates(moe, architecture, groups)
        shrunk = ShrunkMixture(moe, architecture, groups, gates)
        names = architecture.of_gates()
        shutil.copytree(out, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        write_model(folder, rewritten_layout(moe, shrunk, names, 10**12), shrunk, {}, quiet=True)
    return folder


def even_groups(num_layers: int, num_experts: int, count: int, seed: int) -> Groups:
    """Experts dealt out at random, each with an equal share of its group's mean."""
    generator = random.Random(seed)
    groups = []
    for _ in range(num_layers):
        order = generator.sample(range(num_experts), num_experts)
        parts = [tuple(order[index::count]) for index in range(count)]
        groups.append([Group(part, (1 / len(part),) * len(part)) for part in parts])
    return groups


def measure_shrinking(
    folder: Path,
    checkpoints: Sequence[Path],
    scratch: Path,
    seed: int,
    assign: str,
    sample: int | None,
) -> Result:
    """Eight experts, merged by what the router does or at random, or thrown away.

    Args:
        assign: Of the router of the eight.
        sample: Of seed data, and of held-out text, so many samples.
    """
    held_out = folder / "held-out.jsonl"
    settings = RouterSettings(data=str(folder / "seed.jsonl"), sample=sample)
    parameters = {"num_experts": 8, "seed": seed}
    router = {"assign": assign, **({"sample": sample} if sample else {})}
    whole = merged(folder, checkpoints, scratch / "whole", parameters, **router)
    found: Result = {"8 experts": perplexity(whole, held_out, sample)}
    for count in COUNTS:
        groups: Any = None
        for how, refit in product(("merge", "drop"), (False, True)):
            out = shutil.copytree(whole, scratch / f"{how}-{refit}")
            shrink_output(out, count, settings, QUIET, how=how, refit=refit)
            found[f"{count}, {how}{', gates refitted' * refit}"] = perplexity(out, held_out, sample)
            report = json.loads((out / "upit_report.json").read_text(encoding="utf-8"))
            groups = groups or report["shrunk"][0]["groups"]
            shutil.rmtree(out)
        kept = [[Group((members[0],), (1.0,)) for members in row] for row in groups]
        by_chance = even_groups(len(groups), 8, count, seed)
        for name, others in (("least used dropped", kept), ("merged at random", by_chance)):
            out = shrunk_otherwise(whole, scratch / "otherwise", others)
            found[f"{count}, {name}"] = perplexity(out, held_out, sample)
            shutil.rmtree(out)
        print(f"{folder.name}, {count}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def _neurons(moe: Checkpoint, layer: int, expert: int) -> np.ndarray:
    """One row per neuron: what it reads and what it writes."""
    form = inspect_mixture(moe).format
    gate, down, up = (
        moe.tensor(form.expert_tensor(layer, expert, p)).double().numpy() for p in PROJECTIONS
    )
    return np.concatenate([gate, up, down.T], axis=1)


def matched(out: Path) -> float:
    """Share of the first checkpoint's neurons that the best assignment to the last's leaves alone.

    The assignment maximises the inner products of matched neurons, over all layers (Git Re-Basin's
    weight matching, arXiv 2209.04836).
    """
    with opened_mixture(out) as moe:
        layers = inspect_mixture(moe).num_layers
        shares = []
        for layer in range(layers):
            first, last = (_neurons(moe, layer, expert) for expert in (0, 5))
            rows, columns = linear_sum_assignment(first @ last.T, maximize=True)
            shares.append(float((rows == columns).mean()))
    return sum(shares) / len(shares)


def print_table(results: list[Result]) -> None:
    print(f"\n{len(results)} seed(s): minimum / mean / maximum\n")
    print("| | held-out perplexity |")
    print("|---|---|")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"| {name} | {spread(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the models; 100 MB a seed")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE", help="of earlier runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--fewer", action="store_true", help="measure shrink, and not extend")
    parser.add_argument("--mixed", action="store_true", help="checkpoints that did not specialise")
    parser.add_argument("--sample", type=int, help="so many samples; all if not given")
    parser.add_argument("--assign", default="lowest", help="of the router before it is shrunk")
    arguments = parser.parse_args()
    if not arguments.folder and not arguments.tables:
        parser.error("give --folder or --tables")
    logging.disable_progress_bar()
    results: list[Result] = []
    for path in arguments.tables or ():
        results += json.loads(path.read_text(encoding="utf-8"))
    for seed in arguments.seeds if not arguments.tables else ():
        kind = "mixed" if arguments.mixed else "specialised"
        folder = arguments.folder / f"{kind}-{seed}"
        build(folder, seed, mixed=arguments.mixed)
        checkpoints = sorted(
            (folder / "sft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )
        found: Result = {}
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            if not arguments.fewer:
                found |= measure_extension(folder, checkpoints, scratch)
            found |= measure_shrinking(
                folder, checkpoints, scratch, seed, arguments.assign, arguments.sample
            )
            if not arguments.fewer:
                found["neurons that are their own best match"] = matched(scratch / "whole")
        results.append(found)
        print(f"{folder.name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
