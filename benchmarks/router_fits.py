"""One way to make the gates, in a process of its own; started by benchmarks/router.py.

python -m benchmarks.router_fits MODEL_FOLDER VARIANT

MODEL_FOLDER is one of benchmarks/router_models.py. Leaves `fits/VARIANT.safetensors` there, and
prints seconds and peak memory as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.gates import training_free_gates
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.output.patch import PatchedCopies
from upit_merge.router.assignment import assigned
from upit_merge.router.buckets import Buckets
from upit_merge.router.expert_tuning import load_expert, padded_batch
from upit_merge.router.pretrain import load_seed_set, pretrain_router
from upit_merge.router.progress import Progress
from upit_merge.router.stage import RouterStage

CPU = torch.device("cpu")

# Settings of the recipe's `router:` block, by what the table calls them.
SETTINGS: dict[str, dict[str, Any]] = {
    "one_vs_rest (default)": {},
    "softmax": {"objective": "softmax"},
    "ridge": {"objective": "ridge"},
    "hidden": {"objective": "hidden"},
    "upit": {"objective": "upit"},
    "upit, train_experts": {"objective": "upit", "upit": {"train_experts": True}},
    "default, refined": {"refine": {"steps": 60, "tokens": 4096}},
    "default, shuffled buckets (control)": {"assign": "shuffled"},
    "default, assign: balanced": {"assign": "balanced"},
    "default, assign: column": {"assign": "column"},
    "default, stream: expert": {"stream": "expert"},
}


def settings_of(folder: Path, variant: str) -> RouterSettings:
    changes = dict(SETTINGS.get(variant, {}))
    if changes.get("assign") == "column":
        # Whoever knows the domains would give each to the two checkpoints trained on it last.
        changes["assign"] = {
            "column": "domain",
            "experts": {"code": 3, "docs": 4, "arithmetic": 5},
        }
    # Objectives are compared on the same losses, which `losses` computes once.
    return RouterSettings(data=str(folder / "seed.jsonl"), losses="exact", **changes)


def samples_of(
    model: LayerwiseMixture, folder: Path, settings: RouterSettings, column: str | None = None
) -> SeedSet:
    """The samples that some settings name, in tokens of the folder's tokenizer."""
    return load_seed_set(
        settings,
        load_tokenizer(folder / "moe"),
        context=model.context,
        vocab_size=model.vocab_size,
        seed=0,
        column=column,
    )


def stage_of(model: LayerwiseMixture, folder: Path, settings: RouterSettings, scratch: Path) -> Any:
    """The stage; losses of the experts that `losses` has computed are found again."""
    seeds = samples_of(model, folder, settings)
    kept = folder / "fits" / "losses"
    if kept.exists():  # a copy, so that no fit finds another one's gates
        shutil.copytree(kept, scratch / "losses")
        kept = scratch / "losses"
    progress = Progress(kept, {})
    return RouterStage(model, seeds, settings, 0, scratch, progress=progress, quiet=True)


def by_settings(folder: Path, variant: str, scratch: Path) -> tuple[list[Tensor], dict[str, float]]:
    settings = settings_of(folder, variant)
    with opened_mixture(folder / "moe") as moe:
        stage = stage_of(LayerwiseMixture(moe, CPU), folder, settings, scratch)
        copies = PatchedCopies(moe, folder / "fits" / "trained")
        if settings.trains_experts:
            shutil.rmtree(copies.folder, ignore_errors=True)
            shutil.copytree(folder / "moe", copies.folder)
        result = pretrain_router(stage, copies)
    return result.gates, stage.clock.seconds


def losses(folder: Path, _variant: str, scratch: Path) -> tuple[list[Tensor], dict[str, float]]:
    """Every sample's loss under every expert, which the buckets of all objectives need."""
    with opened_mixture(folder / "moe") as moe:
        stage = stage_of(LayerwiseMixture(moe, CPU), folder, settings_of(folder, ""), scratch)
        stage.losses()
    return [], stage.clock.seconds


def sweep(folder: Path, _variant: str, scratch: Path) -> tuple[list[Tensor], dict[str, float]]:
    """One forward sweep of all samples through the mean of the experts, with nothing fitted."""
    with opened_mixture(folder / "moe") as moe:
        stage = stage_of(LayerwiseMixture(moe, CPU), folder, settings_of(folder, ""), scratch)
        buckets = assigned(stage)
        stage.gates(buckets, lambda data: torch.zeros(data.num_experts, data.width))
    return [], {"sweep": stage.clock.seconds["gates"] - stage.clock.seconds["fitting"]}


def random(folder: Path, variant: str, _scratch: Path) -> tuple[list[Tensor], dict[str, float]]:
    started = time.perf_counter()
    with opened_mixture(folder / "moe") as moe:
        model = LayerwiseMixture(moe, CPU)
        layers, seed = model.mixture_layers, int(variant[-1])
        gates = training_free_gates(moe, model.format, layers, model.num_experts, seed)
    return gates, {"gates": time.perf_counter() - started}


