"""Does the merge take longer, or more memory, in another format? Processes of their own, in turn.

python -m benchmarks.merge_formats --folder FOLDER [--layers 8] [--rounds 3]

Models of Qwen2.5-0.5B's sizes with random weights, in bfloat16, a base and 3 checkpoints: as Llamas
they become a Mixtral, as Qwen2 models a GLM-4-MoE or a GraniteMoE; 8 experts. Compared is the CPU time
of a round's merges with that of its Mixtral, per byte that is written, and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": ("llama", "mixtral", {}),
    "GLM-4-MoE, zero": ("qwen2", "glm4_moe", {}),
    "GLM-4-MoE, split": ("qwen2", "glm4_moe", {"shared": "split"}),
    "GraniteMoE": ("qwen2", "granitemoe", {}),
}


def make(folder: Path, kind: str, layers: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "checkpoint-3").is_dir():
        return
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, num_hidden_layers=layers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.002)
        model.save_pretrained(folder / f"checkpoint-{step}")


def peak_mebibytes() -> float:
    """Of this process alone; what `getrusage` tells may be its parent's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def merge(folder: Path, architecture: str, parameters: dict[str, Any], out: Path) -> None:
    """Merge, and print what that took; in a process that does nothing else."""
    import yaml

    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    document = {
        "merge_method": "upit",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "checkpoint-*")}],
        "architecture": architecture,
        "parameters": {"num_experts": 8, **parameters},
    }
    recipe, before, started = parse_recipe(document), time.process_time(), time.time()
    run_recipe(recipe, yaml.safe_dump(document), out, RunOptions(quiet=True))
    found = {
        "cpu": time.process_time() - before,
        "wall": time.time() - started,
        "memory": peak_mebibytes(),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folders = {kind: arguments.folder / f"{kind}-{arguments.layers}" for kind in ("llama", "qwen2")}
    if arguments.one:
        kind, architecture, parameters = VARIANTS[arguments.one]
        merge(folders[kind], architecture, parameters, arguments.folder / "out")
        return
    for kind, folder in folders.items():
        make(folder, kind, arguments.layers)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    command = [sys.executable, "-m", "benchmarks.merge_formats", "--folder", str(arguments.folder)]
    command += ["--layers", str(arguments.layers)]
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            shutil.rmtree(arguments.folder / "out", ignore_errors=True)
            done = subprocess.run([*command, "--one", name], check=True, stdout=subprocess.PIPE)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, rows[name][-1], flush=True)
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)
    print("\n| format | GB written | CPU s | of Mixtral's | per byte | peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, found in rows.items():
        pairs = list(zip(found, rows["Mixtral"], strict=True))
        ratio = statistics.median(one["cpu"] / other["cpu"] for one, other in pairs)
        written = found[0]["bytes"] / rows["Mixtral"][0]["bytes"]
        cpu = statistics.median(one["cpu"] for one in found)
        print(
            f"| {name} | {found[0]['bytes'] / 1e9:.2f} | {cpu:.1f} | {ratio:.2f} | "
            f"{ratio / written:.2f} | {max(one['memory'] for one in found):.0f} |"
        )


if __name__ == "__main__":
    main()
