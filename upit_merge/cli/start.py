"""The commands one begins with: `init`, `split`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upit_merge.cli.options import PATH, command


@command(
    short_help="Write a recipe for what lies in a folder.",
    epilog="upit-merge init sft/\nupit-merge init . --base ./base --data seed.jsonl --yes",
)
@click.argument("folder", type=PATH)
@click.option(
    "--output",
    type=PATH,
    default="recipe.yml",
    show_default=True,
    help="The recipe's file.",
)
@click.option("--base", metavar="MODEL", help="The model before the fine-tuning.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="What becomes an expert, as in a recipe: a folder, a glob, an adapter; repeatable.",
)
@click.option("--data", help="What the router is fitted to: a file, a folder or a dataset id.")
@click.option("--no-data", is_flag=True, help="Leave the router out, whatever data there is.")
@click.option("--experts", type=click.IntRange(1, 1024), help="Experts per layer.")
@click.option("--experts-per-token", type=click.IntRange(1), help="Experts a token is routed to.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the output; the checkpoints' if not given.",
)
@click.option("--yes", is_flag=True, help="Ask nothing, take what would be offered.")
@click.option("--force", is_flag=True, help="Replace a recipe that is there.")
@click.option(
    "--lazy-unpickle", "allow_pickle", is_flag=True, help="Accept a checkpoint in .bin files."
)
@click.option("--quiet", is_flag=True, help="Print only what to do next.")
def init(folder: Path, output: Path, allow_pickle: bool, **values: Any) -> None:
    """Write a recipe for the checkpoints that lie in FOLDER or below.

    Base, checkpoints, adapters and data are found by what they are and say. On a terminal you are
    asked, and Enter takes what was found; elsewhere, what nothing says must be given as an option.
    """
    from upit_merge.commands.init import InitOptions, write_recipe
    from upit_merge.io.hub import OpenOptions

    options = InitOptions(**values, open=OpenOptions(allow_pickle=allow_pickle))
    write_recipe(folder, output, options)


@command(
    short_help="Divide data into train, seed and held-out files.",
    epilog="upit-merge split data.jsonl --out split/ --held-out 500 --group-by domain",
)
@click.argument("data", metavar="FILE")
@click.option(
    "--out", type=PATH, default="split", show_default=True, help="The folder of the files."
)
@click.option(
    "--seed-samples",
    metavar="N",
    help="Samples for the router: a number or a fraction; a tenth, up to 1,000, if not given.",
)
@click.option(
    "--held-out",
    metavar="N",
    help="Samples to measure with: a number or a fraction; a tenth, up to 1,000, if not given.",
)
@click.option(
    "--group-by", metavar="COLUMN", help="Give every file the same share of each value of it."
)
@click.option("--subset", help="Configuration name of a dataset id.")
@click.option("--split", default="train", show_default=True, help="Split of a dataset id.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace what an earlier split wrote.")
@click.option("--quiet", is_flag=True, help="No table, no advice.")
def split(
    data: str,
    out: Path,
    seed_samples: str | None,
    held_out: str | None,
    subset: str | None,
    split: str,
    **values: Any,
) -> None:
    """Divide FILE into train, seed and held-out files that have no sample in common.

    FILE is whatever `data` of a recipe may be: a jsonl, json, parquet, csv, tsv or txt file, a
    folder of them, or a dataset id. Rows keep all their columns and their order; those that say
    the same go into one file. Parquet files and datasets stay parquet, all else becomes jsonl; what
    is JSON already is written as it stands there.
    """
    from upit_merge.commands.split import SplitOptions, parse_amount, split_data
    from upit_merge.data.partition import DataSource

    options = SplitOptions(
        seed_samples=parse_amount("--seed-samples", seed_samples),
        held_out=parse_amount("--held-out", held_out),
        **values,
    )
    split_data(DataSource(data, subset, split), out, options)
