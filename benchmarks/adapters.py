"""Comparing LoRA adapters by their factors, against comparing the same models merged.

A base and adapters of it are made, and the adapters merged into complete checkpoints by plain
arithmetic. Then the similarity pass and whole runs are timed on both, in turn.

    python benchmarks/adapters.py --folder F [--hidden 1024] [--layers 8] [--count 8] [--rank 16]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened
from upit_merge.merge.passes import measure_similarity

ALPHA = 32
TARGETS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "self_attn": ("q_proj", "v_proj")}
SAMPLING_SECONDS = 0.01


def configuration(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "vocab_size": 8000,
    }


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_models(folder: Path, config: dict[str, Any], count: int, rank: int) -> None:
    """A base, adapters, and the adapters merged into it."""
    torch.manual_seed(0)
    base = {name: 0.02 * torch.randn(shape) for name, shape in shapes(config)}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    write_model(folder / "base", config, base)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": [module for modules in TARGETS.values() for module in modules],
        "task_type": "CAUSAL_LM",
    }
    for index in range(count):
        factors, merged = {}, dict(base)
        for layer in range(config["num_hidden_layers"]):
            for block, modules in TARGETS.items():
                for module in (f"model.layers.{layer}.{block}.{m}" for m in modules):
                    rows, columns = base[f"{module}.weight"].shape
                    up, down = torch.randn(rows, rank) * 0.01, torch.randn(rank, columns) * 0.01
                    factors[f"base_model.model.{module}.lora_A.weight"] = down
                    factors[f"base_model.model.{module}.lora_B.weight"] = up
                    total = base[f"{module}.weight"].float() + ALPHA / rank * (up @ down)
                    merged[f"{module}.weight"] = total.bfloat16()
        adapter = folder / "adapters" / f"checkpoint-{index + 1}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
        write_model(folder / "merged" / f"checkpoint-{index + 1}", config, merged)


def recipe(folder: Path, kind: str, **extra: Any) -> dict[str, Any]:
    models = [{"model": str(folder / kind / "checkpoint-*")}]
    return {"merge_method": "upit", "base_model": str(folder / "base"), "models": models, **extra}


def similarity(document: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Seconds the pass takes, models opened and closed, and its Gram matrices."""
    started = time.perf_counter()
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        gram = measure_similarity(inputs, (torch.device("cpu"),), quiet=True)
    return time.perf_counter() - started, gram


def num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # moved meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def whole_run(folder: Path, document: dict[str, Any]) -> tuple[float, int, int]:
    """Seconds of a run, bytes of its output, and of all new files at their peak."""
    before, peak, over = num_bytes(folder), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLING_SECONDS):
            peak = max(peak, num_bytes(folder) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    run_recipe(
        parse_recipe(document), yaml.safe_dump(document), folder / "out", RunOptions(quiet=True)
    )
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    written = num_bytes(folder / "out")
    with safe_open(folder / "out" / "model.safetensors", framework="pt") as file:
        assert len(file.keys())
    shutil.rmtree(folder / "out")
    return seconds, written, peak


def told(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="is made and removed again")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder
    try:
        config = configuration(options.hidden, options.layers)
        make_models(folder, config, options.count, options.rank)
        measure(folder, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, rounds: int) -> None:
    kinds = ("adapters", "merged")
    grams = {kind: similarity(recipe(folder, kind))[1] for kind in kinds}  # warms the page cache
    norms = grams["merged"].diagonal(dim1=-2, dim2=-1).sqrt()
    difference = (grams["adapters"] - grams["merged"]) / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _round in range(rounds):
        for kind in kinds:
            seconds[kind].append(similarity(recipe(folder, kind))[0])
    ratios = [a / b for a, b in zip(seconds["adapters"], seconds["merged"], strict=True)]
    extra = {"parameters": {"num_experts": len(load_labels(folder)), "experts_per_token": 2}}
    runs = {kind: whole_run(folder, recipe(folder, kind, **extra)) for kind in kinds}
    print("| | adapters | merged checkpoints | adapters / merged |")
    print("|---|---|---|---|")
    passes = " | ".join(told(seconds[kind]) for kind in kinds)
    print(f"| similarity pass, s | {passes} | {told(ratios)} |")
    inputs = [num_bytes(folder / kind) / 1e9 for kind in kinds]
    print(f"| inputs beside the base, GB | {inputs[0]:.3f} | {inputs[1]:.2f} | |")
    whole = [runs[kind][0] for kind in kinds]
    print(f"| whole run, s | {whole[0]:.1f} | {whole[1]:.1f} | {whole[0] / whole[1]:.2f} |")
    peaks = " | ".join(f"{(runs[k][2] - runs[k][1]) / 1e6:.1f}" for k in kinds)
    print(f"| peak disk beyond the output ({runs['adapters'][1] / 1e9:.2f} GB), MB | {peaks} | |")
    print(f"\nLargest difference of two cosines: {float(difference.abs().max()):.1e}")


def load_labels(folder: Path) -> list[str]:
    return [path.name for path in (folder / "adapters").iterdir()]


if __name__ == "__main__":
    main()
