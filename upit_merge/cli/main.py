"""The `upit-merge` command line: parses, delegates, prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from upit_merge import __version__
from upit_merge.cli.options import (
    DATA_SETTINGS,
    Command,
    common_options,
    gate_options,
    merge_options,
    parse_merge_options,
    setting_options,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="upit-merge")
def main() -> None:
    """Grow the checkpoints of an instruction-tuning run into a mixture of experts (UpIT)."""


main.command_class = Command  # of all below

_PATH = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)

_data_options = partial(setting_options, DATA_SETTINGS)
# Of mergekit's options, what `plan` and `verify` have no use for, as they write nothing.
_WRITING = ("copy_tokenizer", "write_model_card", "safe_serialization")


@main.command(merge_options=merge_options, epilog="upit-merge run recipes/upit-8x.yml out/ --cuda")
@click.argument("recipe", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of upit-merge.")
def run(recipe: Path, out: Path, overwrite: bool, **values: Any) -> None:
    """Turn RECIPE into an MoE in the folder OUT, as `mergekit-yaml RECIPE OUT` does."""
    from upit_merge.commands.run import run_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.plugin.method import run_options

    parsed, source = load_recipe(recipe)
    options = run_options(parse_merge_options(values), overwrite=overwrite)
    run_recipe(parsed, source, out, options)


@main.command(
    merge_options=partial(merge_options, unused=_WRITING),
    epilog="upit-merge plan recipes/upit-8x.yml out/ --data seed.jsonl",
)
@click.argument("recipe", type=_PATH)
@click.argument("out", type=_PATH, required=False)
@click.option("--data", help="Find out on this seed data whether a router is worth it.")
@click.option("--subset", help="Configuration name of --data, if that is a dataset id.")
@click.option("--split", help="Split of --data, if that is a dataset id; train if not given.")
def plan(
    recipe: Path,
    out: Path | None,
    data: str | None,
    subset: str | None,
    split: str | None,
    **values: Any,
) -> None:
    """Check RECIPE and its models and show what `run` would make and need; writes nothing.

    With the folder OUT, check also that the output would fit its disk. With --data, compute the
    loss of every sample under every checkpoint, and tell what choosing among them could gain.
    """
    from upit_merge.commands.plan import plan_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.plugin.method import run_options

    parsed, _source = load_recipe(recipe)
    options = run_options(parse_merge_options(values))
    plan_recipe(parsed, options, out, data, subset=subset, split=split)


@main.command(
    merge_options=partial(merge_options, unused=(*_WRITING, "out_shard_size", "random_seed")),
    epilog="upit-merge verify out/",
)
@click.argument("out", type=_PATH)
@click.option("--recipe", type=_PATH, help="The recipe, if it is not in OUT.")
@click.option("--gates", is_flag=True, help="Train the gates again too, from the seed data.")
def verify(out: Path, recipe: Path | None, gates: bool, **values: Any) -> None:
    """Compute again what OUT should be, from its recipe and the models, and compare every byte.

    Start it in the folder in which the recipe was run, where its paths lead to the models.
    """
    from upit_merge.commands.verify import verify_output
    from upit_merge.plugin.method import run_options

    verify_output(out, recipe, run_options(parse_merge_options(values)), gates=gates)


@main.command(
    setting_options=setting_options,
    epilog="upit-merge router out/ --data seed.jsonl --objective ridge",
)
@click.argument("out", type=_PATH)
@common_options()
def router(out: Path, common: dict[str, Any], **settings: Any) -> None:
    """Train the gates of the MoE in the folder OUT, which is changed in place."""
    from upit_merge.commands.options import MixtureOptions
    from upit_merge.commands.router import parse_settings, train_router

    train_router(out, parse_settings(settings), MixtureOptions(**common))


@main.command(
    setting_options=gate_options,
    epilog="upit-merge extend out/ --model sft-law/checkpoint-900 --data law.jsonl",
)
@click.argument("out", type=_PATH)
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


@main.command(
    setting_options=_data_options,
    epilog="upit-merge shrink out/ --experts 4 --data seed.jsonl",
)
@click.argument("out", type=_PATH)
@click.option("--experts", type=click.IntRange(1), required=True, help="Experts per layer to keep.")
@common_options("max_shard_bytes")
def shrink(out: Path, experts: int, common: dict[str, Any], **settings: Any) -> None:
    """Merge experts of the MoE in the folder OUT, which is changed in place, until few are left.

    Which ones: those the router uses least join the ones it judges alike, layer by layer, on the
    tokens of --data. After MC-SMoE (arXiv 2310.01334); for experts of one origin, as upcycled ones
    are: others would have to have their neurons aligned first, which is not done.
    """
    from upit_merge.commands.options import ResizeOptions
    from upit_merge.commands.router import parse_settings
    from upit_merge.commands.shrink import shrink_output

    shrink_output(out, experts, parse_settings(settings), ResizeOptions(**common))


@main.command(
    setting_options=_data_options,
    epilog="upit-merge evaluate out/ --data held-out.jsonl --group-by domain --plot routing.png",
)
@click.argument("out", type=_PATH)
@click.option("--group-by", metavar="COLUMN", help="Column of the data with the kind of text.")
@click.option("--json", type=_FILE, help="Write all numbers to this file.")
@click.option("--plot", type=_FILE, help="Write the routing heat map to this PNG file.")
@click.option("--card", is_flag=True, help="Put the results on the model card.")
@click.option("--no-experts", is_flag=True, help="Leave out the comparison with every expert.")
@click.option("--control", is_flag=True, help="Compare with gates fitted to shuffled buckets.")
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
    against: tuple[str, ...],
    common: dict[str, Any],
    **settings: Any,
) -> None:
    """Measure the MoE in the folder OUT on held-out data: perplexity, and what its router does.

    Layer by layer, so that it runs where the model does not fit. Nothing is changed but, with
    --card, the model card and the report.
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
        against=tuple(map(Rival.parse, against)),
        **common,
    )
    evaluate_output(out, parse_settings(settings), options)


