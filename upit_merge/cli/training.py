"""The commands that train: `finetune`, `pipeline`, `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from upit_merge.cli.options import FILE, PATH, command


@command(
    short_help="Train a dense model, or a finished mixture.",
    epilog="upit-merge finetune prepare.yml\naccelerate launch -m upit_merge finetune post-train.yml",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def finetune(config: Path, overrides: tuple[str, ...], quiet: bool) -> None:
    """Train a dense model, whose checkpoints become experts, or a finished mixture (TRL).

    CONFIG is YAML with the keys of `trl sft --config`, each of which may also be given as --KEY
    VALUE, and three of ours: data (read as a router's is), train_modules (all, ffn or router) and
    keep_checkpoints. A mixture's routing is logged, and it is written under the names it had. A
    run that was cut off goes on when it is started again. Needs `pip install "upit-merge[train]"`.
    """
    from upit_merge.training.settings import check_trl

    check_trl()
    from upit_merge.training import finetune as training
    from upit_merge.training.parent import die_with_parent

    die_with_parent()

    training.finetune(config, overrides, quiet=quiet)


@command(
    short_help="All stages, from a dense model to a trained mixture.",
    epilog="upit-merge pipeline pipeline.yml",
)
@click.argument("config", type=FILE)
@click.option("--redo", metavar="STAGE", help="Do this stage, and what follows it, again.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--quiet", is_flag=True, help="No progress bars, no tables.")
def pipeline(config: Path, redo: str | None, until: str | None, quiet: bool) -> None:
    """Go from a dense model to a trained mixture, in the stages that CONFIG describes.

    prepare (fine-tune the dense model), merge (grow experts, train their router), post_train
    (train the mixture), baseline (the dense model on the same tokens, to compare) and evaluate.
    Stages that are done are skipped, one that was cut off goes on. Training needs `pip install
    "upit-merge[train]"`.
    """
    from upit_merge.pipeline.run import run_pipeline

    run_pipeline(config, redo=redo, until=until, quiet=quiet)


@command(
    short_help="Small models, trained, merged and measured here.", epilog="upit-merge demo demo/"
)
@click.argument("folder", type=PATH)
@click.option("--all-stages", is_flag=True, help="With training before and after the merge.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(folder: Path, all_stages: bool, seed: int, quiet: bool) -> None:
    """Train small models on text that is on this machine, merge them, and measure the result."""
    from upit_merge.demo.run import run_demo
    from upit_merge.demo.stages import run_all_stages

    (run_all_stages if all_stages else run_demo)(folder, seed=seed, quiet=quiet)
