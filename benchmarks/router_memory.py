"""Peak memory of router pre-training, measured and foretold; Linux only.

python benchmarks/router_memory.py --folder F [--json FILE] [SHAPE ...]

Writes a Mixtral of random weights for each shape, runs the stage on it in a process of its own, and
compares the peak with upit_merge/router/memory.py. Memory does not grow with the number of layers,
so `8x7B` has layers of exactly Mixtral-8x7B's size, but two of them instead of 32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet, TokenizedSample
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.formats import FORMATS, PROJECTIONS
from upit_merge.models.mixture import opened_mixture
from upit_merge.output.patch import InPlace
from upit_merge.router.memory import ModelShape, router_memory
from upit_merge.router.pretrain import pretrain_router
from upit_merge.router.stage import RouterStage

mixtral = FORMATS["mixtral"]

# hidden, intermediate, heads, key-value heads, vocabulary, layers, experts
SHAPES = {
    "tiny": (64, 128, 4, 2, 512, 2, 2),
    "small": (512, 2048, 8, 4, 16_000, 3, 8),
    "wide": (1024, 4096, 16, 4, 32_000, 3, 8),
    "2B": (2048, 8192, 32, 8, 32_000, 2, 8),
    "8x7B": (4096, 14336, 32, 8, 32_000, 2, 8),
}
# How the stage is run, with few tokens where a layer is large: they only cost time.
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {  # samples, tokens each, settings
    "tiny": (4, 16, {}),
    "small": (64, 256, {"memory_gb": 0.02}),
    "small, short": (8, 256, {"memory_gb": 0.001}),
    "small, refine": (8, 256, {"refine": {"steps": 1, "tokens": 1024}, "memory_gb": 0.001}),
    "wide": (8, 256, {"memory_gb": 0.02}),
    "2B": (4, 128, {}),
    "8x7B": (4, 64, {}),
    "8x7B, refine": (4, 64, {"refine": {"steps": 1, "tokens": 256}}),
}


def write_mixtral(folder: Path, name: str) -> None:
    """A Mixtral in bfloat16 with small random weights, a file per layer."""
    hidden, inner, heads, keys, vocab, layers, experts = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        return
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    head = hidden // heads
    names: dict[str, str] = {}

    def save(filename: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / filename, {"format": "pt"})
        names.update(dict.fromkeys(tensors, filename))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}self_attn.q_proj.weight": random(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": random(keys * head, hidden),
            f"{prefix}self_attn.v_proj.weight": random(keys * head, hidden),
            f"{prefix}self_attn.o_proj.weight": random(hidden, hidden),
            mixtral.gate_tensor(layer): random(experts, hidden),
        }
        for expert in range(experts):
            for projection in PROJECTIONS:
                shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
                tensors[mixtral.expert_tensor(layer, expert, projection)] = random(*shape)
        save(f"layer-{layer}.safetensors", tensors)
    save(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": random(vocab, hidden),
            "lm_head.weight": random(vocab, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        },
    )
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))


def run_stage(folder: Path, name: str) -> None:
    """The whole stage on random tokens."""
    samples, length, settings = RUNS[name]
    with opened_mixture(folder) as moe, tempfile.TemporaryDirectory(dir=folder) as scratch:
        model = LayerwiseMixture(moe, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.vocab_size, (samples, length), generator=generator).tolist()
        seeds = SeedSet([TokenizedSample(row, 1, f"{i}") for i, row in enumerate(ids)], length)
        chosen = RouterSettings(data="-", **settings)
        stage = RouterStage(model, seeds, chosen, 0, Path(scratch), quiet=True)
        pretrain_router(stage, InPlace(moe))


def foretold(name: str) -> int:
    """Bytes, without what Python and its libraries take."""
    hidden, inner, heads, keys, vocab, layers, experts = SHAPES[name.split(",")[0]]
    attention = 2 * hidden * hidden + 2 * hidden * (keys * hidden // heads) + 2 * hidden
    shape = ModelShape(hidden, inner, vocab, layers, experts, attention, itemsize=2)
    samples, length, settings = RUNS[name]
    memory = router_memory(
        shape, [length] * samples, RouterSettings(data="-", **settings), cpu=True
    )
    return memory.compute + memory.states


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(folder: Path, name: str) -> dict[str, float]:
    """Run in this process; peak over what there was before, and the time."""
    write_mixtral(folder / "tiny", "tiny")
    run_stage(folder / "tiny", "tiny")  # imports everything
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    started = time.perf_counter()
    run_stage(folder / name.split(",")[0], name)
    seconds = time.perf_counter() - started
    return {"peak": status("VmHWM") - before, "before": before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the models; up to 7 GB")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="*", default=[name for name in RUNS if name != "tiny"])
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.folder, arguments.measure)))
        return
    rows = []
    print("| shape | foretold, MiB | measured, MiB | measured / foretold | seconds |")
    print("|---|---|---|---|---|")
    for name in arguments.runs:
        write_mixtral(arguments.folder / name.split(",")[0], name.split(",")[0])
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--measure", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
        row |= {"shape": name, "foretold": foretold(name)}
        rows.append(row)
        print(
            f"| {name} | {row['foretold'] / 2**20:,.0f} | {row['peak'] / 2**20:,.0f} | "
            f"{row['peak'] / row['foretold']:.2f} | {row['seconds']:.0f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