def mergekit(folder: Path, variant: str, scratch: Path) -> tuple[list[Tensor], dict[str, float]]:
    """mergekit-moe's own code for a `gate_mode`, with each bucket's samples as prompts."""
    with opened_mixture(folder / "moe") as moe:
        stage = stage_of(LayerwiseMixture(moe, CPU), folder, settings_of(folder, ""), scratch)
        buckets = assigned(stage)
    mode = variant.rpartition(" ")[2]
    prepared = mergekit_prompts(folder, folder / "moe", stage.seeds, buckets)
    started = time.perf_counter()
    gates = prepared(mode)
    return list(gates.float()), {"gates": time.perf_counter() - started}


def mergekit_prompts(
    folder: Path, moe: Path, seeds: SeedSet, buckets: Buckets
) -> Callable[[str], Tensor]:
    """Prepare mergekit-moe's own code: given a `gate_mode`, it returns (layers, experts, hidden).

    Args:
        folder: Has the checkpoints in `sft/`; the last of them is the model that reads the prompts.
        moe: Has the tokenizer.
        buckets: Each bucket's samples are the prompts of an expert.
    """
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    from mergekit.moe.router import get_gate_params

    last = sorted((folder / "sft").iterdir(), key=lambda path: int(path.name.split("-")[1]))[-1]
    reference = ModelReference.model_validate(str(last))
    tokenizer = load_tokenizer(moe)
    # As mergekit-moe sets its own.
    tokenizer.padding_side, tokenizer.pad_token_id = "left", tokenizer.bos_token_id
    texts = [
        tokenizer.decode(sample.input_ids, skip_special_tokens=True) for sample in seeds.samples
    ]
    experts = [
        Expert(
            source_model=reference,
            positive_prompts=[texts[i] for i in (buckets.assigned == e).nonzero().flatten()],
        )
        for e in range(buckets.num_experts)
    ]
    return lambda mode: get_gate_params(reference, tokenizer, experts, mode=mode, device="cpu")


def in_the_loop(
    folder: Path, _variant: str, scratch: Path
) -> tuple[list[Tensor], dict[str, float]]:
    """The paper's objective with frozen experts, but with the dense model run in every epoch."""
    settings = settings_of(folder, "upit")
    upit = settings.upit_settings
    vectors = []
    seconds = 0.0
    with opened_mixture(folder / "moe") as moe:
        stage = stage_of(LayerwiseMixture(moe, CPU), folder, settings, scratch)
        buckets = assigned(stage)
        for expert in range(buckets.num_experts):
            mine = (buckets.assigned == expert).nonzero().flatten()
            started = time.perf_counter()
            model = load_expert(moe, expert, upit, CPU)
            for parameter in model.dense.parameters():
                parameter.requires_grad_(False)
            stop = getattr(model.dense, "activation_checkpointing_disable", None)
            (stop or model.dense.gradient_checkpointing_disable)()
            optimizer = torch.optim.AdamW([model.vectors], lr=upit.learning_rate, weight_decay=0.0)
            generator = torch.Generator().manual_seed(expert)
            for _ in range(upit.epochs):
                order = mine[torch.randperm(len(mine), generator=generator)]
                for batch in order.split(upit.batch_size):
                    samples = [stage.seeds.samples[index] for index in batch.tolist()]
                    optimizer.zero_grad()
                    model(**padded_batch(samples))["loss"].backward()
                    optimizer.step()
            seconds += time.perf_counter() - started
            vectors.append(model.vectors.detach())
    gates = torch.stack(vectors, dim=1)  # (layers, experts, hidden)
    # The scale that the tool's own fits have, so that the comparison is one of directions.
    spread = gates.norm(dim=2).mean(1, keepdim=True).unsqueeze(2)
    return list(gates / spread), {"gates": seconds}


Fit = Callable[[Path, str, Path], tuple[list[Tensor], dict[str, float]]]

FITS: dict[str, Fit] = {
    "losses": losses,
    "sweep": sweep,
    "random 0": random,
    "random 1": random,
    "random 2": random,
    "mergekit-moe, gate_mode: hidden": mergekit,
    "upit, model in the loop": in_the_loop,
    **dict.fromkeys(SETTINGS, by_settings),
}


def main() -> None:
    folder, variant = Path(sys.argv[1]), sys.argv[2]
    (folder / "fits").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        gates, seconds = FITS[variant](folder, variant, Path(scratch))
    if gates:
        path = folder / "fits" / f"{variant}.safetensors"
        save_file({str(layer): gate.contiguous() for layer, gate in enumerate(gates)}, path)
    print(json.dumps({"seconds": seconds, "peak": peak_memory()}))


def peak_memory() -> float:
    """Of this process, MiB; getrusage's would begin with the memory of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
