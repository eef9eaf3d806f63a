"""The commands that change, cut up or measure a mixture: from `router` to `page`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upit_merge.cli.options import (
    FILE,
    PATH,
    ShardSize,
    command,
    common_options,
    data_options,
    gate_options,
    setting_options,
)


@command(
    short_help="Train the gates of a mixture anew.",
    setting_options=setting_options,
    epilog="upit-merge router out/ --data seed.jsonl --objective ridge",
)
@click.argument("out", type=PATH)
@common_options()
def router(out: Path, common: dict[str, Any], **settings: Any) -> None:
    """Train the gates of the MoE in the folder OUT, which is changed in place."""
    from upit_merge.commands.options import MixtureOptions
    from upit_merge.commands.router import parse_settings, train_router

    train_router(out, parse_settings(settings), MixtureOptions(**common))


@command(
    short_help="Add a dense model as one more expert.",
    setting_options=gate_options,
    epilog="upit-merge extend out/ --model sft-law/checkpoint-900 --data law.jsonl",
)
@click.argument("out", type=PATH)
@click.option(
    "--model", required=True, help="The dense checkpoint: a folder, a Hub id, or BASE+ADAPTER."
)
@click.option(
    "--all-gates", is_flag=True, help="Fit the gates of all experts, not only the new one's."
)
@common_options("max_shard_bytes", "allow_pickle")
def extend(out: Path, model: str, all_gates: bool, common: dict[str, Any], **settings: Any) -> None:
    """Add the FFN of a dense checkpoint as one more expert to the MoE in the folder OUT.

    The experts that are there keep their bytes, and the other gates stay as they are, unless
    --all-gates is given. Without --data, what the gates were trained on is used. After Nexus
    (arXiv 2408.15901).
    """
    from upit_merge.commands.extend import extend_output, with_recorded_data
    from upit_merge.commands.options import ResizeOptions
    from upit_merge.commands.router import parse_settings

    parsed = parse_settings(with_recorded_data(settings, out))
    extend_output(out, model, parsed, ResizeOptions(**common), all_gates=all_gates)


@command(
    short_help="Merge or drop experts until few are left.",
    setting_options=data_options,
    epilog="upit-merge shrink out/ --experts 4 --data seed.jsonl\n"
    "upit-merge shrink out/ --experts 6 --how drop --refit --data seed.jsonl",
)
@click.argument("out", type=PATH)
@click.option("--experts", type=click.IntRange(1), required=True, help="Experts per layer to keep.")
@click.option(
    "--how",
    type=click.Choice(["merge", "drop"]),
    default="merge",
    show_default=True,
    help="merge: into means of groups; drop: the experts that add least go.",
)
@click.option("--refit", is_flag=True, help="Fit the gates anew, to --data, as they were fitted.")
@common_options("max_shard_bytes")
def shrink(
    out: Path, experts: int, how: Any, refit: bool, common: dict[str, Any], **settings: Any
) -> None:
    """Leave fewer experts in the MoE in the folder OUT, which is changed in place.

    Layer by layer, on the tokens of --data. With --how merge those that the router uses least join
    the ones it judges alike (MC-SMoE, arXiv 2310.01334); for experts of one origin, as upcycled
    ones are: others would have to have their neurons aligned first, which is not done. With
    --how drop those go that add least to the tokens they get: by the mean of the router's weight
    times the norm of what the expert gives (REAP, arXiv 2510.13999). The others keep every byte,
    and so do their gates, unless --refit is given.
    """
    from upit_merge.commands.options import ResizeOptions
    from upit_merge.commands.router import parse_settings
    from upit_merge.commands.shrink import shrink_output

    parsed = parse_settings(settings)
    shrink_output(out, experts, parsed, ResizeOptions(**common), how=how, refit=refit)


@command(
    short_help="Write experts as a dense model.",
    epilog="upit-merge extract out/ --expert 2 expert-2/\n"
    "upit-merge extract out/ --average --expert 0 --expert 3 mean/",
)
@click.argument("out", type=PATH)
@click.argument("dense", type=PATH)
@click.option(
    "--expert",
    "experts",
    type=click.IntRange(0),
    multiple=True,
    help="Its number; repeatable with --average.",
)
@click.option("--average", is_flag=True, help="The mean of these experts, or of all.")
@click.option(
    "--out-shard-size", "max_shard_bytes", type=ShardSize(), default="5B", show_default=True
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def extract(
    out: Path, dense: Path, experts: tuple[int, ...], average: bool, **options: Any
) -> None:
    """Write an expert of the MoE in the folder OUT as a dense model into the folder DENSE.

    The dense model computes what the mixture does if every token goes through this expert: it has
    the mixture's attention, norms and embeddings, and its tokenizer. Any mixture in one of the
    formats will do, also one from elsewhere; tensors are read piece by piece.
    """
    from upit_merge.commands.extract import ExtractOptions, extract_expert

    extract_expert(out, dense, experts, ExtractOptions(**options), average=average)


@command(
    short_help="Measure a mixture on held-out data.",
    setting_options=data_options,
    epilog="upit-merge evaluate out/ --data held-out.jsonl --group-by domain --plot routing.png",
)
@click.argument("out", type=PATH)
@click.option("--group-by", metavar="COLUMN", help="Column of the data with the kind of text.")
@click.option("--json", type=FILE, help="Write all numbers to this file.")
@click.option("--plot", type=FILE, help="Write the routing heat map to this PNG file.")
@click.option("--card", is_flag=True, help="Put the results on the model card.")
@click.option("--no-experts", is_flag=True, help="Leave out the comparison with every expert.")
@click.option("--control", is_flag=True, help="Compare with gates fitted to shuffled buckets.")
@click.option(
    "--no-rivals",
    is_flag=True,
    help="Leave out the comparison with the dense models that can be made of the same checkpoints.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="Compare with another model, dense or a mixture, of the same vocabulary; repeatable.",
)
@common_options(quiet="No progress bars, no tables.")
def evaluate(
    out: Path,
    group_by: str | None,
    json: Path | None,
    plot: Path | None,
    card: bool,
    no_experts: bool,
    control: bool,
    no_rivals: bool,
    against: tuple[str, ...],
    common: dict[str, Any],
    **settings: Any,
) -> None:
    """Measure the MoE in the folder OUT on held-out data: perplexity, and what its router does.

    Layer by layer, so that it runs where the model does not fit. Nothing is changed but, with
    --card, the model card and the report. What was measured is kept in ~/.cache/upit-merge, or
    where UPIT_MERGE_CACHE says: the same command with --card or --json computes nothing again.
    """
    from upit_merge.commands.compare import Rival
    from upit_merge.commands.evaluate import EvaluateOptions, evaluate_output
    from upit_merge.commands.router import parse_settings

    options = EvaluateOptions(
        group_by=group_by,
        json=json,
        plot=plot,
        card=card,
        experts=not no_experts,
        control=control,
        rivals=not no_rivals,
        against=tuple(map(Rival.parse, against)),
        **common,
    )
    evaluate_output(out, parse_settings(settings), options)


@command(
    short_help="Write the model card anew, with samples.",
    epilog='upit-merge page out/ --recipe recipe.yml --sample "Why is the sky blue?"',
)
@click.argument("out", type=PATH)
@click.option("--force", is_flag=True, help="Replace a card that was edited by hand, too.")
@click.option("--recipe", type=PATH, help="Take the card: block of this recipe.")
@click.option(
    "--sample",
    "prompts",
    multiple=True,
    metavar="PROMPT",
    help="Let the model answer, and show it; repeatable. It is loaded whole for that.",
)
def page(out: Path, force: bool, recipe: Path | None, prompts: tuple[str, ...]) -> None:
    """Write README.md of the MoE in the folder OUT, and its pictures, anew from its report."""
    from upit_merge.commands.page import refresh_card

    refresh_card(out, replace_edited=force, recipe=recipe, prompts=prompts)
