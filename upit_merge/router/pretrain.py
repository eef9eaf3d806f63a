"""Router pre-training (paper, section 3.3): seed data in, one gate per layer out."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit_merge.blocks import progress_bar, single_threaded
from upit_merge.checkpoints import Checkpoint
from upit_merge.errors import UpitError
from upit_merge.recipe import RouterSettings
from upit_merge.router.buckets import ASSIGNMENTS
from upit_merge.router.gate_files import gates_digest
from upit_merge.router.layerwise import MEAN, LayerwiseMoe, PackedStates, Stream
from upit_merge.router.objectives import normalise, one_vs_rest, random_gate, ridge
from upit_merge.router.seed_data import read_seed_data, sample_examples
from upit_merge.router.seed_tokens import SeedSet, tokenize_seed_data

LOG = logging.getLogger(__name__)

_FITS = {"one_vs_rest": one_vs_rest, "ridge": ridge}


@dataclass(frozen=True)
class Buckets:
    """Which expert each seed sample belongs to.

    Attributes:
        losses: Mean negative log-likelihood per sample and expert, nats, (samples, experts).
        assigned: The expert of every sample, int64, (samples,).
    """

    losses: Tensor
    assigned: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """Per expert: its bucket's size, its loss there, and its loss on all samples."""
        rows = []
        for expert in range(self.losses.shape[1]):
            mine = self.assigned == expert
            own = float(self.losses[mine, expert].mean()) if mine.any() else None
            rows.append(
                {
                    "expert": expert,
                    "samples": int(mine.sum()),
                    "loss_own": own,
                    "loss_all": float(self.losses[:, expert].mean()),
                }
            )
        return rows

    def to_report(self) -> dict[str, Any]:
        best = self.losses.min(dim=1).values.mean()
        given = self.losses.gather(1, self.assigned.unsqueeze(1)).mean()
        single = self.losses.mean(dim=0).min()
        return {
            "experts": self.rows(),
            "loss_of_best_single_expert": float(single),
            "loss_of_best_expert_per_sample": float(best),
            "loss_of_assigned_expert": float(given),
        }


@dataclass(frozen=True)
class RouterResult:
    """The gates, float32, (num_experts, hidden_size) per layer, and what to say about them."""

    gates: list[Tensor]
    report: dict[str, Any]


def load_seed_set(
    settings: RouterSettings, tokenizer: Any, *, context: int, vocab_size: int, seed: int
) -> SeedSet:
    """Read, sample and tokenize the seed data.

    Args:
        context: The model's longest input, in tokens.
        vocab_size: Rows of the model's embedding table.
        seed: Of the sampling.

    Raises:
        UpitError: the data cannot be read, is empty or malformed, or does not fit the model.
    """
    examples = read_seed_data(settings.data, split=settings.split, config=settings.subset)
    return tokenize_seed_data(
        sample_examples(examples, settings.sample, seed),
        tokenizer,
        max_length=settings.max_length,
        context=context,
        vocab_size=vocab_size,
    )


