"""`upit-merge plan`: everything a run would decide and need, without writing anything."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.table import Table

from upit_merge.commands.foretell import NO_ROUTER, planned_router_time
from upit_merge.commands.outlook import Outlook, look_ahead
from upit_merge.commands.preflight import needs
from upit_merge.commands.run import RunOptions, seed_set
from upit_merge.config.recipe import Recipe
from upit_merge.config.router import RouterSettings, check_data_is_named
from upit_merge.errors import UpitError
from upit_merge.merge.inputs import opened
from upit_merge.merge.passes import find_lineage, measure_similarity
from upit_merge.merge.right_base import warn_of_foreign_base
from upit_merge.merge.signs import signs_of
from upit_merge.merge.similarity import cosine
from upit_merge.models.dense import DenseArchitecture, family_of
from upit_merge.models.families import DenseFamily
from upit_merge.models.formats import FORMATS, PLAIN, MixtureFormat
from upit_merge.output.staging import REPORT, check_output_is_free
from upit_merge.report.tables import lineage_table, show
from upit_merge.runtime.device import resolve_devices
from upit_merge.runtime.interrupt import ends_at_once

LOG = logging.getLogger(__name__)


def plan_recipe(
    recipe: Recipe,
    options: RunOptions,
    out: Path | None = None,
    data: str | None = None,
    *,
    subset: str | None = None,
    split: str | None = None,
    group_by: str | None = None,
) -> Outlook | None:
    """Validate, compute the lineage, and print it with what a run would need of this machine.

    Args:
        out: Where the output would go, to see whether it fits the disk.
        data: Seed data on which to find out whether the mixture would be worth its bytes.
        subset, split: Of the data, see `RouterSettings.for_data`.
        group_by: Column of the data that tells kinds of text apart.

    Returns:
        What was found out on the data, if there is any.

    Raises:
        UpitError: as `run_recipe` would.
    """
    outlook = None
    recipe = recipe.with_seed(options.seed)
    check_data_is_named({"data": data, "subset": subset, "split": split})
    if group_by is not None and data is None:
        raise UpitError(
            f"--group-by {group_by} names a column of --data, which is not given; give both."
        )
    planned = recipe.router
    if data is not None:
        recipe = _with_data(recipe, data, subset=subset, split=split)
    devices = resolve_devices(options.device, multi_gpu=options.multi_gpu)
    if out is not None and (out / REPORT).is_file():
        LOG.warning(
            "%s holds an earlier output: `upit-merge run` leaves it as it is if this recipe made "
            "it, and refuses it otherwise.",
            out,
        )
    elif out is not None:
        check_output_is_free(out)
    with ends_at_once(lambda: "Interrupted."), opened(recipe, options.open) as inputs:
        seeds = seed_set(inputs, options, group_by)
        shards = inputs.shards(options.max_shard_bytes)
        required = needs(inputs, devices, seeds, shards)
        gram = measure_similarity(inputs, devices, quiet=options.quiet)
        warn_of_foreign_base(inputs, gram)
        lineage = find_lineage(inputs, gram)
        show(_cosine_table(inputs.labels, cosine(gram.sum(0)).tolist()))
        for line in signs_of(inputs, gram).lines():
            print(line)
        show(lineage_table(lineage, inputs.labels))
        total = sum(shard.num_bytes for shard in shards)
        parameters = total // inputs.dtype.itemsize
        print(f"Expansion: {lineage.summary}.")
        if (distance := lineage.smallest_distance()) is not None:
            print(
                f"Closest two experts: distance {distance:.4g}, cosine of the most similar pair "
                f"{lineage.largest_cosine():.4f}."
            )
        print(
            f"Output: {parameters:,} parameters, {total / 1e9:.2f} GB in {len(shards)} file(s), "
            f"{inputs.num_experts} experts per layer, {inputs.experts_per_token} per token."
        )
        print(readers_line(inputs.architecture, family_of(inputs.base)))
        if seeds:
            print(seeds.summary())
        for line in required.lines(out):
            print(line)
        if planned is None:
            print(NO_ROUTER)
        elif seeds is not None and recipe.router is not None:
            settings = recipe.router.model_copy(update={"assign": planned.assign})
            for sentence in planned_router_time(inputs, seeds, settings, devices[0]):
                print(sentence)
        if data is not None and seeds is not None and recipe.router is not None:
            outlook = look_ahead(
                inputs, seeds, recipe.router, devices[0], bytes_ours=total, quiet=options.quiet
            )
            show(outlook.table())
            for sentence in outlook.sentences():
                print(sentence)
    for sentence in required.shortages(out):
        raise UpitError(sentence)
    return outlook


def readers_line(architecture: DenseArchitecture, family: DenseFamily) -> str:
    """Say what format an output has, which programs run it, and what else it could have been."""
    chosen, settings = architecture.format, architecture.settings
    told = f"Format: {chosen.title}, run by {_readers(chosen)}"
    others = [FORMATS[name] for name in family.targets if name != chosen.name]
    whole = {**settings, **PLAIN}  # another has other kinds of shared experts
    for other in (form for form in others if not form.unfit(whole)):
        told += f"; architecture: {other.name} would be a {other.title}, run by {_readers(other)}"
    return f"{told}."


def _readers(form: MixtureFormat) -> str:
    notes = [f"{name} ({note})" if note else name for name, note in form.readers.items()]
    return ", ".join(notes)


def _with_data(recipe: Recipe, data: str, **of_data: str | None) -> Recipe:
    """Return the recipe with this seed data; which experts get it is not the question here."""
    router = recipe.router or RouterSettings(data=data)
    router = router.for_data(data, **of_data).model_copy(update={"assign": "lowest"})
    return recipe.model_copy(update={"router": router})


def _cosine_table(labels: list[str], rows: list[list[float]]) -> Table:
    table = Table(title="Cosine similarity of the checkpoints' deltas", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for index in range(len(labels)):
        table.add_column(str(index), justify="right")
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        table.add_row(f"{index} {label}", *(f"{value:.4f}" for value in row))
    return table
