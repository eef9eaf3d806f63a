"""The whole job: recipe in, MoE folder out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from upit_merge.commands.finished import (
    is_finished_run,
    output_config,
    result_digests,
    run_identity,
)
from upit_merge.commands.foretell import tell_router_time
from upit_merge.commands.options import CommandOptions
from upit_merge.commands.preflight import needs
from upit_merge.config.recipe import Recipe
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.errors import argument, counted
from upit_merge.io.checkpoint import WEIGHT_INDEX
from upit_merge.io.disk import explained_failures
from upit_merge.io.hub import OpenOptions
from upit_merge.io.shards import Shard, shard_index
from upit_merge.io.text_file import write_json
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.merge.lineage import Lineage
from upit_merge.merge.passes import Merged, merge
from upit_merge.models.chat_template import DEFAULT, lend_templates, write_chat_templates
from upit_merge.models.dense import context_length
from upit_merge.models.gates import named_gates
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.models.tokenizer_files import (
    add_wanted_tokens,
    copy_generation_config,
    copy_tokenizer_files,
)
from upit_merge.output.patch import InPlace
from upit_merge.output.staging import (
    REPORT,
    STAGING,
    Staging,
    check_output_is_free,
    output_files,
    scratch_folder,
    staged_output,
)
from upit_merge.report.document import describe, read_report
from upit_merge.report.next_steps import SEED, code_words, held_out_beside, tell_next
from upit_merge.report.record import merge_record, mixture_record
from upit_merge.report.tables import show_buckets
from upit_merge.report.write import RECIPE_COPY, write_card
from upit_merge.router.buckets import named
from upit_merge.router.held_out import FIXED
from upit_merge.router.pretrain import (
    RouterResult,
    computed_mixture,
    load_seed_set,
    pretrain_router,
)
from upit_merge.router.progress import Progress
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.clock import Clock
from upit_merge.runtime.device import resolve_devices
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.processes import Processes, joined

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions(CommandOptions):
    """How a recipe is run; what it makes does not depend on these, but for the seed.

    Args:
        multi_gpu: Use all CUDA devices.
        max_shard_bytes: Upper bound of an output file.
        seed: Replaces the recipe's seed.
        copy_tokenizer: Give the output a tokenizer.
        write_card: Write `README.md` and `mergekit_config.yml`.
        trains_on: It will be trained further, so that experts per token are not chosen.
        overwrite: Replace an earlier output of this program.
        name: Of the model, for its card; the output folder's if None.
    """

    multi_gpu: bool = False
    max_shard_bytes: int = 5_000_000_000
    seed: int | None = None
    copy_tokenizer: bool = True
    write_card: bool = True
    trains_on: bool = False
    overwrite: bool = False
    name: str | None = None

    def of_output(self) -> dict[str, Any]:
        """Return what decides which files there are beside the weights, and what they say."""
        return {name: getattr(self, name) for name in ("copy_tokenizer", "write_card", "name")}


def run_recipe(recipe: Recipe, source: str, out: Path, options: RunOptions) -> None:
    """Turn a recipe into an MoE folder.

    Under torchrun or `accelerate launch` all processes must call this; they share the merge and
    the router's samples, and the first does the rest.

    Args:
        recipe: The validated recipe.
        source: Its text, kept beside the model.
        out: The folder to write; must be empty, not exist, or hold an unfinished run of the same
            recipe, unless `options.overwrite`.

    Raises:
        UpitError: whatever the user can mend; nothing is left in `out` then.
        ResumableError: the disk is full or another process failed; the same call goes on later.
    """
    recipe = recipe.with_seed(options.seed)
    with (
        joined() as processes,
        ends_at_once(lambda: "Interrupted; nothing was written." * processes.is_first),
        explained_failures(out),
        contextlib.ExitStack() as stack,
    ):
        with processes.together():
            run = _prepared(recipe, source, out, options, processes, stack)
        finished = processes.gather(run.is_finished)[0]
        complete = finished or processes.gather(run.staging.is_moving)[0]
        if not complete:
            merged = merge(
                run.inputs,
                run.staging,
                run.shards,
                processes,
                run.clock,
                devices=run.devices,
                quiet=options.quiet or not processes.is_first,
            )
            with processes.together():
                run.settle(processes)
            router = run.train_router(processes)
            if processes.is_first:
                run.finish(merged, router)
    if not processes.is_first:
        return
    if finished:
        LOG.info("An earlier run of this recipe has made %s; there was nothing to do.", out)
    elif complete:
        LOG.info("The earlier run was complete but for the last files, which are in place now.")
    else:
        run.tell(merged.lineage, router)
    if not options.quiet:
        if finished and _has_another_card(recipe, out):
            LOG.warning(
                "Its card: block is another; `upit-merge page %s --recipe RECIPE` applies it.",
                argument(out),
            )
        if finished:
            print("This recipe has been run already, on these very files: nothing was computed.")
        print(f"The model is in {out}.")
        tell_next(*_next_steps(out, recipe.router, options.open))


def _has_another_card(recipe: Recipe, out: Path) -> bool:
    card = recipe.card.model_dump(exclude_none=True) if recipe.card else {}
    return card != (read_report(out).document.get("card") or {})


def _next_steps(
    out: Path, router: RouterSettings | None, opening: OpenOptions
) -> Iterator[tuple[str, str]]:
    code = code_words(opening)
    folder, held_out = argument(out), held_out_beside(router.data if router else None)
    if router is None:
        yield "train the gates, which are random", f"upit-merge router {folder} --data {SEED}{code}"
    yield "measure it", f"upit-merge evaluate {folder} --data {held_out}{code}"
    yield "talk to it", f"upit-merge chat {folder}{code}"


def _prepared(
    recipe: Recipe,
    source: str,
    out: Path,
    options: RunOptions,
    processes: Processes,
    stack: contextlib.ExitStack,
) -> _Run:
    """Open everything and ask everything that can be asked before the work."""
    first = processes.is_first
    devices = resolve_devices(options.device, multi_gpu=options.multi_gpu)
    # What is there may be what this very run makes: that is known when all is opened.
    moving = Staging(out / STAGING).is_moving
    again = first and not (options.overwrite or moving) and (out / REPORT).is_file()
    if first and not again:
        check_output_is_free(out, overwrite=options.overwrite)
    # Opened first: a glob must not find the output folder that is about to be made.
    inputs = stack.enter_context(opened(recipe, options.open))
    shards = inputs.shards(options.max_shard_bytes)
    seeds = seed_set(inputs, options) if first else None
    staging = Staging(out / STAGING)
    result: dict[str, Any] = {}
    if first:
        samples = seeds.digest() if seeds else None
        identity = run_identity(recipe, inputs.models, options.max_shard_bytes, samples)
        result = {**identity, **options.of_output()}
        if again and is_finished_run(out, result, inputs):
            return _Run(inputs, devices, shards, seeds, staging, out, source, options, result, True)
        staging = stack.enter_context(staged_output(out, identity, overwrite=options.overwrite))
        if not staging.is_moving:
            needs(inputs, devices, seeds, shards).check(out, staging.size())
    return _Run(inputs, devices, shards, seeds, staging, out, source, options, result)


@dataclass(frozen=True)
class _Run:
    """A recipe that is being run; what is done after the merge stage.

    Attributes:
        identity: What decides the output; the first process has it.
        is_finished: Whether an earlier run has made the output.
    """

    inputs: Inputs
    devices: tuple[torch.device, ...]
    shards: Sequence[Shard]
    seeds: SeedSet | None
    staging: Staging
    out: Path
    source: str
    options: RunOptions
    identity: Mapping[str, Any]
    is_finished: bool = False
    clock: Clock = field(default_factory=Clock)

    def settle(self, processes: Processes) -> None:
        """Make a folder that can be opened of the weights, before the router can be trained."""
        if processes.is_first:
            copy = self.options.copy_tokenizer
            write_settings(self.staging.model, self.inputs, self.shards, copy_tokenizer=copy)

    def train_router(self, processes: Processes) -> RouterResult | None:
        """Fit the gates and write them; every process has the result."""
        inputs, settings = self.inputs, self.inputs.recipe.router
        seeds = processes.gather(self.seeds)[0]
        if settings is None or seeds is None:
            return None
        device = self.devices[0]
        with (
            self.clock.measure("router"),
            scratch_folder(self.out, processes.rank) as scratch,
            opened_mixture(self.staging.model, config=output_config(inputs)) as moe,
        ):
            quick = all(processes.gather(has_fast_bfloat16()))
            model = computed_mixture(moe, device, settings, quick=quick)
            identity = {"compute": model.arithmetic.identity()}
            progress = Progress(self.staging.root / "router", identity, processes)
            seed, quiet = inputs.recipe.seed, self.options.quiet
            stage = RouterStage(model, seeds, settings, seed, scratch, processes, progress, quiet)
            output = InPlace(moe)
            tell_router_time(stage)
            # Fewer experts would leave the gates less of a gradient in further training.
            is_open = inputs.recipe.parameters.experts_per_token is None
            free, fixed = is_open and not self.options.trains_on, FIXED[is_open]
            router = pretrain_router(stage, output, free_choice=free, fixed=fixed)
            if processes.is_first:
                output.write(named_gates(stage.model.architecture.gate_names(), router.gates))
        processes.gather(None)  # nobody uses the scratch folders any more
        return router

    def finish(self, merged: Merged, router: RouterResult | None) -> None:
        """Write everything after weights and gates: report, card and configuration."""
        inputs, folder = self.inputs, self.staging.model
        if router is not None and (chosen := router.report.get("chosen")):
            inputs = replace(inputs, experts_per_token=chosen["experts_per_token"])
        record = merge_record(
            inputs.recipe,
            inputs.base,
            inputs.checkpoints,
            merged.gram,
            merged.lineage,
            inputs.experts_per_token,
            inputs.dtype,
        )
        record["seed_option"] = self.options.seed
        if card := inputs.recipe.card:
            record["card"] = card.model_dump(exclude_none=True)
        record["run"] = result_digests(self.identity)
        record["model"] = mixture_record(
            folder,
            self.options.name or self.out.absolute().name,
            inputs.architecture.format,
            inputs.architecture.settings,
            inputs.num_experts,
            inputs.experts_per_token,
        )
        record |= {"router": router.report if router else None, "seconds": self.clock.seconds}
        self._write_report_and_card(record)
        # Last of all: without it no folder loads as a model.
        write_json(folder / "config.json", output_config(inputs))

    def tell(self, lineage: Lineage, router: RouterResult | None) -> None:
        """Say what users should know of a finished model."""
        if router is None:
            LOG.warning(
                "The recipe has no router: block, so the gates are random: the model works, but "
                "its experts are not told apart. Train them with `upit-merge router %s --data "
                "seed.jsonl`.",
                self.out,
            )
        if self.options.quiet:
            return
        if self.seeds:
            print(self.seeds.summary())
        if router:
            show_buckets(router.report, argument(self.out))
        print(f"{lineage.summary[0].upper()}{lineage.summary[1:]}.")

    def _write_report_and_card(self, record: dict[str, Any]) -> None:
        """Write the recipe, the card with its pictures, and the report."""
        folder = self.staging.model
        if self.options.write_card:
            (folder / RECIPE_COPY).write_text(self.source, encoding="utf-8")
            record = write_card(folder, describe(record), self.source)
        record["files"] = sorted([*output_files(folder), REPORT, "config.json"])
        write_json(folder / REPORT, record)


def seed_set(inputs: Inputs, options: RunOptions, column: str | None = None) -> SeedSet | None:
    """Read the router's seed data, before the long work so that its mistakes show early."""
    settings = inputs.recipe.router
    if settings is None or inputs.tokenizer is None:
        return None
    tokenizer = load_tokenizer(
        inputs.tokenizer.folder, trust_remote_code=options.open.trust_remote_code
    )
    if inputs.chat_template:
        tokenizer.chat_template = inputs.chat_template
    elif inputs.borrowed and inputs.borrowed.templates:
        tokenizer.chat_template = dict(inputs.borrowed.templates)
    seeds = load_seed_set(
        settings,
        tokenizer,
        context=context_length(inputs.settings_donor),
        vocab_size=inputs.architecture.settings["vocab_size"],
        seed=inputs.recipe.seed,
        column=column,
    )
    if settings.names_experts:
        named(seeds.samples, settings, inputs.num_experts)
    _tell_of_equal_copies(inputs, settings)
    return seeds