def training_free_gates(
    backbone: Checkpoint, num_layers: int, num_experts: int, seed: int
) -> list[Tensor]:
    """A random gate per layer, for an MoE without seed data.

    Args:
        backbone: Has the norms before the gates, whose size sets the gates' scale.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = (f"model.layers.{layer}.post_attention_layernorm.weight" for layer in range(num_layers))
    return [random_gate(num_experts, backbone.tensor(name), generator) for name in norms]


def pretrain_router(
    model: LayerwiseMoe,
    seeds: SeedSet,
    settings: RouterSettings,
    *,
    seed: int,
    scratch: Path,
    quiet: bool,
) -> RouterResult:
    """Fit the gates of a Mixtral folder to seed data, layer by layer.

    First every sample's loss under every expert (as a dense model) sorts the samples into
    buckets. Then each sample runs through its own expert once more, and at every layer the gate
    is fitted to tell the buckets apart by what the gate sees there.

    Args:
        model: The Mixtral folder; nothing is written to it.
        seeds: From `load_seed_set`.
        seed: Of the random objective.
        scratch: A folder for hidden states that exceed the memory budget.

    Raises:
        UpitError: losses or gates are NaN or infinite, or hidden states do not fit the disk.
    """
    report: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "data": seeds.to_report(),
    }
    timings: dict[str, float] = {}
    if settings.objective == "random" or model.num_experts == 1:
        gates = training_free_gates(model.moe, model.num_layers, model.num_experts, seed)
        report["gates_sha256"] = gates_digest(gates, model.stored_dtype)
        return RouterResult(gates, report | {"seconds": timings})
    started = time.perf_counter()
    buckets = sort_into_buckets(model, seeds, settings, scratch, quiet=quiet)
    timings["buckets"] = time.perf_counter() - started
    started = time.perf_counter()
    gates = fit_gates(model, seeds, buckets, settings, scratch, quiet=quiet)
    timings["gates"] = time.perf_counter() - started
    report["gates_sha256"] = gates_digest(gates, model.stored_dtype)
    return RouterResult(gates, report | {"buckets": buckets.to_report(), "seconds": timings})


def _states(
    model: LayerwiseMoe, seeds: SeedSet, settings: RouterSettings, scratch: Path
) -> PackedStates:
    return PackedStates(
        [len(sample.input_ids) for sample in seeds.samples],
        model.hidden_size,
        model.dtype,
        scratch=scratch,
        budget_bytes=float(settings.memory_gb) * 2**30 / 2,  # there may be two of these
    )


def sort_into_buckets(
    model: LayerwiseMoe, seeds: SeedSet, settings: RouterSettings, scratch: Path, *, quiet: bool
) -> Buckets:
    """Compute every sample's loss under every expert and assign the samples."""
    everything = tuple(range(len(seeds.samples)))
    tokens = sum(len(sample.input_ids) for sample in seeds.samples)
    losses = torch.empty(len(everything), model.num_experts, dtype=torch.float64)
    total = tokens * model.num_experts * model.num_layers
    # One expert at a time: hidden states of one stream, at the price of reading the attention
    # weights once per expert, a fifth more than reading everything once.
    with (
        contextlib.closing(_states(model, seeds, settings, scratch)) as states,
        progress_bar(total, "losses of the experts", quiet=quiet, unit="tok") as bar,
    ):
        for expert in range(model.num_experts):
            model.sweep(
                seeds.samples,
                [Stream(expert, everything)],
                states,
                batch_tokens=settings.batch_tokens,
                on_progress=bar.update,
            )
            losses[:, expert] = model.losses(seeds.samples, states)
            if not losses[:, expert].isfinite().all():
                raise UpitError(
                    f"Expert {expert} gives NaN or infinite losses on the seed data; its "
                    "checkpoint is broken, or its values overflow: use dtype: bfloat16."
                )
    buckets = Buckets(losses, ASSIGNMENTS[settings.assign](losses))
    if empty := [str(row["expert"]) for row in buckets.rows() if row["samples"] == 0]:
        LOG.warning(
            "No seed sample belongs to expert(s) %s, whose gates stay untrained; give more "
            "samples, or use assign: balanced.",
            ", ".join(empty),
        )
    return buckets


def fit_gates(
    model: LayerwiseMoe,
    seeds: SeedSet,
    buckets: Buckets,
    settings: RouterSettings,
    scratch: Path,
    *,
    quiet: bool,
) -> list[Tensor]:
    """Run the samples through their experts and fit every layer's gate on the way."""
    if settings.stream == "mean":
        streams = [Stream(MEAN, tuple(range(len(seeds.samples))))]
    else:
        streams = [
            Stream(e, tuple((buckets.assigned == e).nonzero().flatten().tolist()))
            for e in range(model.num_experts)
        ]
    labels = torch.cat(
        [
            torch.full((len(sample.input_ids),), int(expert))
            for sample, expert in zip(seeds.samples, buckets.assigned, strict=True)
        ]
    )
    gates: list[Tensor] = []
    fit = _FITS[settings.objective]

    def fit_layer(layer: int) -> None:
        # Fitting is little work beside the forward pass, and must not depend on the machine's cores.
        with single_threaded():
            gate = fit(inputs.rows, labels, model.num_experts, device=model.device)
            gate = normalise(gate, inputs.rows, float(settings.temperature))
        if not gate.to(model.stored_dtype).isfinite().all():
            raise UpitError(
                f"The gate of layer {layer} is NaN or infinite; use a temperature nearer to 1, or "
                "dtype: bfloat16."
            )
        gates.append(gate)

    total = len(labels) * model.num_layers
    with (
        contextlib.closing(_states(model, seeds, settings, scratch)) as states,
        contextlib.closing(_states(model, seeds, settings, scratch)) as inputs,
        progress_bar(total, "fitting the gates", quiet=quiet, unit="tok") as bar,
    ):
        model.sweep(
            seeds.samples,
            streams,
            states,
            batch_tokens=settings.batch_tokens,
            router_inputs=inputs,
            after_layer=fit_layer,
            on_progress=bar.update,
        )
    return gates
