"""The whole job: recipe in, MoE folder out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upit_merge.checkpoints import OpenOptions
from upit_merge.device import merge_workers, resolve_device
from upit_merge.expansion.experts import ExpertBuilder, write_experts
from upit_merge.expansion.lineage import Lineage, plan_lineage
from upit_merge.expansion.similarity import delta_gram
from upit_merge.inputs import Inputs, opened
from upit_merge.mixtral import context_length, gate_tensor, moe_config
from upit_merge.recipe import Recipe
from upit_merge.report.card import model_card, router_sentence
from upit_merge.report.record import merge_record, write_json
from upit_merge.report.tables import bucket_table, show
from upit_merge.router.gate_files import opened_moe, write_gates
from upit_merge.router.layerwise import LayerwiseMoe
from upit_merge.router.pretrain import (
    RouterResult,
    load_seed_set,
    pretrain_router,
    training_free_gates,
)
from upit_merge.router.seed_tokens import SeedSet
from upit_merge.staging import REPORT, refuse_occupied, require_space, staged_output
from upit_merge.tensor_files import Shard, ShardWriter, shard_index
from upit_merge.tokenizer import (
    copy_generation_config,
    copy_tokenizer,
    load_tokenizer,
    write_chat_template,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run; what it makes does not depend on these, but for the seed.

    Args:
        device: `cpu` or `cuda`, with or without an index.
        max_shard_bytes: Upper bound of an output file.
        open: How checkpoints are opened.
        seed: Replaces the recipe's seed.
        copy_tokenizer: Give the output a tokenizer.
        write_card: Write `README.md` and `mergekit_config.yml`.
        overwrite: Replace an earlier output of this program.
        quiet: No progress bars, no tables.
    """

    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    open: OpenOptions = field(default_factory=OpenOptions)
    seed: int | None = None
    copy_tokenizer: bool = True
    write_card: bool = True
    overwrite: bool = False
    quiet: bool = False


def run_recipe(recipe: Recipe, source: str, out: Path, options: RunOptions) -> None:
    """Turn a recipe into an MoE folder.

    Args:
        recipe: The validated recipe.
        source: Its text, kept beside the model.
        out: The folder to write; must be empty or not exist, unless `options.overwrite`.

    Raises:
        UpitError: whatever the user can mend; nothing is left in `out` then.
    """
    recipe = recipe.with_seed(options.seed)
    device = resolve_device(options.device)
    clock = _Clock()
    refuse_occupied(out, overwrite=options.overwrite)
    # Opened first: a glob must not find the output folder that is about to be made.
    with (
        opened(recipe, options.open) as inputs,
        staged_output(out, overwrite=options.overwrite) as staging,
    ):
        seeds = seed_set(inputs, options)
        shards = inputs.shards(options.max_shard_bytes)
        require_space(out, sum(shard.num_bytes for shard in shards), "the output")
        with clock.measure("similarity"):
            gram = similarity(inputs, device, quiet=options.quiet)
        lineage = plan_lineage(gram, inputs.densities, inputs.num_experts, recipe.parameters)
        LOG.info("Expansion: %s", lineage.summary)
        with clock.measure("experts"):
            _write_model(staging, shards, inputs, lineage, device, quiet=options.quiet)
        _write_settings(staging, inputs, shards, options)
        router = None
        if recipe.router and seeds:
            with clock.measure("router"), opened_moe(staging) as moe:
                router = pretrain_router(
                    LayerwiseMoe(moe, device),
                    seeds,
                    recipe.router,
                    seed=recipe.seed,
                    scratch=staging,
                    quiet=options.quiet,
                )
            write_gates(staging, router.gates)
        record = merge_record(
            recipe, inputs.labels, gram, lineage, inputs.experts_per_token, inputs.dtype
        )
        record |= {"router": router.report if router else None, "seconds": clock.seconds}
        _write_papers(staging, out, inputs, lineage, source, record, options)
    _tell(out, lineage, router, seeds, quiet=options.quiet)


