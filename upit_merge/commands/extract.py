"""`upit-merge extract`: an expert of a mixture, or the mean of several, as a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import UpitError, argument, counted
from upit_merge.io.checkpoint import WEIGHT_INDEX
from upit_merge.io.disk import check_space, explained_failures
from upit_merge.io.shards import Shard, ShardWriter, plan_shards, shard_index
from upit_merge.io.tensor_file import TensorSpec, all_finite, row_blocks
from upit_merge.io.text_file import write_json
from upit_merge.models.mixture import inspect_mixture, opened_mixture
from upit_merge.models.published import PublishedMixture
from upit_merge.models.tokenizer import has_tokenizer
from upit_merge.models.tokenizer_files import copy_generation_config, copy_tokenizer_files
from upit_merge.output.identity import file_states
from upit_merge.output.staging import (
    check_not_half_edited,
    check_output_exists,
    check_output_is_free,
    staged_output,
)
from upit_merge.report.document import read_report
from upit_merge.report.expert_card import expert_card
from upit_merge.report.next_steps import held_out_beside, seed_data_of, tell_next
from upit_merge.resizing.extracting import ExtractedModel
from upit_merge.runtime.parallel import map_in_order, progress_bar

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ExtractOptions:
    """How a dense model is written.

    Args:
        max_shard_bytes: Upper bound of a file.
        quiet: No progress bar, no table.
    """

    max_shard_bytes: int = 5_000_000_000
    quiet: bool = False


def extract_expert(
    out: Path, dense: Path, experts: Sequence[int], options: ExtractOptions, *, average: bool
) -> None:
    """Write what the MoE folder `out` computes if every token goes through one expert.

    That is a dense model of a family that such a mixture is made from, see `ExtractedModel`, with
    the mixture's tokenizer, chat template and generation settings.

    Args:
        dense: The folder to write; must be empty, or not exist.
        experts: Their numbers: one, or those whose mean it is.
        average: Take the mean; of all if none is named.

    Raises:
        UpitError: `out` is no MoE folder or has no such expert, no dense model computes what one
            of its experts does, or `dense` is not free.
    """
    check_output_exists(out)
    check_not_half_edited(out)
    check_output_is_free(dense, overwrite=None, outside=out)  # before anything is read
    with explained_failures(dense), opened_mixture(out, str(out)) as moe:
        architecture = inspect_mixture(moe)
        chosen = _chosen(out, experts, architecture.num_experts, average=average)
        model = ExtractedModel(moe, architecture, chosen)
        identity = {
            "extract": file_states(moe.files(), ""),
            "experts": list(chosen),
            "--out-shard-size": options.max_shard_bytes,
        }
        with staged_output(dense, identity, overwrite=None, outside=out) as staging:
            if not staging.is_moving:
                _write(staging.model, model, moe, out, dense, chosen, options)
    if options.quiet:
        return
    kind = model.family.title
    print(f"{_told(chosen, architecture.num_experts)} of {out} is in {dense}, a dense {kind}.")
    mixture, expert = argument(out), argument(dense)
    held_out = held_out_beside(seed_data_of(out))
    tell_next(
        (
            "compare the two",
            f"upit-merge evaluate {mixture} --data {held_out} --against {expert}",
        ),
        ("make it an expert of another mixture", f"upit-merge extend OTHER --model {expert}"),
    )


def _chosen(out: Path, experts: Sequence[int], count: int, *, average: bool) -> list[int]:
    """Return whose mean is wanted.

    Raises:
        UpitError: no expert is named, or one that is not there; or several, but not their mean.
    """
    for number in experts:
        if number >= count:
            raise UpitError(
                f"{out} has {counted(count, 'expert')}, numbered from 0 to {count - 1}, so that "
                f"--expert {number} names none."
            )
        if experts.count(number) > 1:
            raise UpitError(f"--expert {number} is given twice; name every expert once.")
    if not experts and not average:
        raise UpitError("Give --expert N, which one to extract, or --average for the mean of all.")
    if len(experts) > 1 and not average:
        raise UpitError(
            f"--expert is given {len(experts)} times; add --average to extract their mean, or "
            "extract one after the other."
        )
    return sorted(experts) or [*range(count)]


def _told(chosen: Sequence[int], count: int) -> str:
    if len(chosen) == 1:
        return f"Expert {chosen[0]}"
    if len(chosen) == count:
        return f"The mean of all {count} experts"
    return f"The mean of experts {', '.join(map(str, chosen[:-1]))} and {chosen[-1]}"


def _write(
    folder: Path,
    model: ExtractedModel,
    moe: PublishedMixture,
    out: Path,
    dense: Path,
    chosen: Sequence[int],
    options: ExtractOptions,
) -> None:
    """Write the model's files; `config.json`, without which nothing loads it, last."""
    shards = plan_shards([model.stored_specs()], options.max_shard_bytes)
    _write_weights(folder, shards, model, moe.label, quiet=options.quiet)
    if len(shards) > 1:
        write_json(folder / WEIGHT_INDEX, shard_index(shards))
    copy_generation_config(moe, (), folder)
    if has_tokenizer(out):
        copy_tokenizer_files(moe, folder)
    text = expert_card(
        dense.absolute().name,
        out.absolute().name,
        out,
        read_report(out),
        _told(chosen, model.num_experts),
        chosen,
        model.family.title,
    )
    (folder / "README.md").write_bytes(text.encode())
    write_json(folder / "config.json", model.config())


def _write_weights(
    folder: Path, shards: Sequence[Shard], model: ExtractedModel, label: str, *, quiet: bool
) -> None:
    """Write the tensors, block by block.

    Raises:
        UpitError: one has NaN or infinite values.
        ResumableError: they do not fit the disk.
    """
    total = sum(shard.num_bytes for shard in shards)
    check_space(folder, total, "the dense model")
    blocks = [
        (spec, start, stop)
        for shard in shards
        for spec in shard.parts
        for start, stop in row_blocks(spec, _BLOCK_ELEMENTS)
    ]
    with (
        ShardWriter(folder, shards) as writer,
        progress_bar(total, "writing", quiet=quiet) as bar,
    ):

        def write(block: tuple[TensorSpec, int, int]) -> int:
            spec, start, stop = block
            rows = model.rows(spec.name, start, stop)
            if not all_finite(rows):
                raise UpitError(
                    f"{label} has NaN or infinite weights in what becomes {spec.name}; use a "
                    "mixture from before its training diverged."
                )
            writer.write(spec.name, start, rows)
            return (stop - start) * spec.row_bytes

        for done in map_in_order(write, blocks, workers=2):
            bar.update(done)
