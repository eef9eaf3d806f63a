"""The commands that show what a mixture does: `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upit_merge.cli.options import FILE, PATH, command, common_options, data_options


@command(
    short_help="Show where the router sends every token.",
    setting_options=data_options,
    epilog="upit-merge inspect out/ --data held-out.jsonl --group-by domain --html routing.html",
)
@click.argument("out", type=PATH)
@click.option("--html", type=FILE, help="Write the page to this file.")
@click.option("--json", type=FILE, help="Write all numbers to this file.")
@click.option("--group-by", metavar="COLUMN", help="Column of the data with the kind of text.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="How many tokens the page shows; the numbers are of all.",
)
@click.option("--force", is_flag=True, help="Replace a file that is no page of this command, too.")
@common_options(quiet="No progress bars, no table.")
def inspect(
    out: Path,
    html: Path | None,
    json: Path | None,
    group_by: str | None,
    tokens: int,
    force: bool,
    common: dict[str, Any],
    **settings: Any,
) -> None:
    """Show where the router of the MoE in the folder OUT sends every token of --data.

    As a page that needs nothing but itself: the text coloured by expert, in every layer and over
    all of them; experts by kind of text; experts that are dead, rare or twins, and what to do.
    Layer by layer, so that it runs where the model does not fit. OUT is not changed.
    """
    from upit_merge.commands.inspect import InspectOptions, inspect_output
    from upit_merge.commands.router import parse_settings

    options = InspectOptions(
        group_by=group_by, html=html, json=json, tokens=tokens, force=force, **common
    )
    inspect_output(out, parse_settings(settings), options)
