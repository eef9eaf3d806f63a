"""All four stages on the demo's text: is the trained mixture better than a dense model?

python benchmarks/pipeline.py --folder F                 # three seeds
python benchmarks/pipeline.py --folder F --seeds 0       # one, with its time

For each seed, `upit-merge demo --all-stages`: a base model is fine-tuned (2 epochs, 6
checkpoints), merged into 8 experts, and the mixture is trained for 2 epochs more; beside it the
last checkpoint, on the same tokens in the same order. One learning rate could suit one of them
only, so both are trained with half and with twice that rate too; of each the best counts. What is
done is in F; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from upit_merge.commands.compare import Rival  # noqa: E402
from upit_merge.commands.evaluate import EvaluateOptions, evaluate_output  # noqa: E402
from upit_merge.config.router import RouterSettings  # noqa: E402

FACTORS = (0.5, 2.0)
KINDS = {"dense": "baseline.yml", "mixture": "post_train.yml"}
MODELS = ("base model", "last checkpoint", "mixture before post-training")
PLAIN = {"dense": "dense, same tokens", "mixture": "trained mixture"}


def run(*command: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "upit_merge", *command], cwd=folder, check=True)


def all_stages(folder: Path, seed: int) -> None:
    """Run the demo of a seed, or go on with it; its minutes are kept if it ran in one piece."""
    if not folder.exists():
        started = time.perf_counter()
        run("demo", "--all-stages", str(folder), "--seed", str(seed), "--quiet", folder=ROOT)
        minutes = (time.perf_counter() - started) / 60
        (folder / "minutes.json").write_text(json.dumps(minutes))
    run("pipeline", "pipeline.yml", "--quiet", folder=folder)


def train_with_other_rates(folder: Path) -> None:
    """Train both once more, with everything as in stage 4 but the learning rate."""
    for kind, file in KINDS.items():
        settings = yaml.safe_load((folder / "run" / file).read_text())
        for factor in FACTORS:
            name = f"{kind}-{factor}"
            changed = {
                **settings,
                "output_dir": f"./rates/{name}",
                "learning_rate": settings["learning_rate"] * factor,
            }
            (folder / f"{name}.yml").write_text(yaml.safe_dump(changed))
            run("finetune", f"{name}.yml", "--quiet", folder=folder)


def named(kind: str, factor: float) -> str:
    return f"{PLAIN[kind]}, {factor} x rate"


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Held-out perplexity by kind of text, of every model."""
    out = folder / "rates.json"
    if not out.is_file():
        rivals = []
        for factor in FACTORS:
            dense = next((folder / "rates" / f"dense-{factor}").glob("checkpoint-*"))
            rivals.append(Rival(named("dense", factor), str(dense)))
            mixture = folder / "rates" / f"mixture-{factor}"
            rivals.append(Rival(named("mixture", factor), str(mixture)))
        data = RouterSettings(data=str(folder / "held-out.jsonl"))
        options = EvaluateOptions(
            group_by="domain", json=out, experts=False, against=tuple(rivals), quiet=True
        )
        evaluate_output(folder / "run" / "model", data, options)
    report = json.loads((folder / "run" / "evaluation.json").read_text())
    others = [*report["others"], *json.loads(out.read_text())["others"]]
    found = {o["model"]: {**o["groups"], "all": o["perplexity"]} for o in others}
    groups = report["groups"]
    found[PLAIN["mixture"]] = {name: group["perplexity"] for name, group in groups.items()}
    for kind, plain in PLAIN.items():
        rows = [found[plain], *(found[named(kind, factor)] for factor in FACTORS)]
        found[f"best {kind}"] = min(rows, key=lambda row: row["all"])
    return found


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: mean over the seeds, all of them for the last column."""
    first = next(iter(results.values()))
    kinds = list(first["best mixture"])
    lines = [
        f"| model | {' | '.join(kinds)} | by seed |",
        f"|---|{'---:|' * len(kinds)}---|",
    ]
    trained = [
        name
        for kind, plain in PLAIN.items()
        for name in (plain, *(named(kind, factor) for factor in FACTORS))
    ]
    for model in (*MODELS, *trained, "best dense", "best mixture"):
        rows = [result[model] for result in results.values()]
        cells = [f"{statistics.mean(row[kind] for row in rows):.2f}" for kind in kinds]
        by_seed = ", ".join(f"{row['all']:.2f}" for row in rows)
        lines.append(f"| {model} | {' | '.join(cells)} | {by_seed} |")
    return "\n".join(lines)


def verdict(results: dict[int, dict[str, Any]]) -> str:
    """How much better the mixture is than the best dense model, seed by seed."""
    changes = [
        result["best mixture"]["all"] / result["best dense"]["all"] - 1
        for result in results.values()
    ]
    told = ", ".join(f"{change:+.1%}" for change in changes)
    better = sum(change < 0 for change in changes)
    return (
        f"Perplexity of the best mixture against the best dense model, by seed: {told}; lower "
        f"on {better} of {len(changes)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in options.seeds:
        folder = (options.folder / f"demo-{seed}").absolute()
        all_stages(folder, seed)
        train_with_other_rates(folder)
        results[seed] = measured(folder)
        if (folder / "minutes.json").is_file():
            minutes = json.loads((folder / "minutes.json").read_text())
            print(f"Seed {seed}: all stages in {minutes:.1f} minutes.")
    print(table(results))
    print(verdict(results))


if __name__ == "__main__":
    main()
