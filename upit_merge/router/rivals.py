"""The losses of the dense models that a mixture has to beat, as far as there is time for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.gates import training_free_gates
from upit_merge.router.blends import BlendedModels, DenseModels, Weights
from upit_merge.router.control import Pair, control_pairs, control_size
from upit_merge.router.evaluation import run_mixture
from upit_merge.router.paired import FEWEST
from upit_merge.router.progress import Progress
from upit_merge.router.ration import POINTS, Ration, rationed
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival

# Samples whose losses are exact, where those of the rest are to first order.
_EXACT = 32
# The least and the largest multiple of it, and the largest scale, that is taken.
_LEAST_TIMES, _MOST_TIMES, _MOST_SCALE = 0.1, 4.0, 1.5
# A scale so near to the average's, by share, is the average; two so near to each other are one.
_SAME, _ALIKE = 0.1, 0.3
BASE = "the base"


def exact_part(stage: RouterStage, losses: SampleLosses, allowance: float) -> SampleLosses:
    """Return losses by halves; where all but a few are to first order, the exact ones alone.

    Args:
        allowance: Sweeps of one sample that may be spent on some more.

    Returns:
        Of all samples; infinite where no exact loss is known.
    """
    if losses.control is None:
        return losses
    samples, experts, _ = losses.sums.shape
    sums = torch.full((samples, experts, 2), math.inf, dtype=torch.float64)
    counts = torch.tensor([sample.halves for sample in stage.seeds.samples], dtype=torch.float64)
    size = control_size(samples)
    pairs = control_pairs(losses.means, stage.seed)
    members = sorted({sample for sample, _ in pairs})
    sums[torch.tensor(members)] = losses.control.sums
    per_sample = len(pairs) / max(1, len(members))
    more = min(_EXACT, samples, size + int(allowance / per_sample)) - size
    if more > 0:
        wanted: list[Pair] = control_pairs(losses.means, stage.seed, size + more)
        pairs = [pair for pair in wanted if pair[0] not in set(members)]
        found = stage.exact_losses(pairs, "more-exact")
        sample, expert = torch.tensor(pairs).T
        sums[sample, expert] = found.sums
    return SampleLosses(sums, counts, losses.told)


def spread(stage: RouterStage) -> list[int]:
    """Return all samples in an order of which every beginning has some of every kind of text."""
    generator = torch.Generator().manual_seed(stage.seed)
    shuffled = torch.randperm(len(stage.everything), generator=generator).tolist()
    seen: dict[object, int] = {}
    turn: dict[int, int] = {}
    for index in shuffled:
        label = stage.seeds.samples[index].label
        turn[index] = seen[label] = seen.get(label, 0) + 1
    return sorted(shuffled, key=turn.__getitem__)


def dense_rivals(
    models: DenseModels,
    stage: RouterStage,
    losses: SampleLosses | None,
    *,
    known: Sequence[int] | None = None,
    allowance: float = math.inf,
    random: bool = False,
) -> list[Rival]:
    """Measure the dense models that can be made of a mixture's checkpoints; nothing is written.

    The best scale of the sum is where a parabola through the losses of three has its least, on
    samples that the sum is then not judged on; with no end of time, each half of the samples
    chooses it for the other. Where the backbones are equal, `losses` has the
    checkpoints' already, and what is measured goes through the layers at the same time.

    Args:
        models: What they are made of.
        stage: Has the samples and the mixture, and says how it is computed.
        losses: Of the checkpoints' FFNs on the mixture's backbone, infinite where unknown, see
            `exact_part`; to first order they only say which are promising. None if no checkpoint
            is to be measured alone.
        known: Samples that the mixture's own losses are known of; all if not given.
        allowance: Sweeps of one sample through a dense model that may be spent.
        random: Try the stage's mixture with random gates, too.
    """
    count = len(models.checkpoints)
    blendable = count > 1 and models.fit(models.whole[1:])
    with_sum = blendable and models.fit(models.whole)
    singles = losses is not None and (not models.one_mixture or losses.is_estimated)
    order = spread(stage)
    ration = rationed(
        order,
        order if known is None else known,
        allowance,
        blends=blendable + with_sum,
        singles=singles,
        mixture=stage.effort.mixture if random else 0.0,
    )
    rivals = []
    chosen: list[int] = []
    if losses is not None and singles:
        chosen = _promising(losses, ration.singles)
    elif losses is not None:
        sums = losses.sums.sum(2)
        for index, model in enumerate(models.checkpoints):
            own = torch.where(sums[:, index].isfinite(), sums[:, index], torch.nan)
            rivals.append(Rival("single", _single_name(index, model.label), own, _of(index)))
    sums_of = int(with_sum) if ration.scale else 0
    work = _work(stage, ration, blends=blendable + sums_of, singles=len(chosen))
    shown = replace(stage, quiet=stage.quiet or not work)
    with shown.bar(work, "dense models to compare with") as bar:
        shown = replace(shown, shared=bar)
        rivals += _measured(models, shown, ration, chosen, blendable=blendable)
        bar.finish()
    return rivals


def _work(stage: RouterStage, ration: Ration, *, blends: int, singles: int) -> float:
    """Return this process's work for what is rationed, were all of it measured."""
    judged_on = ration.judged(blends)
    if ration.unlimited and ration.scale:
        # The average is one of the points; each half proposes a sum of its own.
        dense = (len(POINTS) + 2 + singles) * stage.work(stage.everything)
    elif ration.unlimited:
        dense = (blends + singles) * stage.work(stage.everything)
    else:
        dense = len(POINTS) * stage.work(ration.scale)
        dense += (blends + singles) * stage.work(judged_on)
    return (dense + stage.work(ration.random, mixture=True)) / stage.processes.size


