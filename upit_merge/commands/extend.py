"""`upit-merge extend`: one more expert for a mixture that is there (Nexus, arXiv 2408.15901)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from upit_merge.commands.finished import is_repeated, result_digest
from upit_merge.commands.options import ResizeOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.router import router_identity
from upit_merge.commands.session import router_session
from upit_merge.config.router import OF_DATA, RouterSettings, check_data_is_named
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError, argument
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.io.language_part import language_settings
from upit_merge.io.sources import DenseModel
from upit_merge.models.dense import as_llama, dense_settings, same_setting
from upit_merge.models.gates import distinct_gates, gates_digest, named_gates, tensors_digest
from upit_merge.models.lora.adapter import open_model
from upit_merge.models.mixture import check_expert
from upit_merge.models.tables import open_checkpoint
from upit_merge.models.views import split_ffn
from upit_merge.output.identity import file_states
from upit_merge.output.staging import REPORT, check_output_exists, scratch_folder
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report
from upit_merge.report.next_steps import code_words, held_out_beside, tell_next
from upit_merge.report.sources import describe_sources, is_same_model
from upit_merge.report.tables import show_buckets
from upit_merge.report.write import write_report_and_card
from upit_merge.resizing.rewriting import extended_layout, resized, rewritten_layout, write_model
from upit_merge.resizing.sources import ExtendedMixture
from upit_merge.router import objectives
from upit_merge.router.assignment import assigned
from upit_merge.router.leads import to_beat
from upit_merge.router.pretrain import RouterResult, pretrain_router
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.processes import check_single_process

LOG = logging.getLogger(__name__)


def with_recorded_data(values: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Fill in the data, if none is named: what the gates of `out` were trained on.

    Raises:
        UpitError: that is not known.
    """
    if values.get("data") is not None:
        return dict(values)
    check_output_exists(out)
    check_data_is_named(values)
    router = read_report(out).router
    told = router.settings if router else {}
    if told.get("prompts") is not None:
        raise UpitError(
            f"The gates of {out} were fitted to prompts, none of which is the new expert's; give "
            "data with --data."
        )
    if not isinstance(told.get("data"), str):
        raise UpitError(
            f"The data the gates of {out} were trained on is not known (its {REPORT} has none); "
            "give some with --data."
        )
    return {**values, **{key: told.get(key) for key in OF_DATA}}


def extend_output(
    out: Path, reference: str, settings: RouterSettings, options: ResizeOptions, *, all_gates: bool
) -> None:
    """Add the FFN of a dense model as one more expert to the MoE folder `out`.

    The experts that are there, and the backbone, keep their bytes. Of the gates only the new
    expert's routing vector is fitted, to win on the samples it predicts best and lose on all
    others, see `objectives.added_row`.

    Args:
        reference: The dense model: a folder, a Hub id, or an adapter on its base.
        settings: Which data, and how the gates are fitted.
        all_gates: Fit the routing vectors of all experts.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, the model does not fit it, or the data
            does not.
    """
    check_single_process("extend")
    _check_joint(settings, all_gates=all_gates)
    with (
        router_session(out, "extend", options) as session,
        scratch_folder(out) as scratch,
        _opened(reference, options.open) as dense,
    ):
        edit, moe = session.edit, session.moe
        architecture = check_expert(moe, dense)
        halves = split_ffn(dense, architecture.dense_settings())
        extended = ExtendedMixture(moe, architecture, halves)
        before = read_report(out)
        _warn_of_odd_expert(extended, moe, dense, before)
        stage = session.stage(settings, scratch, source=extended, quick=has_fast_bfloat16())
        model = stage.model
        check_router_memory(model, stage.lengths, settings, out)
        added = {"model": file_states(dense.files(), ""), "all gates": all_gates}
        identity = {**router_identity(stage), **added}
        digest = result_digest(identity)
        if edit.was_finished(identity) or is_repeated(out, before, digest):
            return
        stage = session.resumed(stage, identity)
        with edit.interruptible("the model is as it was"):
            names = model.architecture.of_gates()
            gates = [moe.tensor(name).float() for name in model.architecture.gate_names()]
            fitted = pretrain_router(stage) if all_gates else _with_new_row(stage, gates)
            stem = f"model-expert-{extended.expert:05d}"
            if moe.is_published and not model.format.packed:
                layout = extended_layout(moe, extended, names, stem, options.max_shard_bytes)
            else:
                layout = rewritten_layout(moe, extended, names, options.max_shard_bytes)
            named = named_gates(model.architecture.gate_names(), fitted.gates)
            write_model(edit.emptied(), layout, extended, named, quiet=options.quiet)
            changes = _report(before, fitted, extended, dense, model, all_gates=all_gates)
            obsolete = write_report_and_card(edit, before, changes, layout.obsolete, digest=digest)
            edit.put_into_place(identity, obsolete)
    if not options.quiet:
        print(stage.seeds.summary())
        show_buckets(fitted.report, argument(out))
        others = "All gates are fitted anew." if all_gates else "The other gates are as they were."
        print(f"{dense.label} is expert {extended.expert} of {out}. {others}")
        folder, code = argument(out), code_words(options.open)
        held_out = held_out_beside(settings.data)
        tell_next(
            ("measure it", f"upit-merge evaluate {folder} --data {held_out}{code}"),
            ("talk to it", f"upit-merge chat {folder}{code}"),
        )


