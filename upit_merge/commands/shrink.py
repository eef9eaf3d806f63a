"""`upit-merge shrink`: fewer experts, by what the router does with those that are there.

Some are merged (MC-SMoE, arXiv 2310.01334), or go (REAP, arXiv 2510.13999).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from upit_merge.commands.finished import is_repeated, result_digest
from upit_merge.commands.options import ResizeOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.router import router_identity
from upit_merge.commands.session import RouterSession, router_session
from upit_merge.config.router import DATA_SETTINGS, RouterSettings
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError, argument
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.models.gates import distinct_gates, gates_digest, named_gates
from upit_merge.models.mixture import MixtureArchitecture
from upit_merge.output.staging import scratch_folder
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report
from upit_merge.report.next_steps import code_words, data_words, held_out_beside, tell_next
from upit_merge.report.tables import show
from upit_merge.report.write import write_report_and_card
from upit_merge.resizing.grouping import group_experts, routing_statistics
from upit_merge.resizing.rewriting import resized, rewritten_layout, write_model
from upit_merge.resizing.scores import expert_scores, kept_experts
from upit_merge.resizing.sources import (
    Group,
    Groups,
    PrunedMixture,
    ResizedMixture,
    ShrunkMixture,
)
from upit_merge.router.counts import RoutingCounts
from upit_merge.router.pretrain import RouterResult, pretrain_router
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.processes import check_single_process

LOG = logging.getLogger(__name__)

How = Literal["merge", "drop"]


@dataclass(frozen=True)
class _Smaller:
    """A mixture with fewer experts, before it is written.

    Attributes:
        source: Where its tensors come from, gates aside.
        gates: Its gates, float32, (num_experts, hidden_size) by mixture.
        groups: Which experts each of its own was.
        counts: What the router did with those that were there.
        scores: Theirs, if it is by these that some went, (num_layers, num_experts).
    """

    source: ResizedMixture
    gates: list[Tensor]
    groups: Groups
    counts: RoutingCounts
    scores: Tensor | None = None


def shrink_output(
    out: Path,
    num_experts: int,
    settings: RouterSettings,
    options: ResizeOptions,
    *,
    how: How = "merge",
    refit: bool = False,
) -> None:
    """Make the MoE folder `out` one of `num_experts` experts per layer.

    Layer by layer, on some data. To `merge`, experts are grouped by how the router uses them, see
    `group_experts`; a group's weights, and its routing vector, are the mean of its members',
    weighted by how often each was chosen, and an expert that stays alone keeps its bytes. To
    `drop`, those with the lowest scores go, see `expert_scores`; all others keep theirs, and so do
    their routing vectors.

    Args:
        settings: Which data, and in which batches.
        refit: Fit the gates to the same data, as they were fitted before.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, has not more experts than that, or
            routes a token to more; or the data does not fit.
    """
    check_single_process("shrink")
    with (
        router_session(out, "shrink", options) as session,
        scratch_folder(out) as scratch,
    ):
        edit = session.edit
        before = read_report(out)
        stage = session.stage(settings, scratch)
        model = stage.model
        fitting = refit_settings(before, settings) if refit else None
        identity = _identity(stage, num_experts, how, fitting)
        digest = result_digest(identity)
        if edit.was_finished(identity) or is_repeated(out, before, digest):
            return
        _check_number(out, model, num_experts)
        check_router_memory(model, stage.lengths, settings, out, evaluated=True)
        with edit.interruptible("the model is as it was"):
            smaller = (_merged if how == "merge" else _pruned)(session, stage, num_experts)
            gates, fitted = smaller.gates, None
            if fitting is not None:
                fitted = _refitted(session, smaller, fitting, scratch, identity)
                gates = fitted.gates
            names, source = model.architecture.of_gates(), smaller.source
            layout = rewritten_layout(session.moe, source, names, options.max_shard_bytes)
            named = named_gates(model.architecture.gate_names(), gates) if fitted else {}
            write_model(edit.emptied(), layout, source, named, quiet=options.quiet)
            record = {**_record(smaller, stage, how), "extensions": len(before.extensions)}
            if fitted is not None:
                record["refitted"] = True
            changes: dict[str, Any] = {
                "shrunk": [*before.document.get("shrunk", []), record],
                **resized(before.document, model.architecture, num_experts),
            }
            if fitted is not None:
                changes["router"] = fitted.report
            elif router := before.document.get("router"):
                gates_sha256 = gates_digest(gates, model.stored_dtype)
                kept = {key: value for key, value in router.items() if key != "experts_sha256"}
                changes["router"] = {**kept, "gates_sha256": gates_sha256}
            obsolete = write_report_and_card(edit, before, changes, layout.obsolete, digest=digest)
            edit.put_into_place(identity, obsolete)
    if not options.quiet:
        print(stage.seeds.summary())
        show(_table(smaller))
        print(f"{out} has {num_experts} experts per layer instead of {model.num_experts}.")
        print(_gates_in_words(how, refit=refit))
        folder, code = argument(out), code_words(options.open)
        held_out = held_out_beside(settings.data)
        fit = ("fit the gates anew", f"upit-merge router {folder} {data_words(settings)}{code}")
        measure = ("measure it", f"upit-merge evaluate {folder} --data {held_out}{code}")
        tell_next(*([measure] if refit else [fit, measure]))


def _identity(
    stage: RouterStage, num_experts: int, how: How, fitting: RouterSettings | None
) -> dict[str, Any]:
    identity: dict[str, Any] = {**router_identity(stage), "experts": num_experts}
    if how != "merge":
        identity["how"] = how
    if fitting is not None:
        identity["refit"] = fitting.model_dump(mode="json")
    return identity


def _gates_in_words(how: How, *, refit: bool) -> str:
    if refit:
        return "Its gates are fitted anew."
    return f"Its gates are {'means' if how == 'merge' else 'rows'} of the old ones."


def _merged(session: RouterSession, stage: RouterStage, num_experts: int) -> _Smaller:
    """Return the mixture whose experts are means of groups of the old ones."""
    moe, model = session.moe, stage.model
    statistics = routing_statistics(stage)
    rows = zip(statistics.counts.chosen, statistics.products, strict=True)
    groups = [group_experts(chosen, products, num_experts) for chosen, products in rows]
    gates = mean_gates(moe, model.architecture, groups)
    gates = distinct_gates(gates, model.stored_dtype, stage.seed)
    source = ShrunkMixture(moe, model.architecture, groups, gates)
    return _Smaller(source, gates, groups, statistics.counts)


def _pruned(session: RouterSession, stage: RouterStage, num_experts: int) -> _Smaller:
    """Return the mixture without the experts that add least."""
    architecture, scores = stage.model.architecture, expert_scores(stage)
    rows = zip(scores.counts.chosen, scores.means, strict=True)
    kept = [kept_experts(chosen, means, num_experts) for chosen, means in rows]
    groups = [[Group((number,), (1.0,)) for number in row] for row in kept]
    source = PrunedMixture(session.moe, architecture, kept)
    gates = [source.tensor(name).float() for name in architecture.gate_names()]
    return _Smaller(source, gates, groups, scores.counts, scores.means)


def refit_settings(before: AnyReport, settings: RouterSettings) -> RouterSettings:
    """Return how the gates of a smaller mixture are fitted: to new data, as it is recorded else.

    Experts stay as they are, and no column of the data can name them: in each layer, others may
    have gone. Gates that were never fitted are fitted by default.

    Args:
        settings: Which data, and in which batches.
    """
    recorded = before.router.fit() if before.router else None
    if recorded is None or recorded[0].objective == "random":
        return settings
    # Prompts were for experts that are not all there any more; the data is given now.
    told = recorded[0].model_copy(update={"prompts": None})
    changes: dict[str, Any] = {name: getattr(settings, name) for name in DATA_SETTINGS}
    if told.column is not None or told.assign == "shuffled":
        LOG.info(
            "The gates were fitted with assign: %s; now every sample goes by loss.", told.assign
        )
        changes["assign"] = "lowest"
    if told.upit is not None:
        changes["upit"] = told.upit.model_copy(update={"train_experts": False})
    return told.model_copy(update=changes)


def _refitted(
    session: RouterSession,
    smaller: _Smaller,
    settings: RouterSettings,
    scratch: Path,
    identity: dict[str, Any],
) -> RouterResult:
    """Fit the gates of a mixture that is not written yet."""
    quick = has_fast_bfloat16()  # as `upit-merge router` does
    stage = session.stage(settings, scratch, source=smaller.source, quick=quick)
    check_router_memory(stage.model, stage.lengths, settings, session.edit.out)
    return pretrain_router(session.resumed(stage, identity))


def _check_number(out: Path, model: LayerwiseMixture, num_experts: int) -> None:
    if num_experts >= model.num_experts:
        raise UpitError(
            f"{out} has {model.num_experts} experts per layer, which cannot become "
            f"{num_experts}; give a lower --experts."
        )
    form = model.format
    if num_experts < form.fewest_experts:
        raise UpitError(
            f"The router of a {form.title} needs {form.fewest_experts} experts, so that "
            f"{num_experts} would be too few for {out}; give a higher --experts."
        )
    chosen = form.chosen(model.architecture.config)
    if num_experts < chosen:
        raise UpitError(
            f"{out} routes a token to {chosen} experts, so that {num_experts} would be too few; "
            f"give --experts {chosen} or more."
        )


def mean_gates(moe: Checkpoint, architecture: MixtureArchitecture, groups: Groups) -> list[Tensor]:
    """Return the groups' routing vectors: on a token, the mean of what the members' would say."""
    gates = []
    for name, row in zip(architecture.gate_names(), groups, strict=True):
        gate = moe.tensor(name).float()
        shares = torch.zeros(len(row), len(gate))
        for index, group in enumerate(row):
            shares[index, list(group.members)] = torch.tensor(group.shares)
        gates.append(shares @ gate)
    return gates


def _record(smaller: _Smaller, stage: RouterStage, how: How) -> dict[str, Any]:
    record: dict[str, Any] = {
        "from": stage.model.num_experts,
        "to": len(smaller.groups[0]),
        "how": how,
        "settings": stage.settings.model_dump(mode="json"),
        "seed": stage.seed,
        "data": stage.seeds.to_report(),
        "shares": _rounded(smaller.counts.shares),
        "groups": [[list(group.members) for group in row] for row in smaller.groups],
    }
    if smaller.scores is not None:
        record["scores"] = [[float(f"{x:.6g}") for x in row] for row in smaller.scores.tolist()]
    return record


def _rounded(shares: Tensor) -> list[list[float]]:
    return [[round(share, 6) for share in row] for row in shares.tolist()]


def _table(smaller: _Smaller) -> Table:
    """Tell who is left, layer by layer; of the experts with scores these, else shares of tokens."""
    scores, shares = smaller.scores, smaller.counts.shares
    title = "Experts that became one, the dominant first"
    if scores is not None:
        title = "Experts that are left, and those that went, with their scores"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("groups" if scores is None else "left", overflow="fold")
    if scores is not None:
        table.add_column("gone", overflow="fold")
    for layer, row in enumerate(smaller.groups):
        if scores is None:
            parts = [
                " + ".join(f"{m} ({shares[layer, m]:.0%})" for m in group.members) for group in row
            ]
            table.add_row(str(layer), " | ".join(parts))
            continue
        told = [f"{number} ({score:.3g})" for number, score in enumerate(scores[layer].tolist())]
        left = [group.members[0] for group in row]
        gone = (number for number in range(len(told)) if number not in left)
        table.add_row(str(layer), *(", ".join(told[n] for n in part) for part in (left, gone)))
    return table
