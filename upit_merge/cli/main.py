"""The `upit-merge` command line: parses, delegates, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upit_merge import __version__
from upit_merge.cli.options import (
    EvaluateCommand,
    ExtendCommand,
    LazyOptionsCommand,
    PlanCommand,
    RouterCommand,
    ShardSize,
    Verbatim,
    VerifyCommand,
    merge_options,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="upit-merge")
def main() -> None:
    """Grow the checkpoints of an instruction-tuning run into a mixture of experts (UpIT)."""


_RECIPE = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


@main.command(
    cls=LazyOptionsCommand,
    epilog="upit-merge run recipes/upit-8x.yml out/ --cuda",
)
@click.argument("recipe", type=_RECIPE)
@click.argument("out", type=_FOLDER)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of upit-merge.")
def run(recipe: Path, out: Path, overwrite: bool, **values: Any) -> None:
    """Turn RECIPE into an MoE in the folder OUT, as `mergekit-yaml RECIPE OUT` does."""
    from upit_merge.commands.run import run_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.plugin.method import run_options

    parsed, source = load_recipe(recipe)
    options = run_options(merge_options(values), overwrite=overwrite)
    run_recipe(parsed, source, out, options)


@main.command(cls=PlanCommand, epilog="upit-merge plan recipes/upit-8x.yml out/ --data seed.jsonl")
@click.argument("recipe", type=_RECIPE)
@click.argument("out", type=_FOLDER, required=False)
@click.option("--data", help="Find out on this seed data whether a router is worth it.")
def plan(recipe: Path, out: Path | None, data: str | None, **values: Any) -> None:
    """Check RECIPE and its models and show what `run` would make and need; writes nothing.

    With the folder OUT, check also that the output would fit its disk. With --data, compute the
    loss of every sample under every checkpoint, and tell what choosing among them could gain.
    """
    from upit_merge.commands.plan import plan_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.plugin.method import run_options

    parsed, _source = load_recipe(recipe)
    plan_recipe(parsed, run_options(merge_options(values)), out, data)


@main.command(cls=VerifyCommand, epilog="upit-merge verify out/")
@click.argument("out", type=_FOLDER)
@click.option("--recipe", type=_RECIPE, help="The recipe, if it is not in OUT.")
@click.option("--gates", is_flag=True, help="Train the gates again too, from the seed data.")
def verify(out: Path, recipe: Path | None, gates: bool, **values: Any) -> None:
    """Compute again what OUT should be, from its recipe and the models, and compare every byte.

    Start it in the folder in which the recipe was run, where its paths lead to the models.
    """
    from upit_merge.commands.verify import verify_output
    from upit_merge.plugin.method import run_options

    verify_output(out, recipe, run_options(merge_options(values)), gates=gates)


@main.command(
    cls=RouterCommand,
    epilog="upit-merge router out/ --data seed.jsonl --objective ridge",
)
@click.argument("out", type=_FOLDER)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no table.")
def router(
    out: Path, seed: int, device: str, trust_remote_code: bool, quiet: bool, **settings: Any
) -> None:
    """Train the gates of the MoE in the folder OUT, which is changed in place."""
    from upit_merge.commands.router import parse_settings, train_router

    train_router(
        out,
        parse_settings(settings),
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )


@main.command(
    cls=ExtendCommand,
    epilog="upit-merge extend out/ --model sft-law/checkpoint-900 --data law.jsonl",
)
@click.argument("out", type=_FOLDER)
@click.option(
    "--model", required=True, help="The dense checkpoint: a folder, a Hub id, or BASE+ADAPTER."
)
@click.option(
    "--all-gates", is_flag=True, help="Fit the gates of all experts, not only the new one's."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--out-shard-size", type=ShardSize(), default="5B", show_default=True)
@click.option("--lazy-unpickle", is_flag=True, help="Accept a checkpoint in .bin files.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no table.")
def extend(
    out: Path,
    model: str,
    all_gates: bool,
    seed: int,
    device: str,
    out_shard_size: int,
    lazy_unpickle: bool,
    trust_remote_code: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Add the FFN of a dense checkpoint as one more expert to the MoE in the folder OUT.

    The experts that are there keep their bytes, and the other gates stay as they are, unless
    --all-gates is given. Without --data, what the gates were trained on is used. After Nexus
    (arXiv 2408.15901).
    """
    from upit_merge.commands.extend import extend_output, with_recorded_data
    from upit_merge.commands.router import parse_settings
    from upit_merge.io.hub import OpenOptions
    from upit_merge.resizing.rewriting import ResizeOptions

    options = ResizeOptions(
        seed=seed,
        device=device,
        max_shard_bytes=out_shard_size,
        open=OpenOptions(allow_pickle=lazy_unpickle, trust_remote_code=trust_remote_code),
        quiet=quiet,
    )
    parsed = parse_settings(with_recorded_data(settings, out))
    extend_output(out, model, parsed, options, all_gates=all_gates)


