"""Tables and plot of what `merge.py` measured.

python benchmarks/merge_plot.py FILE.json [FILE.png]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

OURS, COPY, OLDER = "upit-merge", "copy", "upit-merge, older"
GB, MIB = 1e9, 2**20
AXES = {
    "experts": ("experts", "experts (4 checkpoints)"),
    "checkpoints": ("checkpoints", "checkpoints (16 experts)"),
    "size": ("parameters", "millions of parameters (4 checkpoints, 8 experts)"),
}


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def print(self) -> None:
        """For the terminal; its first column is text, the others numbers."""
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=180)).print(table)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Minimum / median / maximum."""
    three = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{value:,.{digits}f}" for value in three)


def round_tables(rounds: Sequence[dict[str, Any]]) -> list[Table]:
    kinds = list(rounds[0])
    quantities: list[tuple[str, str, float, int]] = [
        ("wall, s", "wall", 1, 2),
        ("CPU, s", "cpu", 1, 2),
        ("peak memory, MiB", "peak", MIB, 0),
        ("of it anonymous, MiB", "peak_anonymous", MIB, 0),
        ("after imports, MiB", "after_imports", MIB, 0),
    ]
    rows = []
    for kind in kinds:
        cells = [
            spread([found[kind][key] / unit for found in rounds], digits)
            for _title, key, unit, digits in quantities
        ]
        moved = [f"{rounds[0][kind][key] / GB:.3f}" for key in ("read", "written")]
        rows.append([kind, *cells, *moved])
    count = f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}"
    columns = ["", *(title for title, *_ in quantities), "read, GB", "written, GB"]
    jobs = Table(f"Minimum / median / maximum of {count}", columns, rows)
    pairs = [(OURS, COPY)]
    pairs += [(OLDER, COPY), (OLDER, OURS)] if OLDER in kinds else []
    pairs += [("mergekit", OURS)] if "mergekit" in kinds else []
    compared = quantities[:4]
    ratios = []
    for above, below in pairs:
        cells = [
            spread([found[above][key] / found[below][key] for found in rounds], 2)
            for _title, key, _unit, _digits in compared
        ]
        ratios.append([f"{above} / {below}", *cells])
    titles = ["ratio", *(title.split(",")[0] for title, *_ in compared)]
    tables = [jobs, Table("Ratios, round by round", titles, ratios)]
    stages = [found[OURS]["stages"] for found in rounds]
    parts = [[name, spread([stage[name] for stage in stages], 2)] for name in stages[0]]
    return [*tables, Table("Stages of upit-merge", ["stage", "wall, s"], parts)]


def moved(job: dict[str, Any]) -> float:
    """Bytes read and written, in GB."""
    return (job["read"] + job["written"]) / GB


def measured_points(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["points"] if "skipped" not in row]