def seed_set(inputs: Inputs, options: RunOptions) -> SeedSet | None:
    """The router's seed data, read before the long work so that its mistakes show early."""
    settings = inputs.recipe.router
    if settings is None or inputs.tokenizer is None:
        return None
    tokenizer = load_tokenizer(
        inputs.tokenizer.folder, trust_remote_code=options.open.trust_remote_code
    )
    if inputs.chat_template:
        tokenizer.chat_template = inputs.chat_template
    return load_seed_set(
        settings,
        tokenizer,
        context=context_length(inputs.settings_donor),
        vocab_size=inputs.architecture.settings["vocab_size"],
        seed=inputs.recipe.seed,
    )


class _Clock:
    """Wall time of the named stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)


def similarity(inputs: Inputs, device: torch.device, *, quiet: bool) -> torch.Tensor:
    """Pass 1, see `delta_gram`."""
    return delta_gram(
        inputs.base,
        inputs.checkpoints,
        inputs.architecture,
        device=device,
        workers=merge_workers(device),
        quiet=quiet,
    )


def _write_model(
    staging: Path,
    shards: tuple[Shard, ...],
    inputs: Inputs,
    lineage: Lineage,
    device: torch.device,
    *,
    quiet: bool,
) -> None:
    seed = inputs.recipe.seed
    with ShardWriter(staging, shards) as writer:
        write_experts(
            writer,
            inputs.base,
            inputs.checkpoints,
            inputs.backbone,
            inputs.architecture,
            ExpertBuilder(lineage, inputs.densities, seed),
            device=device,
            workers=merge_workers(device),
            quiet=quiet,
        )
        norms = inputs.settings_donor
        for layer, gate in enumerate(
            training_free_gates(norms, inputs.architecture.num_layers, inputs.num_experts, seed)
        ):
            writer.write(gate_tensor(layer), 0, gate)


def _write_settings(
    staging: Path, inputs: Inputs, shards: tuple[Shard, ...], options: RunOptions
) -> None:
    token_donor = inputs.tokenizer or inputs.settings_donor
    config = moe_config(
        inputs.settings_donor,
        token_donor,
        inputs.num_experts,
        inputs.experts_per_token,
        inputs.dtype,
    )
    write_json(staging / "config.json", config)
    if len(shards) > 1:
        write_json(staging / "model.safetensors.index.json", shard_index(shards))
    copy_generation_config(token_donor, staging)
    if inputs.tokenizer is None:
        LOG.warning("No model of the recipe has a tokenizer; the output has none either.")
        return
    if options.copy_tokenizer:
        copy_tokenizer(inputs.tokenizer, staging)
        if inputs.chat_template:
            write_chat_template(inputs.chat_template, staging)


def _write_papers(
    staging: Path,
    out: Path,
    inputs: Inputs,
    lineage: Lineage,
    source: str,
    record: dict[str, Any],
    options: RunOptions,
) -> None:
    """The report, the recipe and the card."""
    if options.write_card:
        (staging / "mergekit_config.yml").write_text(source, encoding="utf-8")
        card = model_card(
            out.absolute().name,
            inputs.base,
            inputs.checkpoints,
            lineage,
            source,
            router_sentence(record["router"]),
            inputs.experts_per_token,
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
    record["files"] = sorted([*(path.name for path in staging.iterdir()), REPORT])
    write_json(staging / REPORT, record)


def _tell(
    out: Path,
    lineage: Lineage,
    router: RouterResult | None,
    seeds: SeedSet | None,
    *,
    quiet: bool,
) -> None:
    if router is None:
        LOG.warning(
            "The recipe has no router: block, so the gates are random: the model works, but its "
            "experts are not told apart. Train them with `upit-merge router %s --data seed.jsonl`.",
            out,
        )
    if quiet:
        return
    if seeds:
        print(seeds.summary())
    if router and (buckets := router.report.get("buckets")):
        show(bucket_table(buckets["experts"]))
    print(f"{lineage.summary[0].upper()}{lineage.summary[1:]}. The model is in {out}.")
