"""What models of usual sizes take as mixtures: disk, memory, GPU memory; and a merge of some.

    python benchmarks/hardware.py --folder F [--measure "Llama-3.2-1B 4" ...]
        [--route "Llama-3.2-1B 4 8 128" ...]

Writes models of the published shapes whose weights are holes (sparse files: gigabytes that take no
disk), opens them by a recipe, and asks the program's own preflight. `--measure` merges such models
for real, one process each, and compares its peak memory with what was foretold; `--route` fits a
router too, on so many samples of so many tokens. The output is deleted again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from upit_merge.commands.preflight import needs
from upit_merge.config.recipe import parse_recipe
from upit_merge.data.tokens import SeedSet, TokenizedSample
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.models.families import FAMILIES
from upit_merge.models.formats import FORMATS, PLAIN

CHECKPOINTS = 4
SAMPLES, TOKENS = 1000, 512  # of seed data, the defaults
CONTEXT = 4096  # tokens of the key-value cache
ITEM = 2  # bytes of a bfloat16
WORD = 3  # the one token that samples are made of
# Bytes per parameter of AdamW in mixed precision: weights and gradients in bfloat16; a float32 copy
# of the weights and two moments.
FULL_TRAINING = 2 + 2 + 4 + 4 + 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a published dense model."""

    model_type: str
    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int
    head: int
    vocabulary: int
    tied: bool

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.keys,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        family = FAMILIES[self.model_type]
        settings = family.settings(family.read(self.config)) | PLAIN
        return FORMATS[family.targets[0]].dense_shapes(settings)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one sequence of `CONTEXT` tokens."""
        return 2 * self.layers * self.keys * self.head * CONTEXT * ITEM


SHAPES = {
    "Qwen3-0.6B": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "Llama-3.2-1B": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128_256, True),
    "Llama-3.2-3B": Shape("llama", 3072, 8192, 28, 24, 8, 128, 128_256, True),
    "Qwen3-4B": Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True),
    "Llama-2-7B": Shape("llama", 4096, 11_008, 32, 32, 32, 128, 32_000, False),
    "Mistral-7B": Shape("mistral", 4096, 14_336, 32, 32, 8, 128, 32_000, False),
    "Llama-3-8B": Shape("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
}
EXPERTS = (4, 8)


def write_model(folder: Path, shape: Shape) -> None:
    """A model whose weights are all zero, as a hole in its file."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    offset = 0
    for name, sizes in shape.tensors():
        end = offset + ITEM * torch.Size(sizes).numel()
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")


def write_family(folder: Path, name: str) -> None:
    for model in ("base", *(f"checkpoint-{i}" for i in range(CHECKPOINTS))):
        write_model(folder / name / model, SHAPES[name])
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "w": WORD}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / name / model)


def recipe_of(folder: Path, name: str, experts: int) -> dict[str, Any]:
    return {
        "merge_method": "upit",
        "base_model": str(folder / name / "base"),
        "models": [{"model": str(folder / name / "checkpoint-*")}],
        "dtype": "bfloat16",
        "parameters": {"num_experts": experts, "experts_per_token": 2},
    }


def sizes(inputs: Inputs, stored: int) -> dict[str, int]:
    """Parameters of the mixture, and of what a token passes through."""
    settings = inputs.architecture.settings
    ffn = (
        3 * settings["hidden_size"] * settings["intermediate_size"] * inputs.architecture.num_layers
    )
    parameters = stored // ITEM
    unused = inputs.num_experts - inputs.experts_per_token
    return {"parameters": parameters, "active": parameters - unused * ffn}