@main.command(epilog="upit-merge page out/")
@click.argument("out", type=_PATH)
@click.option("--force", is_flag=True, help="Replace a card that was edited by hand, too.")
def page(out: Path, force: bool) -> None:
    """Write README.md of the MoE in the folder OUT, and its pictures, anew from its report."""
    from upit_merge.commands.page import refresh_card

    refresh_card(out, replace_edited=force)


@main.command(
    epilog="upit-merge finetune prepare.yml\naccelerate launch -m upit_merge finetune post-train.yml",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("config", type=_FILE)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def finetune(config: Path, overrides: tuple[str, ...], quiet: bool) -> None:
    """Train a dense model, whose checkpoints become experts, or a finished mixture (TRL).

    CONFIG is YAML with the keys of `trl sft --config`, each of which may also be given as --KEY
    VALUE, and three of ours: data (read as a router's is), train_modules (all, ffn or router) and
    keep_checkpoints. A mixture's routing is logged, and it is written under the names it had. A
    run that was cut off goes on when it is started again. Needs `pip install 'upit-merge[train]'`.
    """
    from upit_merge.training.settings import check_trl

    check_trl()
    from upit_merge.training import finetune as training
    from upit_merge.training.parent import die_with_parent

    die_with_parent()

    training.finetune(config, overrides, quiet=quiet)


@main.command(epilog="upit-merge pipeline pipeline.yml")
@click.argument("config", type=_FILE)
@click.option("--redo", metavar="STAGE", help="Do this stage, and what follows it, again.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--quiet", is_flag=True, help="No progress bars, no tables.")
def pipeline(config: Path, redo: str | None, until: str | None, quiet: bool) -> None:
    """Go from a dense model to a trained mixture, in the stages that CONFIG describes.

    prepare (fine-tune the dense model), merge (grow experts, train their router), post_train
    (train the mixture), baseline (the dense model on the same tokens, to compare) and evaluate.
    Stages that are done are skipped, one that was cut off goes on. Training needs `pip install
    'upit-merge[train]'`.
    """
    from upit_merge.pipeline.run import run_pipeline

    run_pipeline(config, redo=redo, until=until, quiet=quiet)


@main.command(epilog="upit-merge demo demo/")
@click.argument("folder", type=_PATH)
@click.option("--all-stages", is_flag=True, help="With training before and after the merge.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(folder: Path, all_stages: bool, seed: int, quiet: bool) -> None:
    """Train small models on text that is on this machine, merge them, and measure the result."""
    from upit_merge.demo.run import run_demo
    from upit_merge.demo.stages import run_all_stages

    (run_all_stages if all_stages else run_demo)(folder, seed=seed, quiet=quiet)
