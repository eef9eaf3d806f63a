"""The router's objectives: held-out perplexity before any post-training, time and memory.

python benchmarks/router.py --folder F [--seeds 0 1 2] [--json FILE]
python benchmarks/router.py --tables FILE [FILE ...] [--timed FILE ...]      # of earlier runs

Builds two kinds of models for every seed (benchmarks/router_models.py), checkpoints that
specialised and checkpoints of a well-mixed run; those that are in F already are used again. Every
way to make the gates runs in a process of its own. Half an hour of training on two cores, and a
quarter of an hour for the fits of each seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.perplexity import (  # noqa: E402
    average_model,
    mixture_perplexity,
    perplexity,
    set_gates,
)
from benchmarks.router_fits import CPU, FITS, SETTINGS, samples_of  # noqa: E402
from benchmarks.router_models import build  # noqa: E402
from upit_merge.config.router import RouterSettings  # noqa: E402
from upit_merge.demo.corpus import load_domains  # noqa: E402
from upit_merge.demo.training import learning_rate_cycle, pack, sequences  # noqa: E402
from upit_merge.engine.layerwise import LayerwiseMixture  # noqa: E402
from upit_merge.models.mixture import opened_mixture  # noqa: E402
from upit_merge.models.tokenizer import load_tokenizer  # noqa: E402
from upit_merge.router.router_gain import SampleLosses, measure_router_gain  # noqa: E402

# On the well-mixed models the question is only whether anything makes it worse.
POST_TRAINED = ("random 0", "one_vs_rest (default)", "default, assign: balanced")
MIXED = ("one_vs_rest (default)", "softmax", "ridge", "hidden", "upit", "default, assign: balanced")
EVERY = [name for name in FITS if name not in ("losses", "sweep") and "random" not in name]
VARIANTS = {"specialised": EVERY, "mixed": list(MIXED)}
RANDOM = ("random 0", "random 1", "random 2")

Result = dict[str, Any]


def fit(folder: Path, variant: str) -> Result:
    """Make the gates in another process; its seconds and peak memory."""
    command = [sys.executable, "-m", "benchmarks.router_fits", str(folder), variant]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(output.stdout.splitlines()[-1]))


def held_out_perplexity(folder: Path, variant: str) -> float:
    """Of the mixture with these gates: geometric mean over the domains."""
    trained = SETTINGS.get(variant, {}).get("upit", {}).get("train_experts", False)
    gates = load_file(folder / "fits" / f"{variant}.safetensors")
    model_folder = folder / "fits" / "trained" if trained else folder / "moe"
    layers = [gates[str(layer)] for layer in range(len(gates))]
    return mixture_perplexity(model_folder, layers, folder / "held-out.jsonl")


def references(folder: Path) -> dict[str, float]:
    """Held-out perplexity of the base, of every checkpoint and of their average."""
    texts: dict[str, list[str]] = {}
    for line in (folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["domain"], []).append(row["text"])
    tokenizer = load_tokenizer(folder / "moe")

    def measure(model: Any) -> float:
        return geometric_mean(perplexity(model, tokenizer, part) for part in texts.values())

    checkpoints = sorted((folder / "sft").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    found = {"base": measure(AutoModelForCausalLM.from_pretrained(folder / "base"))}
    for path in checkpoints:
        found[path.name] = measure(AutoModelForCausalLM.from_pretrained(path))
    found["average of checkpoints"] = measure(average_model(checkpoints))
    return found


def worth(folder: Path) -> dict[str, Any]:
    """Whether the experts differ on the seed data, from the losses that a fit has kept."""
    with opened_mixture(folder / "moe") as moe:
        model = LayerwiseMixture(moe, CPU)
        settings = RouterSettings(data=str(folder / "seed.jsonl"))
        seeds = samples_of(model, folder, settings)
    sums = [
        load_file(folder / "fits" / "losses" / f"losses-{expert}.safetensors")["sums"]
        for expert in range(model.num_experts)
    ]
    return measure_router_gain(SampleLosses.of(seeds.samples, sums)).to_report()


def measure(folder: Path, variants: list[str]) -> Result:
    """Everything about the models of one seed."""
    shutil.rmtree(folder / "fits", ignore_errors=True)  # losses that are kept would not be timed
    results: Result = {"references": references(folder), "fits": {}}
    for variant in ["losses", "sweep", *RANDOM, *variants]:
        result = fit(folder, variant)
        if variant not in ("losses", "sweep"):
            result["perplexity"] = held_out_perplexity(folder, variant)
        results["fits"][variant] = result
        print(f"{folder.name}: {variant}: {json.dumps(result)}", flush=True)
    results["worth"] = worth(folder)
    return results


def post_train(folder: Path, variant: str, steps: int) -> float:
    """Held-out perplexity after training the whole mixture for a while on all domains alike.

    With the load-balancing loss of transformers' Mixtral; 9 rows of 128 tokens per step.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "moe")
    gates = load_file(folder / "fits" / f"{variant}.safetensors")
    set_gates(model, [gates[str(layer)] for layer in range(len(gates))])
    model.router_aux_loss_coef = 0.01
    model.train()
    tokenizer = load_tokenizer(folder / "moe")
    generator = torch.Generator().manual_seed(0)
    domains = load_domains()
    streams = [sequences(pack(tokenizer, d.train, 128), generator) for d in domains]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate_cycle(step, steps)
        batch = torch.stack([next(stream) for stream in streams for _ in range(3)])
        model(
            input_ids=batch, labels=batch, use_cache=False, output_router_logits=True
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return geometric_mean(perplexity(model, tokenizer, domain.heldout) for domain in domains)


def spread(values: list[float], digits: int = 2) -> str:
    """Smallest, mean and largest."""
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))


