"""`upit-merge plan`: everything a run would decide and need, without writing anything."""

from __future__ import annotations

import torch
from rich.table import Table

from upit_merge.device import merge_workers, resolve_device
from upit_merge.expansion import experts
from upit_merge.expansion.lineage import plan_lineage
from upit_merge.expansion.similarity import cosine
from upit_merge.inputs import Inputs, opened
from upit_merge.pipeline import (
    RunOptions,
    seed_set,
    similarity,
)
from upit_merge.recipe import Recipe, RouterSettings
from upit_merge.report.tables import lineage_table, show
from upit_merge.router.layerwise import LOGIT_ROWS
from upit_merge.router.seed_tokens import SeedSet

# What Python, torch and transformers take before any weight is read.
_IMPORTS_BYTES = 700 << 20


def plan_recipe(recipe: Recipe, options: RunOptions) -> None:
    """Validate, compute the lineage, and print it with the output's size and the memory needed.

    Raises:
        UpitError: as `run_recipe` would.
    """
    recipe = recipe.with_seed(options.seed)
    device = resolve_device(options.device)
    with opened(recipe, options.open) as inputs:
        seeds = seed_set(inputs, options)
        gram = similarity(inputs, device, quiet=options.quiet)
        lineage = plan_lineage(gram, inputs.densities, inputs.num_experts, recipe.parameters)
        shards = inputs.shards(options.max_shard_bytes)
        show(_cosine_table(inputs.labels, cosine(gram.sum(0)).tolist()))
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
        print(f"Memory for the merge: about {merge_memory(inputs, device) / 2**30:.1f} GiB.")
        if seeds and recipe.router:
            memory = router_memory(inputs, seeds, recipe.router)
            print(seeds.summary())
            print(f"Memory for the router: about {memory / 2**30:.1f} GiB.")


def merge_memory(inputs: Inputs, device: torch.device) -> int:
    """Bytes of RAM the two passes need: blocks, whatever the size of the model."""
    models = len(inputs.checkpoints) + 1
    # Per element of a block: the stored values of all models, their deltas in float32, and a
    # handful of temporaries of one child.
    per_element = models * (4 + 4) + 6 * 4
    block = experts.block_elements(device, inputs.recipe.parameters.mutation, inputs.num_experts)
    return _IMPORTS_BYTES + merge_workers(device) * block * per_element


def router_memory(inputs: Inputs, seeds: SeedSet, router: RouterSettings) -> int:
    """Bytes of RAM router pre-training needs on the CPU: a layer, a batch, the hidden states."""
    settings, specs = inputs.architecture.settings, inputs.architecture.specs
    layer = sum(spec.numel for name, spec in specs.items() if name.startswith("model.layers.0."))
    hidden = settings["hidden_size"]
    lengths = [len(sample.input_ids) for sample in seeds.samples]
    states = 2 * 4 * hidden * sum(lengths)
    # In float32: the three FFN activations that are alive at once, or the attention's share.
    batch = min(sum(lengths), max(router.batch_tokens, *lengths))
    activations = 4 * batch * (3 * settings["intermediate_size"] + 6 * hidden)
    logits = 3 * 4 * min(LOGIT_ROWS, max(lengths)) * settings["vocab_size"]
    table = settings["vocab_size"] * hidden
    # A layer in float32 beside the stored copy being read, or the output head likewise.
    weights = max(layer, table) * (4 + inputs.dtype.itemsize)
    kept = min(states, float(router.memory_gb) * 2**30)
    return int(_IMPORTS_BYTES + weights + max(activations, logits) + kept)


def _cosine_table(labels: list[str], rows: list[list[float]]) -> Table:
    table = Table(title="Cosine similarity of the checkpoints' deltas", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for index in range(len(labels)):
        table.add_column(str(index), justify="right")
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        table.add_row(f"{index} {label}", *(f"{value:.4f}" for value in row))
    return table
