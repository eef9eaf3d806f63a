"""The pictures of a model card, PNG files beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from upit_merge.errors import first_line, one_line
from upit_merge.merge.similarity import cosine
from upit_merge.report.document import Matrix, Report
from upit_merge.report.family_tree import draw_family_tree, has_tree
from upit_merge.report.figures import ACCENT, SECOND, figure, matrix_image, thinned
from upit_merge.report.heatmap import draw_routing

LOG = logging.getLogger(__name__)

TREE = "upit_experts.png"
SIMILARITY = "upit_similarity.png"
ROUTING = "upit_routing.png"
POST_TRAINING = "upit_post_training.png"

_MOST_NUMBERS = 8  # experts whose cosines are written into the cells
_MOST_KINDS = 24  # columns of the heat map


@dataclass(frozen=True)
class _Picture:
    """Tells whether there is something to draw, and draws it."""

    is_wanted: Callable[[Report], bool]
    draw: Callable[[Path, Report], None]


def draw_pictures(folder: Path, report: Report) -> list[str]:
    """Write the pictures there is something to draw for, and return their names.

    One that cannot be drawn is left out with a warning: it must not end a finished job.
    """
    drawn = []
    for name, picture in _PICTURES.items():
        if not picture.is_wanted(report):
            continue
        try:
            picture.draw(folder / name, report)
            drawn.append(name)
        except Exception as error:  # matplotlib raises whatever fonts and caches make it raise
            (folder / name).unlink(missing_ok=True)
            reason = one_line(first_line(error))
            LOG.warning("The picture %s is left out of the model card (%s).", name, reason)
    return drawn


def expert_cosine(report: Report) -> Matrix | None:
    """Return cosines of the experts' expected deltas; None if there was no expansion."""
    gram = report.lineage.expected_gram
    if gram is None or report.is_copied or len(gram) < 2 or not has_tree(report):
        return None
    cosines: Matrix = cosine(torch.tensor(gram, dtype=torch.float64)).tolist()
    return cosines


def has_similarity(report: Report) -> bool:
    """Tell whether deltas were compared: copies of a single model have none to speak of."""
    rows = report.checkpoint_cosine
    return len(rows) > 1 and any(abs(v) < 1 for row in rows for v in row)


def draw_similarity(path: Path, report: Report) -> None:
    """Write the picture: cosines of the checkpoints' deltas and, beside them, of the experts'."""
    before, after = report.checkpoint_cosine, expert_cosine(report)
    panels = [("checkpoints", before), *([("experts", after)] if after else [])]
    values = [value for _, matrix in panels for row in matrix for value in row]
    low = min(0.95, min(values))
    side = max(2.9, min(0.42 * max(len(matrix) for _, matrix in panels), 4.2))
    with figure(path, side * len(panels) + 1.0, side + 0.5) as drawn:
        for place, (name, matrix) in enumerate(panels, 1):
            axes = drawn.add_subplot(1, len(panels), place)
            numbers = ".2f" if len(matrix) <= _MOST_NUMBERS else ""
            image = matrix_image(axes, matrix, low, 1, numbers=numbers)
            axes.set(title=f"{len(matrix)} {name}", aspect="equal")
            for axis in (axes.xaxis, axes.yaxis):
                thinned(axis, [str(index) for index in range(len(matrix))], most=16)
        bar = drawn.colorbar(image, ax=drawn.axes, pad=0.02)
        bar.set_label("cosine of the deltas to the base")
        bar.outline.set_visible(False)


def _draw_evaluation(path: Path, report: Report) -> None:
    evaluation = report.evaluation
    assert evaluation is not None
    kinds = [(name, group.routing) for name, group in evaluation.kinds.items()]
    draw_routing(path, kinds[:_MOST_KINDS], evaluation.by_layer)


def _has_history(report: Report) -> bool:
    return report.post_training is not None and len(report.post_training.history) > 1


def draw_post_training(path: Path, report: Report) -> None:
    """Write the picture: loss by step and, where recorded, the entropy of the routing."""
    assert report.post_training is not None
    history = report.post_training.history
    entropies = [(p.step, p.routing_entropy) for p in history if p.routing_entropy is not None]
    panels = 1 + (len(entropies) > 1)
    with figure(path, 3.8 * panels + 0.4, 2.6) as drawn:
        loss = drawn.add_subplot(1, panels, 1)
        loss.plot([p.step for p in history], [p.loss for p in history], color=ACCENT)
        loss.set(title="loss, nats per token", xlabel="step")
        loss.grid(True)
        if panels == 2:
            entropy = drawn.add_subplot(1, panels, 2)
            entropy.plot(*zip(*entropies, strict=True), color=SECOND)
            entropy.set(title="entropy of the routing", xlabel="step")
            entropy.grid(True)


_PICTURES = {
    TREE: _Picture(has_tree, draw_family_tree),
    SIMILARITY: _Picture(has_similarity, draw_similarity),
    ROUTING: _Picture(lambda report: report.evaluation is not None, _draw_evaluation),
    POST_TRAINING: _Picture(_has_history, draw_post_training),
}
NAMES = tuple(_PICTURES)