def _tell_of_equal_copies(inputs: Inputs, settings: RouterSettings) -> None:
    """Say what gates of copies can be fitted to, where it is asked which of them is better."""
    parameters, copied = inputs.recipe.parameters, len(inputs.checkpoints)
    alike = parameters.expansion == "copy" and not (parameters.noise or parameters.reinitialise)
    if alike and copied < inputs.num_experts and settings.needs_buckets:
        LOG.info(
            "%s experts are copies of %s, and no loss tells copies apart; objective: kmeans gives "
            "each expert tokens of its own instead.",
            inputs.num_experts,
            counted(copied, "model"),
        )


def write_settings(
    folder: Path, inputs: Inputs, shards: Sequence[Shard], *, copy_tokenizer: bool
) -> None:
    """Write what a model has beside weights and `config.json`: shard index, tokenizer."""
    if len(shards) > 1:
        write_json(folder / WEIGHT_INDEX, shard_index(shards))
    donor = inputs.tokenizer or inputs.settings_donor
    copy_generation_config(donor, inputs.latest_first, folder)
    if inputs.tokenizer is None:
        LOG.warning("No model of the recipe has a tokenizer; the output has none either.")
    elif copy_tokenizer:
        copy_tokenizer_files(inputs.tokenizer, folder)
        architecture = inputs.architecture
        size = architecture.settings["vocab_size"]
        add_wanted_tokens(folder, architecture.format.wanted_tokens, size)
        if inputs.chat_template:
            write_chat_templates({DEFAULT: inputs.chat_template}, folder)
        elif inputs.borrowed:
            lend_templates(inputs.tokenizer, inputs.borrowed, folder)