def _measured(
    models: DenseModels,
    stage: RouterStage,
    ration: Ration,
    chosen: Sequence[int],
    *,
    blendable: bool,
) -> Iterator[Rival]:
    """Measure the chosen checkpoints alone, the blends and random gates, as far as is rationed."""
    measured = _Measured(models, stage)
    order = stage.everything
    average = torch.full((len(order),), torch.nan, dtype=torch.float64)
    scale = None
    crossed: list[Rival] = []
    if ration.scale and ration.unlimited:
        crossed = _cross_fitted(measured, ration.scale, len(order))
    elif ration.scale:
        scale, average = _best_scale(measured, ration.scale)
    blends = [models.average] * (blendable and not crossed)
    if scale is not None:
        blends.append(models.summed(scale))
    # An average that is worse on the samples of the scale decides nothing: a few are enough for it.
    few: list[int] = []
    if scale is not None:
        few = ration.left[: min(FEWEST, len(ration.judged(len(blends))))]
    judged_on = ration.judged(len(blends) - bool(few), spent=len(few))
    # A checkpoint that nothing was chosen by can be judged on all samples.
    alone = order if ration.unlimited else judged_on
    for index in chosen:
        (own,) = measured.losses([models.single(index)], alone, "single")
        name = _single_name(index, models.checkpoints[index].label)
        yield Rival("single", name, own, _of(index))
    found = measured.losses(blends[-1:] if few else blends, judged_on, "rivals")
    if few:
        found = measured.losses(blends[:1], sorted(few), "average") + found
    yield from crossed
    if blendable and not crossed:
        judged = found.pop(0)
        both = torch.where(judged.isfinite(), judged, average)
        yield Rival("average", "the average of the checkpoints", both)
    if scale is not None:
        yield _sum(scale, found.pop(0))
    if ration.random:
        yield random_gates(stage, ration.random)


def random_gates(stage: RouterStage, members: Sequence[int]) -> Rival:
    """Measure the stage's mixture with training-free gates on some samples."""
    model = stage.model
    gates = training_free_gates(
        model.moe, model.format, model.mixture_layers, model.num_experts, stage.seed
    )
    samples = [stage.seeds.samples[index] for index in members]
    part = replace(stage, seeds=replace(stage.seeds, samples=samples), progress=Progress())
    sums = torch.full((len(stage.everything),), torch.nan, dtype=torch.float64)
    sums[torch.tensor([*members])] = run_mixture(part, gates)[0]
    return Rival("random", "random gates", sums)


class _Measured:
    """Measures blends of models on samples of a stage."""

    def __init__(self, models: DenseModels, stage: RouterStage) -> None:
        self.models = models
        self._stage = stage
        samples = stage.seeds.samples
        self.targets = torch.tensor([s.num_targets for s in samples], dtype=torch.float64)

    def mean(self, sums: Tensor, members: Sequence[int]) -> float:
        """Return the mean loss over the targets of some samples, NaN if one is not known."""
        rows = torch.tensor([*members])
        return float(sums[rows].sum() / self.targets[rows].sum())

    def losses(self, blends: Sequence[Weights], members: Sequence[int], name: str) -> list[Tensor]:
        """Return every blend's losses, NaN of other samples and where they are not finite."""
        found = [torch.full_like(self.targets, torch.nan) for _ in blends]
        if not members or not blends:
            return found
        together = self.models.one_backbone
        sources = [[*range(len(blends))]] if together else [[i] for i in range(len(blends))]
        for number, part in enumerate(sources):
            source = BlendedModels(self.models, [blends[i] for i in part])
            old = self._stage.model
            model = LayerwiseMixture(source, old.device, old.arithmetic)
            stage = replace(self._stage, model=model, progress=Progress())
            pairs = [(s, e) for e in range(len(part)) for s in members]
            sums = stage.exact_losses(pairs, f"{name}-{number}", finite=False).sums.sum(1)
            sums = torch.where(sums.isfinite(), sums, torch.nan).view(len(part), len(members))
            for blend, row in zip(part, sums, strict=True):
                found[blend][torch.tensor([*members])] = row
        return found