def _warn_of_odd_expert(
    extended: ExtendedMixture, moe: Checkpoint, dense: DenseModel, before: AnyReport
) -> None:
    """Say what fits, and yet is hardly what was meant."""
    theirs, own = (language_settings(m.config).get("vocab_size") for m in (dense, moe))
    if theirs != own:
        LOG.warning(
            "Checkpoint %s has a vocabulary of %s, %s one of %s: its FFN has learned from other "
            "embeddings than it will be given here.",
            dense.label,
            theirs,
            moe.label,
            own,
        )
    settings = dense_settings(dense)
    for field in ("rope_parameters", "sliding_window"):
        value = extended.architecture.dense_settings()[field]
        if not same_setting(field, settings[field], value):
            LOG.warning(
                "Checkpoint %s has %s %s, %s has %s: its FFN has learned with another attention "
                "than it will follow here.",
                dense.label,
                field,
                settings[field],
                moe.label,
                value,
            )
    if is_same_model(dense, before.document.get("base_model")):
        LOG.warning(
            "Checkpoint %s is the base that %s was made from; its expert will know nothing that "
            "the training has taught the others.",
            dense.label,
            moe.label,
        )
    elif (twin := extended.twin()) is not None:
        LOG.warning(
            "Checkpoint %s has the same FFNs as expert %d of %s; two experts will be identical.",
            dense.label,
            twin,
            moe.label,
        )


@contextlib.contextmanager
def _opened(reference: str, options: OpenOptions) -> Iterator[DenseModel]:
    """Open a dense model, or an adapter with its base."""
    with contextlib.ExitStack() as stack:

        def open_base(label: str, folder: Path) -> Checkpoint:
            return stack.enter_context(contextlib.closing(open_checkpoint(label, folder, options)))

        model = open_model(reference, None, options, open_base)
        yield as_llama(stack.enter_context(contextlib.closing(model)))


def _check_joint(settings: RouterSettings, *, all_gates: bool) -> None:
    """Refuse settings that would change more than the new expert's gates."""
    if settings.trains_experts:
        raise UpitError(
            "upit.train_experts would change the experts that are there; extend first, then use "
            "`upit-merge router`."
        )
    if all_gates:
        return
    if settings.refine is not None:
        raise UpitError("refine changes all gates; add --all-gates.")
    if settings.objective != RouterSettings.model_fields["objective"].default:
        raise UpitError(f"objective: {settings.objective} is for all gates; add --all-gates.")


def _with_new_row(stage: RouterStage, gates: Sequence[Tensor]) -> RouterResult:
    """Fit the new expert's routing vector beside those that are there."""
    buckets = assigned(stage)
    fit = partial(objectives.added_row, gates=gates, to_beat=to_beat(stage.model))
    fitted = stage.gates(buckets, fit)
    fitted = distinct_gates(fitted, stage.model.stored_dtype, stage.seed, rows=[len(gates[0])])
    report = {
        "settings": stage.settings.model_dump(mode="json"),
        "compute": stage.model.arithmetic.name,
        "seed": stage.seed,
        "data": stage.seeds.to_report(),
        "buckets": buckets.to_report(),
        "seconds": stage.clock.seconds,
        "gates_sha256": gates_digest(fitted, stage.model.stored_dtype),
    }
    return RouterResult(fitted, report)


def _report(
    before: AnyReport,
    fitted: RouterResult,
    extended: ExtendedMixture,
    dense: DenseModel,
    model: LayerwiseMixture,
    *,
    all_gates: bool,
) -> dict[str, Any]:
    """Return what changes in the report."""
    names = sorted(model.architecture.expert_names([extended.expert]))
    extension = {
        "expert": extended.expert,
        "model": dense.label,
        "source": describe_sources([dense])[0],
        "sha256": tensors_digest(extended.tensor(name) for name in names),
        "gates": "all" if all_gates else "its own",
        "router": {key: value for key, value in fitted.report.items() if key != "seconds"},
    }
    router = before.document.get("router")
    if all_gates:
        # Experts that were trained before are so still.
        earlier = (router or {}).get("experts_sha256")
        router = {**({"experts_sha256": earlier} if earlier else {}), **fitted.report}
    elif router is not None:  # else the other gates are random still
        router = {**router, "gates_sha256": fitted.report["gates_sha256"]}
    return {
        "router": router,
        "extensions": [*before.document.get("extensions", []), extension],
        **resized(before.document, model.architecture, extended.expert + 1),
    }
