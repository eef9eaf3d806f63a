"""The commands one begins with: `init`, `split`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upit_merge.cli.options import PATH, command


@command(epilog="upit-merge split data.jsonl --out split/ --held-out 500 --group-by domain")
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
@click.option("--force", is_flag=True, help="Replace files of those names.")
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
    the same go into one file. Parquet files and datasets stay parquet, all else becomes jsonl.
    """
    from upit_merge.commands.split import SplitOptions, parse_amount, split_data
    from upit_merge.data.partition import DataSource

    options = SplitOptions(
        seed_samples=parse_amount("--seed-samples", seed_samples),
        held_out=parse_amount("--held-out", held_out),
        **values,
    )
    split_data(DataSource(data, subset, split), out, options)