def row_of(
    folder: Path, name: str, experts: int, samples: int = SAMPLES, tokens: int = TOKENS
) -> dict[str, Any]:
    """What the preflight says of one mixture with a router on some seed data; in bytes."""
    document = recipe_of(folder, name, experts) | {"router": {"data": "seed.jsonl"}}
    ids = [WORD] * tokens
    seeds = SeedSet([TokenizedSample(ids, 1, f"{i}") for i in range(samples)], tokens)
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        shards = inputs.shards(5_000_000_000)
        cpu = needs(inputs, (torch.device("cpu"),), seeds, shards)
        gpu = needs(inputs, (torch.device("cuda", 0),), seeds, shards)
        stored = sum(shard.num_bytes for shard in shards)
        row = {"model": name, "experts": experts} | sizes(inputs, stored)
    return row | {
        "files": stored,
        "disk": cpu.disk,
        "merge": cpu.merge,
        "router": cpu.router,
        "router_gpu": gpu.device,
        "run": stored + SHAPES[name].cache_bytes,
        "train": FULL_TRAINING * row["parameters"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | experts | parameters (active), 10⁹ | files, GB | disk, GB | RAM, merge, GiB | "
        "RAM, router on the CPU, GiB | GPU, router, GiB | GPU, run, GiB | GPU, train, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        memory = (row[k] / 2**30 for k in ("merge", "router", "router_gpu", "run", "train"))
        cells = " | ".join(f"{value:,.1f}" if value < 20 else f"{value:,.0f}" for value in memory)
        print(
            f"| {row['model']} | {row['experts']} | {row['parameters'] / 1e9:.1f} "
            f"({row['active'] / 1e9:.1f}) | {row['files'] / 1e9:.1f} | {row['disk'] / 1e9:.1f} | {cells} |",
            flush=True,
        )


def measured(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe for real; wall time and peak memory of the whole process, and its report."""
    out = folder / "out"
    recipe = folder / "recipe.yml"
    recipe.write_text(json.dumps(document), encoding="utf-8")
    started = time.perf_counter()
    command = [sys.executable, "-m", "upit_merge", "run", str(recipe), str(out), "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    report = json.loads((out / "upit_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    scale = 1 if sys.platform == "darwin" else 1024
    peak = usage.ru_maxrss * scale
    return {"seconds": seconds, "peak": peak, "written": written, "report": report}


def measure_merges(folder: Path, jobs: list[str]) -> None:
    print("\n| model | experts | written, GB | wall, s | s per GB | peak, MiB | foretold, MiB |")
    print("|---|---|---|---|---|---|---|")
    for job in jobs:
        name, experts = job.split()
        foretold = row_of(folder, name, int(experts))["merge"]
        found = measured(folder, recipe_of(folder, name, int(experts)))
        print(
            f"| {name} | {experts} | {found['written'] / 1e9:.1f} | {found['seconds']:.0f} | "
            f"{found['seconds'] / (found['written'] / 1e9):.1f} | {found['peak'] / 2**20:,.0f} "
            f"| {foretold / 2**20:,.0f} |",
            flush=True,
        )


def measure_routers(folder: Path, jobs: list[str]) -> None:
    print(
        "\n| model | experts | samples of tokens | losses and gates, s | 10⁹ operations a second | "
        "peak, MiB | foretold, MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for job in jobs:
        name, *numbers = job.split()
        experts, samples, tokens = map(int, numbers)
        rows = [json.dumps({"text": "w " * tokens}) + "\n"] * samples
        (folder / "seed.jsonl").write_text("".join(rows), encoding="utf-8")
        router = {"data": str(folder / "seed.jsonl")}
        foretold = row_of(folder, name, experts, samples, tokens)["router"]
        found = measured(folder, recipe_of(folder, name, experts) | {"router": router})
        spent = found["report"]["router"]["seconds"]
        seconds = spent["losses"] + spent["gates"]
        parameters = sum(torch.Size(shape).numel() for _name, shape in SHAPES[name].tensors())
        operations = 2 * parameters * samples * tokens * (experts + 1)
        print(
            f"| {name} | {experts} | {samples} of {tokens} | {seconds:.0f} | "
            f"{operations / seconds / 1e9:.0f} | {found['peak'] / 2**20:,.0f} | "
            f"{foretold / 2**20:,.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="must not exist; is deleted")
    parser.add_argument("--measure", nargs="*", default=[], metavar="'MODEL EXPERTS'")
    parser.add_argument("--route", nargs="*", default=[], metavar="'MODEL EXPERTS SAMPLES TOKENS'")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    try:
        for name in SHAPES:
            write_family(folder, name)
        show([row_of(folder, name, experts) for name in SHAPES for experts in EXPERTS])
        if arguments.measure:
            measure_merges(folder, arguments.measure)
        if arguments.route:
            measure_routers(folder, arguments.route)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
