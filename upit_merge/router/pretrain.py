"""Router pre-training (paper, section 3.3): seed data in, one gate per layer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.data.examples import read_seed_data, sample_examples
from upit_merge.data.prompts import prompt_examples
from upit_merge.data.tokens import SeedSet, tokenize_seed_data
from upit_merge.engine.arithmetic import Arithmetic
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.io.sources import TensorSource
from upit_merge.models.gates import (
    distinct_gates,
    gates_digest,
    root_mean_square,
    tensors_digest,
    training_free_gates,
)
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.router.assignment import assigned, nobodys
from upit_merge.router.buckets import Buckets
from upit_merge.router.expert_tuning import tune_expert
from upit_merge.router.held_out import OWN
from upit_merge.router.leads import warn_of_biases
from upit_merge.router.refine import GateTrainer, RefineState, refine_gates
from upit_merge.router.sharpness import fit_and_choose
from upit_merge.router.stage import RouterStage


class ExpertSink(Protocol):
    """Where FFNs go that were trained."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an expert's FFN by canonical names; may be called again with the same."""

    @property
    def source(self) -> TensorSource:
        """The model with them in it."""


@dataclass(frozen=True)
class RouterResult:
    """The gates, float32, (num_experts, hidden_size) per layer, and what to say about them."""

    gates: list[Tensor]
    report: dict[str, Any]


def load_seed_set(
    settings: RouterSettings,
    tokenizer: Any,
    *,
    context: int,
    vocab_size: int,
    seed: int,
    column: str | None = None,
) -> SeedSet:
    """Read, sample and tokenize the seed data.

    Args:
        context: The model's longest input, in tokens.
        vocab_size: Rows of the model's embedding table.
        seed: Of the sampling.
        column: Becomes the samples' label; by default the one that `assign` names.

    Raises:
        UpitError: the data cannot be read, is empty or malformed, or does not fit the model.
    """
    if settings.prompts is not None:
        chosen = prompt_examples(settings.prompts, settings.prompts_source)
    else:
        assert settings.data is not None
        examples = read_seed_data(
            settings.data,
            split=settings.split,
            config=settings.subset,
            column=column or settings.column,
        )
        chosen = sample_examples(examples, settings.sample, seed)
    return tokenize_seed_data(
        chosen,
        tokenizer,
        # A gate learns from a single word, which predicts nothing.
        shortest=1 if settings.prompts is not None and settings.refine is None else 2,
        max_length=settings.max_length,
        context=context,
        vocab_size=vocab_size,
        prompts=None if settings.prompts is None else str(settings.prompts_source),
    )


def seed_set_for(
    model: LayerwiseMixture,
    folder: Path,
    settings: RouterSettings,
    seed: int,
    *,
    trust_remote_code: bool = False,
    column: str | None = None,
) -> SeedSet:
    """The seed data as a mixture takes it, with the tokenizer in a folder; see `load_seed_set`."""
    return load_seed_set(
        settings,
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        context=model.context,
        vocab_size=model.vocab_size,
        seed=seed,
        column=column,
    )


def computed_mixture(
    moe: TensorSource, device: torch.device, settings: RouterSettings, *, quick: bool = False
) -> LayerwiseMixture:
    """Open a mixture that is computed as the settings say.

    Args:
        moe: See `LayerwiseMixture`.
        quick: On the CPU, `compute: auto` means products in bfloat16, see `Arithmetic`.
    """
    model = LayerwiseMixture(moe, device)
    arithmetic = Arithmetic.of(settings.compute, device, model.stored_dtype, quick=quick)
    return model if arithmetic == model.arithmetic else LayerwiseMixture(moe, device, arithmetic)


def tuned_gates(
    stage: RouterStage, buckets: Buckets, sink: ExpertSink
) -> tuple[list[Tensor], list[str]]:
    """Train every expert with its routing vectors, the paper's stage 3.

    Processes train different experts. Returns the gates, and a digest of every expert.

    Args:
        sink: Takes every expert's new FFN, in the stored dtype.
    """
    model, experts = stage.model, range(stage.model.num_experts)
    found: dict[int, tuple[Tensor, str]] = {}
    mine = experts[stage.processes.rank :: stage.processes.size]
    passes = stage.settings.upit_settings.epochs
    work = {expert: passes * buckets.sizes[expert] for expert in mine}
    with (
        stage.clock.measure("experts"),
        stage.bar(sum(work.values()), "training the experts") as bar,
    ):
        for expert in mine:
            name = f"tuned-{expert}"
            kept = stage.progress.kept(name)
            if kept is None:
                bucket = (buckets.assigned == expert).nonzero().flatten().tolist()
                tuned = tune_expert(
                    model.moe,
                    expert,
                    [stage.seeds.samples[index] for index in bucket],
                    stage.settings.upit_settings,
                    seed=stage.seed + expert,
                    device=model.device,
                    scratch=stage.scratch,
                    quiet=True,
                    on_progress=bar.advance,
                )
                digest = tensors_digest(tuned.ffn[key] for key in sorted(tuned.ffn))
                kept = {"vectors": tuned.vectors, **tuned.ffn}, {"sha256": digest}
                stage.progress.keep(name, kept[0], own=True, **kept[1])
                del tuned
            else:
                bar.skip(work[expert])
            ffn, facts = kept
            vectors = ffn.pop("vectors")
            if ffn:  # kept first: a kill may leave half of an FFN where the sink puts it
                sink.write(ffn)
                stage.progress.keep(name, {"vectors": vectors}, own=True, **facts)
            found[expert] = vectors, facts["sha256"]
            del ffn, kept  # the next expert needs the memory
    for others in stage.processes.gather(found):
        found |= others
    gates = []
    for index, layer in enumerate(model.mixture_layers):
        gate = torch.stack([found[expert][0][index] for expert in experts])
        scale = gate.norm(dim=1).mean().clamp(min=1e-12)
        scale = scale * root_mean_square(model.format.norm_factors(model.moe, layer))
        gates.append(stage.checked(layer, gate / scale / stage.settings.scale))
    return gates, [found[expert][1] for expert in experts]


