"""The plot of benchmarks.paper: a light card that reads on any background."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from benchmarks.paper.arms import ABLATIONS, DENSE, MAIN, UPIT, VANILLA
from benchmarks.paper.results import Results

INK, FAINT = "#222222", "#e4e4e4"
COLOURS = {UPIT: "#1f5fa8", VANILLA: "#c8641b", DENSE: "#666666", "random gates": "#3a8f5c"}
AGAINST = "held-out perplexity against dense 2 + 2, %"


def draw(results: Results, path: Path) -> None:
    """Perplexity of the arms; over post-training tokens; by the number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999"}
    settings |= {"xtick.color": INK, "ytick.color": INK, "font.size": "9"}
    with plt.rc_context(settings):
        figure = plt.figure(figsize=(12, 7), layout="constrained", facecolor="#fafafa")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
        draw_arms(figure.add_subplot(grid[:, 0]), results)
        draw_curves(figure.add_subplot(grid[0, 1]), results)
        draw_sizes(figure.add_subplot(grid[1, 1]), results)
        for axes in figure.axes:
            axes.set_facecolor("#ffffff")
            axes.grid(color=FAINT)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150, facecolor=figure.get_facecolor())
        plt.close(figure)


def draw_arms(axes: Any, results: Results) -> None:
    """A dot per seed, a bar at the mean; models that were not trained further are left out.

    Against an arm of the same seed: held-out text differs by seed, and with it perplexity.
    """
    axes.set_title(f"{AGAINST} (dot: seed, bar: mean)", fontsize=10, loc="left")
    if DENSE not in results.arms:
        return
    axes.axvline(0, color=COLOURS[DENSE], linewidth=1)
    names = [arm.name for arm in (*MAIN, *ABLATIONS) if arm.epochs and arm.name in results.arms]
    names.remove(DENSE)
    for height, name in enumerate(reversed(names)):
        values = results.perplexity_change(name, DENSE)
        colour = COLOURS.get(name, "#8a8a8a")
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.65, markersize=5)
        axes.plot([mean(values)], [height], "|", color=colour, markersize=16, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), list(reversed(names)))


def draw_curves(axes: Any, results: Results) -> None:
    """Perplexity on a part of the text, mean over the seeds, against tokens of post-training."""
    for name, colour in COLOURS.items():
        found = results.arms.get(name, [])
        if not found or "curve" not in found[0]:
            continue
        points = list(zip(*(result["curve"] for result in found), strict=True))
        share = [seeds[0][0] for seeds in points]
        values = [mean(geometric_mean(domains) for _, domains in seeds) for seeds in points]
        tokens = [part * found[0]["tokens"] / 1000 for part in share]
        axes.plot(tokens, values, "o-", color=colour, label=name, markersize=4)
    axes.set_xlabel("thousands of tokens of post-training")
    axes.set_ylabel("held-out perplexity")
    if axes.lines:
        axes.legend(frameon=False)


def draw_sizes(axes: Any, results: Results) -> None:
    """Against the number of experts; mean and range over the seeds."""
    if DENSE not in results.arms:
        return
    for name in (UPIT, VANILLA):
        arms = {4: f"{name}, 4 experts", 8: name, 16: f"{name}, 16 experts"}
        there = {count: arm for count, arm in arms.items() if arm in results.arms}
        values = [results.perplexity_change(arm, DENSE) for arm in there.values()]
        middle = [mean(value) for value in values]
        below = [m - min(v) for m, v in zip(middle, values, strict=True)]
        above = [max(v) - m for m, v in zip(middle, values, strict=True)]
        axes.errorbar(
            [count * (1.02 if name == UPIT else 0.98) for count in there],
            middle,
            yerr=[below, above],
            fmt="o-",
            color=COLOURS[name],
            label=name,
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 8, 16], ["4", "8", "16"])
    axes.set_xlim(3.6, 17.8)
    axes.minorticks_off()
    axes.set_xlabel("experts (bars: smallest and largest of the seeds)")
    axes.set_ylabel(AGAINST.replace(" against", "\nagainst"))
    axes.legend(frameon=False)