@main.command(cls=EvaluateCommand, epilog="upit-merge shrink out/ --experts 4 --data seed.jsonl")
@click.argument("out", type=_FOLDER)
@click.option("--experts", type=click.IntRange(1), required=True, help="Experts per layer to keep.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--out-shard-size", type=ShardSize(), default="5B", show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no table.")
def shrink(
    out: Path,
    experts: int,
    seed: int,
    device: str,
    out_shard_size: int,
    trust_remote_code: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Merge experts of the MoE in the folder OUT, which is changed in place, until few are left.

    Which ones: those the router uses least join the ones it judges alike, layer by layer, on the
    tokens of --data. After MC-SMoE (arXiv 2310.01334); for experts of one origin, as upcycled ones
    are: others would have to have their neurons aligned first, which is not done.
    """
    from upit_merge.commands.router import parse_settings
    from upit_merge.commands.shrink import shrink_output
    from upit_merge.io.hub import OpenOptions
    from upit_merge.resizing.rewriting import ResizeOptions

    options = ResizeOptions(
        seed=seed,
        device=device,
        max_shard_bytes=out_shard_size,
        open=OpenOptions(trust_remote_code=trust_remote_code),
        quiet=quiet,
    )
    shrink_output(out, experts, parse_settings(settings), options)


@main.command(
    cls=EvaluateCommand,
    epilog="upit-merge evaluate out/ --data held-out.jsonl --group-by domain --plot routing.png",
)
@click.argument("out", type=_FOLDER)
@click.option("--group-by", metavar="COLUMN", help="Column of the data with the kind of text.")
@click.option("--json", "json_file", type=_FILE, help="Write all numbers to this file.")
@click.option("--plot", type=_FILE, help="Write the routing heat map to this PNG file.")
@click.option("--card", is_flag=True, help="Put the results on the model's page.")
@click.option("--no-experts", is_flag=True, help="Leave out the comparison with every expert.")
@click.option("--control", is_flag=True, help="Compare with gates fitted to shuffled buckets.")
@click.option(
    "--against",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="Compare with another model, dense or a mixture, of the same vocabulary; repeatable.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no tables.")
def evaluate(
    out: Path,
    group_by: str | None,
    json_file: Path | None,
    plot: Path | None,
    card: bool,
    no_experts: bool,
    control: bool,
    against: tuple[str, ...],
    seed: int,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure the MoE in the folder OUT on held-out data: perplexity, and what its router does.

    Layer by layer, so that it runs where the model does not fit. Nothing is changed but, with
    --card, the model's page and report.
    """
    from upit_merge.commands.compare import Rival
    from upit_merge.commands.evaluate import EvaluateOptions, evaluate_output
    from upit_merge.commands.router import parse_settings

    options = EvaluateOptions(
        group_by=group_by,
        json=json_file,
        plot=plot,
        card=card,
        experts=not no_experts,
        control=control,
        against=tuple(map(Rival.parse, against)),
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    evaluate_output(out, parse_settings(settings), options)


@main.command(cls=Verbatim, epilog="upit-merge page out/")
@click.argument("out", type=_FOLDER)
@click.option("--force", is_flag=True, help="Replace a page that was edited by hand, too.")
def page(out: Path, force: bool) -> None:
    """Write README.md of the MoE in the folder OUT, and its pictures, anew from its report."""
    from upit_merge.commands.page import refresh_card

    refresh_card(out, replace_edited=force)


@main.command(
    cls=Verbatim,
    epilog="upit-merge finetune prepare.yml\naccelerate launch -m upit_merge finetune post-train.yml",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("config", type=_FILE)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def finetune(config: Path, overrides: tuple[str, ...], quiet: bool) -> None:
    """Train a dense model, whose checkpoints become experts, or a finished mixture (TRL).

    CONFIG is YAML with the keys of `trl sft --config`, each of which may also be given as --KEY
    VALUE, and three of ours: data (a file), train_modules (all, ffn or router) and
    keep_checkpoints. A mixture's routing is logged, and it is written under the names it had. A
    run that was cut off goes on when it is started again. Needs `pip install 'upit-merge[train]'`.
    """
    from upit_merge.training.settings import check_trl

    check_trl()
    from upit_merge.training import finetune as training
    from upit_merge.training.parent import die_with_parent

    die_with_parent()

    training.finetune(config, overrides, quiet=quiet)


@main.command(cls=Verbatim, epilog="upit-merge pipeline pipeline.yml")
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


@main.command(cls=Verbatim, epilog="upit-merge demo demo/")
@click.argument("folder", type=_FOLDER)
@click.option("--all-stages", is_flag=True, help="With training before and after the merge.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(folder: Path, all_stages: bool, seed: int, quiet: bool) -> None:
    """Train small models on text that is on this machine, merge them, and measure the result."""
    from upit_merge.demo.run import run_demo
    from upit_merge.demo.stages import run_all_stages

    (run_all_stages if all_stages else run_demo)(folder, seed=seed, quiet=quiet)
