"""The merge stage beside a copy of the same bytes, beside mergekit, and as models grow.

    python benchmarks/merge.py --folder FOLDER --json merge.json
    python benchmarks/merge.py --folder FOLDER --rounds 0 --curves --json FILE.json --plot FILE.png

Made first, in FOLDER (kept, and taken again if the settings are the same): a bfloat16 Llama with
random weights and 4 checkpoints, each the one before it plus noise. Then, in turn, `--rounds`
times:

a. upit-merge: `run_recipe`, 4 checkpoints to 8 experts without a router. It flushes its output.
b. copy: every input file read once, as many bytes as (a) put into its output written once, to new
   files of the same sizes; 512 KiB at a time, flushed. (With 8 MiB at a time the
   kernel used took several times as long.) What is written is what was read; when all is read,
   the last piece again.
c. mergekit: `dare_linear` once per child, of two checkpoints each, then `mergekit-moe` with random
   gates over the 4 checkpoints and the 4 children. The MoE is flushed, the children need not be.

Each is a process of its own that imports everything, does the job on toy models (some modules are
imported only when they are needed), flushes what others wrote (`sync`), and then starts the clock.
Nothing is dropped from the page cache; where inputs and output do not fit the free memory together,
reading waits for the disk, and the table says so. CPU is user + system; peak memory is the kernel's
high-water mark of resident memory (VmHWM), imports included, as a user sees it. (Not `ru_maxrss`,
which a process inherits from the one that starts it.) "Of it anonymous" leaves out files that are
mapped into memory, sampled every 20 ms: mergekit maps its inputs, and their pages count as resident
while the kernel could drop them. Bytes are those that went through read and write calls; mapped
reads do not, so for mergekit they are what its jobs have to read.

`--older TREE`: the code in another work tree does (a) too, in the same rounds.

`--curves`: (a) and (b), `--repeats` times in turn and the median of each, per point: experts at 4
checkpoints, checkpoints at 16 experts, size at 4 checkpoints and 8 experts; a line through wall
seconds against bytes written; peak memory against 1 GiB + 6 × the largest tensor. Layers are added
first; beyond 40 the width doubles. And what `upit-merge plan` computes, for 8 and 64 experts, 5
times each in turn.

`python benchmarks/merge_plot.py FILE.json [FILE.png]` shows the tables and draws the plot again.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from merge_bench import Bench, Progress, bytes_to_move, mergekit_reads
from merge_jobs import (
    CHECKPOINTS,
    CROSSINGS,
    EXPERTS,
    ITEM,
    Shape,
    proc,
    shape_for,
)
from merge_plot import OLDER, draw, report

TOY = Shape(64, 1)


@dataclass(frozen=True)
class Point:
    """A place on a curve; `scale` multiplies the size of the models."""

    experts: int
    checkpoints: int
    scale: int


CURVES = {
    "experts": [Point(n, 4, 1) for n in (4, 8, 16, 32, 64)],
    "checkpoints": [Point(16, m, 1) for m in (2, 4, 8, 16)],
    "size": [Point(8, 4, scale) for scale in (1, 2, 4, 8)],
}


def measure_rounds(
    bench: Bench,
    shape: Shape,
    experts: int,
    rounds: int,
    kinds: list[str],
    save: Callable[[str, Any], None],
) -> None:
    """The jobs in turn."""
    family, with_mergekit = bench.folder / "models", "mergekit" in kinds
    output = shape.moe_bytes(experts) + len(CROSSINGS) * ITEM * shape.parameters
    if lack := bench.lacking(family, shape, CHECKPOINTS, output):
        raise click.ClickException(f"The disk of {bench.folder} lacks {lack / 1e9:.1f} GB.")
    job = {"family": family, "checkpoints": CHECKPOINTS, "experts": experts}
    bench.make_models("models", family, shape, CHECKPOINTS)
    measured = []
    for index in range(rounds):
        found: dict[str, Any] = {}
        for kind in kinds:
            files = found["upit-merge"]["files"] if kind == "copy" else None
            found[kind] = bench.run(f"round {index + 1}, {kind}", kind, files=files, **job)
        if with_mergekit:
            found["mergekit"]["read"] = mergekit_reads(shape)
            check_same_size(found["upit-merge"], found["mergekit"])
        measured.append(found)
        save("rounds", measured)


def check_same_size(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Both must have made an MoE of the same size; mergekit joins experts into larger tensors."""
    if ours["tensor_bytes"] != theirs["tensor_bytes"]:
        raise click.ClickException(
            f"The MoEs differ: upit-merge wrote {ours['tensor_bytes']:,} bytes of tensors, mergekit "
            f"{theirs['tensor_bytes']:,}."
        )


def measure_curves(
    bench: Bench, parameters: int, repeats: int, save: Callable[[str, Any], None]
) -> None:
    """Every point, then what planning takes; models are made per size and removed again."""
    measured: list[dict[str, Any]] = []
    for scale in sorted({point.scale for point in curve_points()}):
        shape = shape_for(parameters * scale)
        family = bench.folder / "curve-models"
        # The most checkpoints first: the other points then use some of them.
        points = [point for point in curve_points() if point.scale == scale]
        for point in sorted(points, key=lambda p: (-p.checkpoints, p.experts)):
            measured.append(measure_point(bench, family, shape, point, repeats))
            save("points", measured)
        if scale == 1:
            label = "planning"
            if bench.has_models(family, shape, CHECKPOINTS):
                planned = bench.run(label, label, family=family, checkpoints=CHECKPOINTS)
                save("planning", planned["times"])
            bench.progress.skip(label)
        shutil.rmtree(family, ignore_errors=True)