def _best_scale(measured: _Measured, members: Sequence[int]) -> tuple[float | None, Tensor]:
    """Choose the scale of the sum of the deltas on some samples.

    Returns:
        It, 0 if the base is better than any sum, None if the average is as good as the best; and
        the average's losses on these samples.
    """
    models = measured.models
    count = len(models.checkpoints)
    points = [times / count for times in POINTS]
    sums = measured.losses([models.summed(scale) for scale in points], members, "scale")
    scale = _scale_on(measured, sums, members)
    return (None if _is_average(scale, count) else scale), sums[1]


def _scale_on(measured: _Measured, points: Sequence[Tensor], members: Sequence[int]) -> float:
    """Return the scale where the parabola through the points has its least on some samples."""
    count = len(measured.models.checkpoints)
    times = least_of_parabola([measured.mean(sums, members) for sums in points])
    times = min(times, _MOST_TIMES, _MOST_SCALE * count)
    # With less than a tenth of the average's deltas it is the base.
    return float(f"{times / count:.2g}") if times >= _LEAST_TIMES else 0.0


def _cross_fitted(measured: _Measured, half: Sequence[int], samples: int) -> list[Rival]:
    """Measure average and sum on all samples, each half with the scale that the other chose.

    What is measured serves both halves: the parabola's points, and what it says on either.

    Args:
        half: Samples of one half; the others are the other.

    Returns:
        The base, the average, and the sum unless it is as good as one of these; its `scale` is the
        mean of the two that it was judged with, `scale_a` and `scale_b`.
    """
    models = measured.models
    count = len(models.checkpoints)
    halves = [[*half], sorted(set(range(samples)) - set(half))]
    points = [times / count for times in POINTS]
    blends = [models.summed(scale) for scale in points]
    at_points = measured.losses(blends, range(samples), "scale")
    proposed = [_scale_on(measured, at_points, members) for members in halves]
    blends = [models.summed(scale) for scale in proposed]
    at_proposed = measured.losses(blends, range(samples), "best-scale")
    judged = torch.full_like(measured.targets, torch.nan)
    scales = []
    for number, members in enumerate(halves):
        # What the parabola says may be worse than its points.
        tried = [*zip(points, at_points, strict=True)]
        tried.append((proposed[number], at_proposed[number]))
        known = [found for found in tried if math.isfinite(measured.mean(found[1], members))]
        scale, sums = min(
            known, key=lambda found: measured.mean(found[1], members), default=tried[0]
        )
        scales.append(scale)
        others = torch.tensor(halves[1 - number])
        judged[others] = sums[others]
    rivals = [
        Rival("base", BASE, at_points[0]),
        Rival("average", "the average of the checkpoints", at_points[1]),
    ]
    if any(scales) and not all(_is_average(scale, count) for scale in scales):
        rivals.append(_sum(scales[0], judged, scales[1]))
    return rivals


def _is_average(scale: float, count: int) -> bool:
    return abs(scale * count - 1) < _SAME


def _sum(scale: float, sums: Tensor, other: float | None = None) -> Rival:
    """The base and a scaled sum, which is the base alone with a scale of 0.

    Args:
        other: The scale with which half of the samples were judged, if it was another one.
    """
    if not scale and other is None:
        return Rival("base", BASE, sums)
    facts, told = {"scale": scale}, f"{scale:.2g}"
    if other is not None:
        mean = float(f"{(scale + other) / 2:.2g}")
        facts = {"scale": mean, "scale_a": scale, "scale_b": other}
        low, high = sorted((scale, other))
        told = f"{mean:.2g}" if high - low <= _ALIKE * mean else f"{low:.2g} to {high:.2g}"
    return Rival("sum", f"base + {told} times the sum of the deltas", sums, facts)


def least_of_parabola(means: Sequence[float]) -> float:
    """Return where the parabola through the losses at 0, 1 and 2 has its least, at least 0.

    Where it has none, or a loss is NaN, the best of the three.
    """
    zero, one, two = means
    bend = (two - 2 * one + zero) / 2
    if not math.isfinite(bend) or bend <= 0:
        finite = [(mean, times) for mean, times in zip(means, POINTS, strict=True) if mean == mean]
        return min(finite, default=(0.0, 1.0))[1]
    return max(0.0, -(one - zero - bend) / (2 * bend))


def _promising(losses: SampleLosses, count: int) -> list[int]:
    """Return the experts with the lowest losses, on the samples that all are known of."""
    sums = losses.sums.sum(2)
    everyone = sums.isfinite().all(1)
    if not everyone.any():
        sums = torch.where(sums.isfinite(), sums, torch.nan).nanmean(0, keepdim=True)
        return sums[0].argsort(stable=True)[:count].tolist()
    return sorted(sums[everyone].sum(0).argsort(stable=True)[:count].tolist())


def _single_name(index: int, label: str) -> str:
    return f"checkpoint {index} ({label})"


def _of(index: int) -> dict[str, float]:
    return {"checkpoint": index}
