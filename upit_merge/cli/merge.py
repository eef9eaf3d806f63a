"""The commands that take a recipe: `run`, `plan`, `verify`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from upit_merge.cli.options import PATH, command, merge_options, parse_merge_options
from upit_merge.errors import argument

# Of mergekit's options, what `plan` and `verify` have no use for, as they write nothing.
_WRITING = ("copy_tokenizer", "write_model_card", "safe_serialization")


def _teller(quiet: bool) -> Callable[[str], None]:
    return (lambda _line: None) if quiet else click.echo


@command(
    short_help="Make the mixture that a recipe describes.",
    merge_options=merge_options,
    epilog="upit-merge run recipes/upit-8x.yml out/ --cuda",
)
@click.argument("recipe", type=PATH)
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of upit-merge.")
def run(recipe: Path, out: Path, overwrite: bool, **values: Any) -> None:
    """Turn RECIPE into an MoE in the folder OUT, as `mergekit-yaml RECIPE OUT` does."""
    from upit_merge.commands.run import run_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.plugin.method import run_options

    options = run_options(parse_merge_options(values), overwrite=overwrite)
    parsed, source = load_recipe(recipe, _teller(options.quiet))
    run_recipe(parsed, source, out, options)


@command(
    short_help="Check a recipe; show its experts and what it needs.",
    merge_options=partial(merge_options, unused=_WRITING),
    epilog="upit-merge plan recipes/upit-8x.yml out/ --data seed.jsonl",
)
@click.argument("recipe", type=PATH)
@click.argument("out", type=PATH, required=False)
@click.option("--data", help="Find out on this data whether a mixture is worth its bytes.")
@click.option("--subset", help="Configuration name of --data, if that is a dataset id.")
@click.option("--split", help="Split of --data, if that is a dataset id; train if not given.")
@click.option("--group-by", metavar="COLUMN", help="Column of --data with the kind of text.")
def plan(
    recipe: Path,
    out: Path | None,
    data: str | None,
    subset: str | None,
    split: str | None,
    group_by: str | None,
    **values: Any,
) -> None:
    """Check RECIPE and its models and show what `run` would make and need; writes nothing.

    With the folder OUT, check also that the output would fit its disk. With --data, compute the
    loss of every sample under every checkpoint, and tell whether choosing among them is better than
    the best dense model that can be made of them: one of them, their average, or a scaled sum. The
    verdict is "Worth it", "Not worth it", with the recipe of mergekit that makes the dense model,
    or "Too few samples to tell", as it always is with fewer than 20.
    """
    from upit_merge.commands.plan import plan_recipe
    from upit_merge.config.recipe import load_recipe
    from upit_merge.config.router import OF_DATA
    from upit_merge.plugin.method import run_options
    from upit_merge.report.next_steps import (
        code_words,
        data_words,
        free_folder,
        steps_after_plan,
        tell_next,
    )

    options = run_options(parse_merge_options(values))
    parsed, _source = load_recipe(recipe, _teller(options.quiet))
    of_data = {"subset": subset, "split": split}
    found = plan_recipe(parsed, options, out, data, **of_data, group_by=group_by)
    if not options.quiet:
        code = code_words(options.open)
        making = f"{argument(recipe)} {argument(out or free_folder('out'))}{code}"
        given = {"data": data, **of_data, "group-by": group_by}
        words = " ".join(f"--{name} {argument(value)}" for name, value in given.items() if value)
        if data is None and parsed.router is not None and parsed.router.data is not None:
            words = data_words(parsed.router, OF_DATA)
        asking = f"{argument(recipe)} {words}{code}" if words else ""
        worth, dense = (found.worth, found.recipe) if found else (None, None)
        tell_next(*steps_after_plan(making, asking, worth, dense))


@command(
    short_help="Compute a mixture again and compare every byte.",
    merge_options=partial(merge_options, unused=(*_WRITING, "out_shard_size", "random_seed")),
    epilog="upit-merge verify out/",
)
@click.argument("out", type=PATH)
@click.option("--recipe", type=PATH, help="The recipe, if it is not in OUT.")
@click.option("--gates", is_flag=True, help="Train the gates again too, from the seed data.")
def verify(out: Path, recipe: Path | None, gates: bool, **values: Any) -> None:
    """Compute again what OUT should be, from its recipe and the models, and compare every byte.

    Start it in the folder in which the recipe was run, where its paths lead to the models.
    """
    from upit_merge.commands.verify import verify_output
    from upit_merge.plugin.method import run_options

    verify_output(out, recipe, run_options(parse_merge_options(values)), gates=gates)