def refined_gates(
    stage: RouterStage, gates: Sequence[Tensor], model: LayerwiseMixture | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Train the gates end to end; returns them with what to say about it.

    Args:
        model: Instead of the stage's: with experts that were trained, or computed more exactly.

    Raises:
        UpitError: the training diverged.
    """
    refine = stage.settings.refine
    assert refine is not None
    trainer = GateTrainer(
        model or stage.model, stage.seeds.samples, stage.settings, stage.scratch, stage.processes
    )
    kept = stage.progress.kept("refined")
    done = RefineState(**kept[0]) if kept else None
    steps = refine.steps
    with (
        stage.clock.measure("refine"),
        stage.bar(steps, "refining", units=steps, unit="step") as bar,
    ):
        bar.skip(len(done.history) if done else 0)

        def after_step(state: RefineState) -> None:
            if stage.progress.is_due:
                stage.progress.keep("refined", state.to_tensors())
            bar.set_postfix_str(f"loss {float(state.history[-1, 0]):.3f}", refresh=False)
            bar.advance(1)

        state = refine_gates(
            trainer,
            gates,
            seed=stage.seed,
            keep_bytes=float(stage.settings.memory_gb) * 2**30,
            done=done,
            after_step=after_step,
        )
    if not state.entries.isfinite().all():
        raise UpitError("Refining the gates ended in NaN; give a lower router.refine.lr.")
    names = ("loss", "balance")
    told = {
        step: dict(zip(names, state.history[index].tolist(), strict=True))
        for step, index in (("first_step", 0), ("last_step", -1))
    }
    return state.gates, told


def pretrain_router(
    stage: RouterStage,
    sink: ExpertSink | None = None,
    *,
    free_choice: bool = False,
    fixed: str = OWN,
) -> RouterResult:
    """Do the whole stage as the settings say.

    Args:
        free_choice: The number of experts per token was left open; the report says which it is.
        fixed: Why it was not, see `held_out.why_nothing_is_chosen`.
        sink: Takes FFNs that were trained, see `tuned_gates`; needed only if some are.

    Raises:
        UpitError: losses or gates are NaN or infinite, or hidden states do not fit the disk.
    """
    model, settings = stage.model, stage.settings
    report: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "compute": model.arithmetic.name,
        "seed": stage.seed,
        "data": stage.seeds.to_report(),
    }
    alone = model.num_experts == 1 and not settings.trains_experts
    if settings.objective == "random" or alone:
        gates = training_free_gates(
            model.moe, model.format, model.mixture_layers, model.num_experts, stage.seed
        )
    elif not settings.needs_buckets:
        gates = distinct_gates(stage.gates(nobodys(stage)), model.stored_dtype, stage.seed)
    else:
        buckets = assigned(stage)
        report["buckets"] = buckets.to_report()
        if settings.trains_experts:
            assert sink is not None
            gates, report["experts_sha256"] = tuned_gates(stage, buckets, sink)
            gates = distinct_gates(gates, model.stored_dtype, stage.seed)
        else:
            gates, chosen = fit_and_choose(stage, buckets, free=free_choice, fixed=fixed)
            report["chosen"] = chosen.to_report()
    if settings.refine is not None and model.num_experts > 1:
        source = model.moe
        if settings.trains_experts:
            assert sink is not None
            source = sink.source
        exact = computed_mixture(source, model.device, settings)
        gates, report["refined"] = refined_gates(stage, gates, exact)
        gates = distinct_gates(gates, model.stored_dtype, stage.seed)
    elif settings.objective != "random" and stage.processes.is_first:
        warn_of_biases(model)
    report["gates_sha256"] = gates_digest(gates, model.stored_dtype)
    return RouterResult(gates, report | {"seconds": stage.clock.seconds})
