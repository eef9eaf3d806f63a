"""The pictures of a model page, PNG files beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from upit_merge.errors import first_line, one_line
from upit_merge.merge.similarity import cosine
from upit_merge.report.facts import Facts, Matrix
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
    """A picture: whether there is something to draw, and how."""

    is_wanted: Callable[[Facts], bool]
    draw: Callable[[Path, Facts], None]


def draw_pictures(folder: Path, facts: Facts) -> list[str]:
    """Write the pictures there is something to draw for; returns their names.

    One that cannot be drawn is left out with a warning: it must not end a finished job.
    """
    drawn = []
    for name, picture in _PICTURES.items():
        if not picture.is_wanted(facts):
            continue
        try:
            picture.draw(folder / name, facts)
            drawn.append(name)
        except Exception as error:  # matplotlib raises whatever fonts and caches make it raise
            (folder / name).unlink(missing_ok=True)
            reason = one_line(first_line(error))
            LOG.warning("The picture %s is left out of the model page (%s).", name, reason)
    return drawn


def expert_cosine(facts: Facts) -> Matrix | None:
    """Cosines of the experts' expected deltas after expansion; None where there was none."""
    gram = facts.lineage.expected_gram
    if gram is None or facts.is_copied or len(gram) < 2 or not has_tree(facts):
        return None
    found: Matrix = cosine(torch.tensor(gram, dtype=torch.float64)).tolist()
    return found


def has_similarity(facts: Facts) -> bool:
    """Whether deltas were compared: copies of a single model have none to speak of."""
    rows = facts.checkpoint_cosine
    return len(rows) > 1 and any(abs(v) < 1 for row in rows for v in row)


def draw_similarity(path: Path, facts: Facts) -> None:
    """Write the picture: cosines of the checkpoints' deltas and, beside them, of the experts'."""
    before, after = facts.checkpoint_cosine, expert_cosine(facts)
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


def _draw_evaluation(path: Path, facts: Facts) -> None:
    evaluation = facts.evaluation
    assert evaluation is not None
    kinds = [(name, group.routing) for name, group in evaluation.kinds.items()]
    draw_routing(path, kinds[:_MOST_KINDS], evaluation.by_layer)


def _has_history(facts: Facts) -> bool:
    return facts.post_training is not None and len(facts.post_training.history) > 1


def draw_post_training(path: Path, facts: Facts) -> None:
    """Write the picture: loss by step and, where recorded, the entropy of the routing."""
    assert facts.post_training is not None
    history = facts.post_training.history
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
    ROUTING: _Picture(lambda facts: facts.evaluation is not None, _draw_evaluation),
    POST_TRAINING: _Picture(_has_history, draw_post_training),
}
NAMES = tuple(_PICTURES)
