"""`upit-merge shrink`: fewer experts, merged by what the router does (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from upit_merge.commands.options import ResizeOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.router import router_identity
from upit_merge.commands.session import router_session
from upit_merge.config.router import RouterSettings
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.models.gates import distinct_gates, gates_digest
from upit_merge.models.mixture import MixtureArchitecture
from upit_merge.output.staging import scratch_folder
from upit_merge.report.document import read_report
from upit_merge.report.tables import show
from upit_merge.report.write import write_report_and_card
from upit_merge.resizing.grouping import RoutingStatistics, group_experts, routing_statistics
from upit_merge.resizing.rewriting import resized, rewritten_layout, write_model
from upit_merge.resizing.sources import Group, Groups, ShrunkMixture
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.processes import check_single_process


def shrink_output(
    out: Path, num_experts: int, settings: RouterSettings, options: ResizeOptions
) -> None:
    """Merge the experts of the MoE folder `out` until `num_experts` are left in every layer.

    Layer by layer, experts are grouped by how the router uses them on some data, see
    `group_experts`. A group's weights, and its routing vector, are the mean of its members',
    weighted by how often each was chosen; an expert that stays alone keeps its bytes.

    Args:
        settings: Which data, and in which batches.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, has not more experts than that, or
            routes a token to more; or the data does not fit.
    """
    check_single_process("shrink")
    with (
        router_session(out, "shrink", options) as session,
        scratch_folder(out) as scratch,
    ):
        edit, moe = session.edit, session.moe
        before = read_report(out)
        stage = session.stage(settings, scratch)
        model = stage.model
        identity = {**router_identity(stage), "experts": num_experts}
        if edit.was_finished(identity):
            return
        _check_number(out, model, num_experts)
        check_router_memory(model, stage.lengths, settings, out, evaluated=True)
        with edit.interruptible("the model is as it was"):
            statistics = routing_statistics(stage)
            groups = _groups(statistics, num_experts)
            gates = mean_gates(moe, model.architecture, groups)
            gates = distinct_gates(gates, model.stored_dtype, stage.seed)
            shrunk = ShrunkMixture(moe, model.architecture, groups, gates)
            names = model.architecture.of_gates()
            layout = rewritten_layout(moe, shrunk, names, options.max_shard_bytes)
            write_model(edit.emptied(), layout, shrunk, {}, quiet=options.quiet)
            record = _record(model, statistics, groups, stage)
            record["extensions"] = len(before.extensions)
            changes: dict[str, Any] = {
                "shrunk": [*before.document.get("shrunk", []), record],
                **resized(before.document, model.architecture, num_experts),
            }
            if router := before.document.get("router"):
                digest = gates_digest(gates, model.stored_dtype)
                kept = {key: value for key, value in router.items() if key != "experts_sha256"}
                changes["router"] = {**kept, "gates_sha256": digest}
            obsolete = write_report_and_card(edit, before, changes, layout.obsolete)
            edit.put_into_place(identity, obsolete)
    if not options.quiet:
        print(stage.seeds.summary())
        show(_table(groups, statistics))
        print(
            f"{out} has {num_experts} experts per layer instead of {model.num_experts}. Its gates "
            "are means of the old ones; `upit-merge router` fits them anew."
        )


def _check_number(out: Path, model: LayerwiseMixture, num_experts: int) -> None:
    if num_experts >= model.num_experts:
        raise UpitError(
            f"{out} has {model.num_experts} experts per layer, which cannot be merged into "
            f"{num_experts}; give a lower --experts."
        )
    chosen = model.format.chosen(model.architecture.config)
    if num_experts < chosen:
        raise UpitError(
            f"{out} routes a token to {chosen} experts, so that {num_experts} would be too few; "
            f"give --experts {chosen} or more."
        )


def _groups(statistics: RoutingStatistics, num_experts: int) -> list[list[Group]]:
    return [
        group_experts(chosen, products, num_experts)
        for chosen, products in zip(statistics.counts.chosen, statistics.products, strict=True)
    ]


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


def _record(
    model: LayerwiseMixture, statistics: RoutingStatistics, groups: Groups, stage: RouterStage
) -> dict[str, Any]:
    return {
        "from": model.num_experts,
        "to": len(groups[0]),
        "settings": stage.settings.model_dump(mode="json"),
        "seed": stage.seed,
        "data": stage.seeds.to_report(),
        "shares": [[round(share, 6) for share in row] for row in statistics.counts.shares.tolist()],
        "groups": [[list(group.members) for group in row] for row in groups],
    }


def _table(groups: Sequence[Sequence[Group]], statistics: RoutingStatistics) -> Table:
    table = Table(title="Experts that became one, the dominant first", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("groups", overflow="fold")
    for layer, row in enumerate(groups):
        parts = [
            " + ".join(f"{m} ({statistics.counts.shares[layer, m]:.0%})" for m in group.members)
            for group in row
        ]
        table.add_row(str(layer), " | ".join(parts))
    return table