def on_curve(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The measured points of a curve, in its order."""
    points = result["curves"][name]
    return [
        row
        for point in points
        for row in measured_points(result)
        if all(row[key] == value for key, value in point.items())
    ]


def fitted(result: dict[str, Any], kind: str, names: Sequence[str]) -> list[str]:
    """Seconds per GB, seconds at none, R²: wall over bytes written, through points of some curves."""
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += [row for row in on_curve(result, name) if row not in rows]
    if len(rows) < 3:
        return ["too few points", "", ""]
    x, y = [row[kind]["written"] / GB for row in rows], [row[kind]["wall"] for row in rows]
    line = statistics.linear_regression(x, y)
    r_squared = statistics.correlation(x, y) ** 2
    return [f"{line.slope:.3f}", f"{line.intercept:.2f}", f"{r_squared:.4f}"]


def curve_tables(result: dict[str, Any]) -> list[Table]:
    columns = [
        "parameters, millions", "checkpoints", "experts", "read + written, GB", "wall, s",
        "CPU, s", "copy, s", "wall / copy", "peak, MiB", "bound, MiB", "peak / bound",
        "largest tensor, MiB", "all files fit the page cache",
    ]  # fmt: skip
    order = sorted(
        result["points"], key=lambda p: (p["parameters"], p["checkpoints"], p["experts"])
    )
    rows = []
    for row in order:
        cells = [f"{row['parameters'] / 1e6:,.0f}", str(row["checkpoints"]), str(row["experts"])]
        if "skipped" in row:
            rows.append([*cells, f"skipped: {row['skipped']}", *[""] * (len(columns) - 4)])
            continue
        ours, copy = row[OURS], row[COPY]
        cells += [f"{moved(ours):.3f}"]
        cells += [f"{value:.2f}" for value in (ours["wall"], ours["cpu"], copy["wall"])]
        cells += [f"{ours['wall'] / copy['wall']:.2f}"]
        cells += [f"{value / MIB:,.0f}" for value in (ours["peak"], row["bound"])]
        cells += [f"{ours['peak'] / row['bound']:.2f}", f"{row['largest_tensor'] / MIB:,.1f}"]
        cached = row["inputs"] + ours["written"] < row["memory_available"]
        rows.append([*cells, "yes" if cached else "no"])
    tables = [Table("upit-merge as experts, checkpoints and models grow", columns, rows)]
    fits = [
        [f"{kind}, {' and '.join(names)}", *fitted(result, kind, names)]
        for kind in (OURS, COPY)
        for names in (("experts", "size"), ("experts",), ("size",))
    ]
    titles = ["curves", "s per GB", "s at 0 GB", "R²"]
    return [*tables, Table("Lines through wall over bytes written", titles, fits)]


def planning_tables(times: dict[str, dict[str, list[float]]]) -> list[Table]:
    rows = [
        [f"{n} experts", spread(found["plan"], 3), spread(found["lineage"], 4)]
        for n, found in times.items()
    ]
    few, many = times
    cells = [
        f"{statistics.median(times[many][key]) / statistics.median(times[few][key]):.3f}"
        for key in ("plan", "lineage")
    ]
    rows.append([f"{many} / {few}, of the medians", *cells])
    columns = ["", "similarity and lineage, s", "lineage alone, s"]
    return [Table("Planning, minimum / median / maximum", columns, rows)]


def report(result: dict[str, Any]) -> None:
    """Every table for the terminal, then all again as markdown."""
    tables: list[Table] = []
    makers: dict[str, Callable[[], list[Table]]] = {
        "rounds": lambda: round_tables(result["rounds"]),
        "points": lambda: curve_tables(result),
        "planning": lambda: planning_tables(result["planning"]),
    }
    for key, make in makers.items():
        if result.get(key):
            tables += make()
    for table in tables:
        table.print()
    print(", ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    if result.get("rounds"):
        shape = f"hidden {result['shape']['hidden']}, {result['shape']['layers']} layers"
        print(f"Models of the rounds: {result['parameters']:,} parameters, {shape}, bfloat16")
    print()
    for table in tables:
        print(f"{table.title}:\n\n{table.markdown()}\n")


def draw(result: dict[str, Any], path: Path) -> None:
    """A column per curve: time above, memory below; a light card on any background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ink, ours, copy, bound = "#222222", "#1f5fa8", "#c8641b", "#777777"
    plt.rcParams |= {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": "#999999"}
    plt.rcParams |= {"xtick.color": ink, "ytick.color": ink, "font.size": 9}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), sharex="col", layout="constrained")
    figure.set_facecolor("#fafafa")
    for column, (name, (key, label)) in enumerate(AXES.items()):
        rows = on_curve(result, name)
        unit = 1e6 if name == "size" else 1
        x = [row[key] / unit for row in rows]
        time, memory = axes[0][column], axes[1][column]
        time.plot(x, [row[OURS]["wall"] for row in rows], "o-", color=ours, label="upit-merge")
        time.plot(
            x,
            [row[COPY]["wall"] for row in rows],
            "s--",
            color=copy,
            label="copy: inputs read, output's bytes written",
        )
        memory.plot(
            x, [row[OURS]["peak"] / 2**30 for row in rows], "o-", color=ours, label="upit-merge"
        )
        memory.plot(
            x,
            [row["bound"] / 2**30 for row in rows],
            ":",
            color=bound,
            label="1 GiB + 6 times the largest tensor",
        )
        memory.set_xlabel(label)
        memory.set_xticks(x, [f"{value:,.0f}" for value in x])
        for plot in (time, memory):
            plot.set_facecolor("#ffffff")
            plot.grid(color="#e4e4e4")
            plot.set_ylim(bottom=0)
            plot.spines[["top", "right"]].set_visible(False)
    for row, label in enumerate(("wall time, s", "peak resident memory, GiB")):
        axes[row][0].set_ylabel(label)
    entries = [axes[row][0].get_legend_handles_labels() for row in (0, 1)]
    named = {label: handle for found in entries for handle, label in zip(*found, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160, facecolor=figure.get_facecolor())
    plt.close(figure)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    result = json.loads(Path(sys.argv[1]).read_text())
    report(result)
    if len(sys.argv) == 3:
        draw(result, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