def table(results: list[Result], variants: list[str]) -> list[str]:
    """Markdown: one row per reference and way to make the gates; min / mean / max over the seeds."""
    lines = ["| | held-out perplexity | below random | gates, s | whole stage, s | peak, MiB |"]
    lines.append("|---|---|---|---|---|---|")
    random = [
        geometric_mean(result["fits"][name]["perplexity"] for name in RANDOM) for result in results
    ]

    def row(name: str, values: list[float], *cells: str) -> None:
        below = spread([100 * (1 - v / r) for v, r in zip(values, random, strict=True)], 1)
        lines.append(f"| {name} | {spread(values)} | {below} % | {' | '.join(cells)} |")

    checkpoints = [
        [v for name, v in result["references"].items() if name.startswith("checkpoint")]
        for result in results
    ]
    row("best checkpoint", [min(values) for values in checkpoints], "", "", "")
    row(
        "average of checkpoints",
        [result["references"]["average of checkpoints"] for result in results],
        "",
        "",
        "",
    )
    row("random (mean of 3)", random, "0", "0", "")
    for variant in variants:
        fits = [result["fits"][variant] for result in results]
        timed = [result for result in results if result.get("timed", True)]
        gates = [total(result["fits"][variant]["seconds"]) for result in timed]
        needs_losses = SETTINGS.get(variant, {}).get("assign") not in ("shuffled", "column")
        whole = [
            seconds + (result["fits"]["losses"]["seconds"]["losses"] if needs_losses else 0.0)
            for seconds, result in zip(gates, timed, strict=True)
        ]
        losses = max(result["fits"]["losses"]["peak"] for result in results)
        peak = max(losses * needs_losses, *(found["peak"] for found in fits))
        row(
            variant,
            [found["perplexity"] for found in fits],
            f"{mean(gates):.1f}",
            f"{mean(whole):.1f}",
            f"{peak:.0f}",
        )
    return lines


def total(seconds: dict[str, float]) -> float:
    """Of a stage but for the losses; `fitting` is part of `gates`."""
    return sum(value for name, value in seconds.items() if name not in ("losses", "fitting"))


def shares(results: list[Result], variants: list[str]) -> list[str]:
    """Markdown: what fitting costs, in forward sweeps of the seed data."""
    results = [result for result in results if result.get("timed", True)]
    lines = ["| objective | fitting / one forward sweep |", "|---|---|"]
    for variant in variants:
        ratios = [
            result["fits"][variant]["seconds"]["fitting"]
            / result["fits"]["sweep"]["seconds"]["sweep"]
            for result in results
        ]
        lines.append(f"| {variant} | {spread([100 * ratio for ratio in ratios], 1)} % |")
    loop, stage = "upit, model in the loop", "one_vs_rest (default)"
    gates, whole = [], []
    for result in results:
        fits = result["fits"]
        losses = fits["losses"]["seconds"]["losses"]
        slow, fast = total(fits[loop]["seconds"]), total(fits[stage]["seconds"])
        gates.append(slow / fast)
        whole.append((slow + losses) / (fast + losses))
    lines += [
        "",
        f"4 epochs with the model in the loop take {spread(gates, 1)} times as long as the default's "
        f"gates; with the losses of the experts added to both, {spread(whole, 2)} times.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the models; 100 MB a seed")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE", help="of earlier runs")
    parser.add_argument(
        "--timed", type=Path, nargs="+", metavar="FILE", help="those that nothing disturbed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--post-training", type=int, default=0, metavar="STEPS", help="train some mixtures further"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    results: dict[str, list[Result]] = {"specialised": [], "mixed": []}
    for path in arguments.tables or ():
        for kind, found in json.loads(path.read_text(encoding="utf-8")).items():
            timed = arguments.timed is None or path in arguments.timed
            results[kind] += [{**result, "timed": timed} for result in found]
    if not arguments.tables:
        for kind, found in results.items():
            for seed in arguments.seeds:
                folder = arguments.folder / f"{kind}-{seed}"
                build(folder, seed, mixed=kind == "mixed")
                found.append(measure(folder, VARIANTS[kind]))
                if arguments.post_training and kind == "specialised":
                    found[-1]["post-trained"] = {
                        variant: post_train(folder, variant, arguments.post_training)
                        for variant in POST_TRAINED
                    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_tables(results)


def print_tables(results: dict[str, list[Result]]) -> None:
    for kind, found in results.items():
        print(f"\n{kind} checkpoints, {len(found)} seeds: minimum / mean / maximum\n")
        print("\n".join(table(found, VARIANTS[kind])))
        for result in found:
            print(f"\n{result['worth']['verdict']}")
    print()
    fitted = ("one_vs_rest (default)", "softmax", "ridge", "hidden", "upit")
    print("\n".join(shares(results["specialised"], list(fitted))))
    for variant in POST_TRAINED:
        values = [r["post-trained"][variant] for r in results["specialised"] if "post-trained" in r]
        if values:
            print(f"{variant}, after more training on everything: {spread(values)}")


if __name__ == "__main__":
    main()
