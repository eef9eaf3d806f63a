"""Tables of benchmarks.paper, for the terminal and for benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, mean

from benchmarks.merge_plot import Table
from benchmarks.paper.arms import DENSE, GROUPS
from benchmarks.paper.plot import draw
from benchmarks.paper.results import Results, exact_match_percent, spread
from benchmarks.paper.verdicts import OURS, PAPER, Claim, verdicts
from upit_merge.errors import UpitError
from upit_merge.io.text_file import replace_text

TITLES = {
    "main": "Equal data",
    "ablations": "UpIT, with one thing changed",
    "experts": "More and fewer experts",
    "data": "Less data, in all stages",
    "mixed": "After a well-mixed stage 1",
}


def arm_tables(results: Results) -> list[Table]:
    """A row per arm; one table per group."""
    tables = []
    for group, arms in GROUPS.items():
        names = [arm.name for arm in arms if arm.name in results.arms]
        if not names:
            continue
        domains = results.arms[names[0]][0]["domains"]
        columns = ["", "mean", *domains, "against dense 2 + 2, %", "exact match, %", "before"]
        rows = [arm_row(results, name, len(domains)) for name in names]
        tables.append(Table(f"{TITLES[group]}: held-out perplexity", columns, rows))
    return tables


def arm_row(results: Results, name: str, domains: int) -> list[str]:
    per_domain = [
        f"{mean(result['perplexity'][index] for result in results.arms[name]):.2f}"
        for index in range(domains)
    ]
    against = "" if DENSE not in results.arms else results.perplexity_change(name, DENSE)
    return [
        name,
        spread(results.values(name)),
        *per_domain,
        spread(against, sign="+") if against and name != DENSE else "",
        spread(results.values(name, exact_match_percent), 1),
        f"{mean(geometric_mean(result['before']) for result in results.arms[name]):.2f}",
    ]


def cost_table(results: Results) -> Table:
    """What every arm is and costs: parameters, routing after training, seconds of one core."""
    rows = []
    for name, found in results.arms.items():
        millions = [found[0]["parameters"][key] / 1e6 for key in ("total", "active")]
        cells = [f"{value:.2f}" for value in millions]
        for key in ("token", "load", "dead"):
            values = [result["routing"][key] for result in found if "routing" in result]
            cells.append(f"{mean(values):.2f}" if values else "")
        cells += [
            f"{mean(result[key] for result in found):.0f}" for key in ("training", "cpu_seconds")
        ]
        rows.append([name, *cells])
    columns = [
        "",
        "parameters, millions",
        "active",
        "entropy of a token's routing",
        "… of the load",
        "dead experts",
        "training, s",
        "CPU, s",
    ]  # fmt: skip
    return Table("Size, routing after training, and cost", columns, rows)


def checkpoint_tables(results: Results) -> list[Table]:
    """Do the checkpoints specialise? Perplexity of each on each domain."""
    tables = []
    for name, found in results.stages.items():
        rows = []
        for number in range(len(found[0]["checkpoints"])):
            values = [result["checkpoints"][number] for result in found]
            cells = [f"{mean(column):.2f}" for column in zip(*values, strict=True)]
            every = mean(geometric_mean(value) for value in values)
            rows.append([f"checkpoint {number + 1}", *cells, f"{every:.2f}"])
        columns = ["", *found[0]["domains"], "mean"]
        tables.append(Table(f"Checkpoints of {name}: held-out perplexity", columns, rows))
    return tables


def verdict_table(title: str, claims: Sequence[Claim], results: Results) -> Table:
    rows = [
        [
            verdict.claim.text,
            verdict.word,
            spread(verdict.perplexity, sign="+"),
            " / ".join(f"{value:+.2f}" for value in verdict.perplexity),
            spread(verdict.exact_match, 1, "+"),
        ]
        for verdict in verdicts(claims, results)
    ]
    columns = ["", "verdict", "perplexity, %", "by seed", "exact match, points"]
    return Table(title, columns, rows)


def all_tables(results: Results) -> list[Table]:
    tables = [
        verdict_table("What the paper claims", PAPER, results),
        verdict_table("Our defaults, and further controls", OURS, results),
        *arm_tables(results),
        *checkpoint_tables(results),
        cost_table(results),
    ]
    return [table for table in tables if table.rows]


def print_tables(results: Results, tables: Sequence[Table]) -> None:
    for table in tables:
        if table.rows:
            table.print()
    every = [*results.bases, *(r for found in results.stages.values() for r in found)]
    every += [result for found in results.arms.values() for result in found]
    seconds = [sum(result[key] for result in every) for key in ("seconds", "cpu_seconds")]
    print(f"{len(every)} jobs, {seconds[0]:,.0f} s, of which {seconds[1]:,.0f} s of a core")


def write_section(results: Results, tables: Sequence[Table], folder: Path) -> None:
    """Replace what is between the marks in README.md, and draw the plot.

    Raises:
        UpitError: README.md has no marks.
    """
    replace_section(folder / "README.md", "benchmarks.paper", tables)
    draw(results, folder / "paper.png")


def replace_section(path: Path, name: str, tables: Sequence[Table]) -> None:
    """Replace what is between a benchmark's marks in a page.

    Raises:
        UpitError: it has no marks.
    """
    begin, end = marks(name)
    before, begun, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise UpitError(f"{path} does not have the lines {begin} and {end}; add them.")
    parts = [f"{table.title}:\n\n{table.markdown()}" for table in tables if table.rows]
    text = "\n\n".join(["", *parts, ""])
    replace_text(path, f"{before}{begun}{text}{ended}{after}")


def marks(name: str) -> tuple[str, str]:
    """Return the lines around what a benchmark writes."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