def measure_point(
    bench: Bench, family: Path, shape: Shape, point: Point, repeats: int
) -> dict[str, Any]:
    """Both jobs in turn; of each the run with the median time, and the highest peak."""
    largest = shape.largest_tensor
    row = asdict(point) | {
        "parameters": shape.parameters,
        "largest_tensor": largest,
        "bound": (1 << 30) + 6 * largest,
        "inputs": (point.checkpoints + 1) * ITEM * shape.parameters,
        "memory_available": proc("meminfo")["MemAvailable"] << 10,
    }
    labels = {kind: point_label(point, kind) for kind in ("upit-merge", "copy")}
    models = f"models of {point.scale} times the size"
    output = shape.moe_bytes(point.experts)
    if lack := bench.lacking(family, shape, point.checkpoints, output):
        row["skipped"] = f"the disk lacks {lack / 1e9:.1f} GB"
        click.echo(f"{point_label(point, 'skipped')}: {row['skipped']}")
        for label in (*labels.values(), models):
            bench.progress.skip(label)
        return row
    bench.make_models(models, family, shape, point.checkpoints)
    job = {"family": family, "checkpoints": point.checkpoints, "experts": point.experts}
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in labels}
    for repeat in range(repeats):
        for kind, label in labels.items():
            weight = bytes_to_move(kind, shape, point.checkpoints, point.experts)
            bench.progress.expect(label, kind, weight)
            files = runs["upit-merge"][repeat]["files"] if kind == "copy" else None
            runs[kind].append(bench.run(label, kind, files=files, **job))
    for kind, found in runs.items():
        found.sort(key=lambda run: run["wall"])
        row[kind] = found[len(found) // 2] | {"peak": max(run["peak"] for run in found)}
    return row


def curve_points() -> list[Point]:
    """Of all curves; some are on two."""
    return list(dict.fromkeys(point for points in CURVES.values() for point in points))


def point_label(point: Point, kind: str) -> str:
    size = f"{point.scale} times the size"
    return f"{size}, {point.checkpoints} checkpoints to {point.experts} experts, {kind}"


def expect_everything(
    progress: Progress,
    shape: Shape,
    experts: int,
    kinds: list[str],
    rounds: int,
    curve_parameters: int | None,
) -> None:
    """Tell what is to come, for the time left."""

    def expect(label: str, kind: str, of: Shape, checkpoints: int, experts: int) -> None:
        progress.expect(label, kind, bytes_to_move(kind, of, checkpoints, experts))

    if rounds:
        expect("models", "make", shape, CHECKPOINTS, EXPERTS)
    for index in range(rounds):
        for kind in kinds:
            expect(f"round {index + 1}, {kind}", kind, shape, CHECKPOINTS, experts)
    if curve_parameters is None:
        return
    expect("planning", "planning", shape_for(curve_parameters), CHECKPOINTS, EXPERTS)
    for point in sorted(curve_points(), key=lambda p: p.checkpoints):
        of = shape_for(curve_parameters * point.scale)
        expect(f"models of {point.scale} times the size", "make", of, point.checkpoints, 0)
        for kind in ("upit-merge", "copy"):
            expect(point_label(point, kind), kind, of, point.checkpoints, point.experts)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "mergekit", "transformers", "safetensors")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory": proc("meminfo")["MemTotal"] << 10,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--parameters", default=240_000_000, show_default=True, help="Of each model.")
@click.option("--rounds", default=3, show_default=True, help="0: only the curves.")
@click.option("--skip-mergekit", is_flag=True)
@click.option("--experts", default=EXPERTS, show_default=True, help="More only without mergekit.")
@click.option(
    "--older",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A work tree of another version of upit-merge, which takes part in the rounds.",
)
@click.option("--threads", type=int, help="Of torch; its default if not given.")
@click.option("--curves", is_flag=True)
@click.option(
    "--curve", "names", multiple=True, type=click.Choice(list(CURVES)), help="Only these."
)
@click.option("--repeats", default=1, show_default=True, help="Of every point of the curves.")
@click.option(
    "--curve-parameters", type=int, help="Of their smallest model; as --parameters if not given."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Everything measured.")
@click.option("--plot", type=click.Path(path_type=Path), help="A PNG of the curves.")
def main(
    folder: Path,
    parameters: int,
    rounds: int,
    skip_mergekit: bool,
    experts: int,
    older: Path | None,
    threads: int | None,
    curves: bool,
    names: tuple[str, ...],
    repeats: int,
    curve_parameters: int | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    if plot and not curves:
        raise click.UsageError("--plot draws the curves; give --curves too.")
    if experts != EXPERTS and not skip_mergekit:
        raise click.UsageError(f"mergekit makes {EXPERTS} experts here; give --skip-mergekit too.")
    for name in set(CURVES).difference(names or CURVES):
        CURVES[name] = []
    shape, bench = shape_for(parameters), Bench(folder, threads, older)
    of_curves = (curve_parameters or parameters) if curves else None
    kinds = ["upit-merge", "copy", *([OLDER] if older else [])]
    kinds += [] if skip_mergekit else ["mergekit"]
    result: dict[str, Any] = {
        "machine": machine(),
        "shape": asdict(shape),
        "parameters": shape.parameters,
        "curves": {name: [asdict(point) for point in points] for name, points in CURVES.items()},
    }

    def save(key: str, value: Any) -> None:
        result[key] = value
        if json_file:
            json_file.write_text(json.dumps(result, indent=1) + "\n")

    bench.make_models("toy models", bench.folder / "toy", TOY, CHECKPOINTS)
    expect_everything(bench.progress, shape, experts, kinds, rounds, of_curves)
    if rounds:
        measure_rounds(bench, shape, experts, rounds, kinds, save)
    if of_curves:
        measure_curves(bench, of_curves, repeats, save)
    report(result)
    if plot:
        draw(result, plot)


if __name__ == "__main__":
    main()
