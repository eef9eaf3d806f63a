"""An adapter on its base, written as the complete model that the dense baseline begins with."""

from __future__ import annotations

import contextlib
from pathlib import Path

from upit_merge.io.checkpoint import WEIGHT_INDEX, Checkpoint
from upit_merge.io.disk import check_space
from upit_merge.io.hub import OpenOptions
from upit_merge.io.shards import ShardWriter, plan_shards, shard_index
from upit_merge.io.sources import DenseModel
from upit_merge.io.tensor_file import TensorSpec, row_blocks
from upit_merge.io.text_file import write_json
from upit_merge.models.lora.adapter import open_model
from upit_merge.models.tables import open_checkpoint
from upit_merge.models.tokenizer import has_tokenizer
from upit_merge.models.tokenizer_files import copy_generation_config, copy_tokenizer_files

_BLOCK_ELEMENTS = 1 << 20
_SHARD_BYTES = 5_000_000_000


def write_complete(reference: str, folder: Path) -> None:
    """Write `BASE+ADAPTER` as one model: as a merge reads it, tables of another size included.

    PEFT's own merge of factors changes the head too where a base ties it to the embeddings, and
    knows nothing of a base that was given tokens in training.

    Args:
        folder: Must be there, and is filled.

    Raises:
        UpitError: the adapter does not fit its base, or the model does not fit the disk.
    """
    with contextlib.ExitStack() as stack:
        bases: list[Checkpoint] = []

        def open_base(label: str, path: Path) -> Checkpoint:
            bases.append(
                stack.enter_context(contextlib.closing(open_checkpoint(label, path, OpenOptions())))
            )
            return bases[0]

        model = stack.enter_context(
            contextlib.closing(open_model(reference, None, OpenOptions(), open_base))
        )
        _write_weights(model, bases[0], folder)
        write_json(folder / "config.json", model.config)
        donor: DenseModel = model if has_tokenizer(model.folder) else bases[0]
        copy_tokenizer_files(donor, folder)
        copy_generation_config(model, [bases[0]], folder)


def _write_weights(model: DenseModel, base: Checkpoint, folder: Path) -> None:
    """Write all tensors, block by block, in the dtypes that the base has them in."""
    common = next(iter(base.specs.values())).dtype
    specs = [
        TensorSpec(name, spec.shape, base.specs[name].dtype if name in base.specs else common)
        for name, spec in model.specs.items()
    ]
    shards = plan_shards([specs], _SHARD_BYTES)
    check_space(folder, sum(shard.num_bytes for shard in shards), "the last checkpoint")
    with ShardWriter(folder, shards) as writer:
        for spec in specs:
            for start, stop in row_blocks(spec, _BLOCK_ELEMENTS):
                rows = model.rows(spec.name, start, stop)
                writer.write(spec.name, start, rows.to(spec.dtype))
    if len(shards) > 1:
        write_json(folder / WEIGHT_INDEX, shard_index(shards))
