"""What `plan --data` finds out: would the mixture be worth its bytes?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from upit_merge.commands.preview import dense_models, planned_stage
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.merge.inputs import Inputs
from upit_merge.report.tables import best_in_bold
from upit_merge.router.assignment import sample_losses
from upit_merge.router.choice import best_choice
from upit_merge.router.control import loss_sweeps
from upit_merge.router.evaluation import Groups
from upit_merge.router.mergekit_models import MergekitModels, has_recipe, mergekit_recipe
from upit_merge.router.paired import FEWEST
from upit_merge.router.rivals import dense_rivals, exact_part
from upit_merge.router.router_gain import RouterGain, SampleLosses, measure_router_gain
from upit_merge.router.worth import Rival, Worth

# Sweeps that the dense models may take, beside those of the checkpoints' losses: with the reading,
# blending and judging of models they then cost half of what the losses do, measured as CPU time.
SHARE = 0.45
# Kinds of text that a table has room for.
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class Outlook:
    """Checkpoints on some samples, beside what else could be made of them.

    Attributes:
        labels: The checkpoints' names.
        losses: Of the checkpoints' FFNs on the mixture's backbone.
        worth: The best checkpoint for each sample beside dense models.
        one_mixture: These losses are those of the checkpoints themselves.
        recipe: The mergekit recipe of what is to be used instead, if that is made by one.
        unfit: Why there is none although it would be, in a sentence; or nothing.
    """

    labels: Sequence[str]
    losses: SampleLosses
    worth: Worth
    one_mixture: bool
    recipe: str | None
    unfit: str = ""

    @property
    def gain(self) -> RouterGain:
        """How much the checkpoints differ."""
        return measure_router_gain(self.losses)

    def table(self) -> Table:
        """Tabulate perplexities of all that was measured; the least of every column is bold."""
        groups, more = [*self._shown], len(self.worth.groups) - len(self._shown)
        told = f"; {more} smaller kinds of text are not shown" if more else ""
        table = Table(
            title="Perplexity on this data (lower is better), and how much lower the best "
            f"checkpoint per sample is{told}",
            title_justify="left",
        )
        table.add_column("model", overflow="fold")
        for column in ("perplexity", *groups, "best for samples", "choice is lower by", "samples"):
            table.add_column(column, justify="right")
        rows = [*self._rows()]
        values = [[math.inf if v is None else v for v in row.perplexities] for row in rows]
        for row, cells in zip(rows, best_in_bold(values, ".2f"), strict=True):
            shown = [Text("") if math.isinf(float(cell.plain)) else cell for cell in cells]
            if row.is_estimated:
                shown = [Text(f"≈ {cell.plain}", cell.style) for cell in shown]
            table.add_row(row.name, *shown, row.best_for, row.gain, row.samples)
        return table

    @property
    def _shown(self) -> Mapping[str, Sequence[int]]:
        """The groups that have a column, in their order."""
        groups = self.worth.groups
        largest = sorted(groups, key=lambda name: len(groups[name]), reverse=True)[:_MOST_COLUMNS]
        return {name: members for name, members in groups.items() if name in largest}

    def _rows(self) -> Iterator[_Row]:
        worth = self.worth
        best = torch.bincount(self.losses.means.argmin(1), minlength=len(self.labels)).tolist()
        singles = {int(r.facts["checkpoint"]): r for r in worth.rivals if r.kind == "single"}
        for index, label in enumerate(self.labels):
            name, rival = f"{index} {label}", singles.get(index)
            if self.one_mixture and rival is not None:
                yield self._row(rival, name, str(best[index]))
                continue
            beside = "" if self.one_mixture else ", its FFN on the shared backbone"
            ours = self._ffn_alone(index)
            yield _Row(f"{name}{beside}", ours, str(best[index]), "", "", self.losses.is_estimated)
            if rival is not None and not self.one_mixture:
                yield self._row(rival, f"{name}, as it is")
        for rival in worth.rivals:
            if rival.kind in ("base", "average", "sum"):
                yield self._row(rival)
        own = [worth.perplexity(), *(worth.perplexity(group=group) for group in self._shown)]
        yield _Row(
            "best checkpoint per sample, chosen by its other half",
            own,
            "",
            "",
            f"{worth.samples:,}",
        )
        for rival in worth.rivals:
            if rival.kind == "random":
                yield self._row(rival, "mixture with random gates")

    def _ffn_alone(self, index: int) -> list[float | None]:
        """Return perplexities on the samples that all numbers are of."""
        sums, counts = self.losses.sums[:, index].sum(1), self.losses.counts.sum(1)
        members = [torch.arange(len(sums)), *map(torch.tensor, self._shown.values())]
        known = [part[self.worth.ours[part].isfinite()] for part in members]
        return [
            math.exp(min(700.0, float(sums[m].sum() / counts[m].sum()))) if len(m) else None
            for m in known
        ]

    def _row(self, rival: Rival, name: str = "", best_for: str = "") -> _Row:
        worth = self.worth
        found = worth.gain(rival)
        values = [worth.perplexity(rival), *(worth.perplexity(rival, g) for g in self._shown)]
        margin = f" ± {found.share_error:.1%}" if math.isfinite(found.error) else ""
        return _Row(
            name or rival.name, values, best_for, f"{found.share:.1%}{margin}", f"{found.samples:,}"
        )

    def sentences(self) -> Iterator[str]:
        """Yield the verdict, and what else there is to say."""
        yield self.worth.verdict()
        if self.recipe is not None:
            yield f"The recipe that makes it, for mergekit-yaml:\n\n{self.recipe}"
        if self.unfit:
            yield self.unfit
        means = self.losses.means
        best = torch.bincount(means.argmin(1), minlength=len(self.labels))
        idle = [i for i, count in enumerate(best.tolist()) if count * len(best) < 0.1 * best.sum()]
        if idle and best.sum() >= FEWEST * len(best):
            yield (
                f"Hardly ever the best: checkpoint(s) {', '.join(map(str, idle))}. The router "
                "will hardly use them; leave them out, or take others."
            )


@dataclass(frozen=True)
class _Row:
    """A row of the table; `perplexities` are of all, then by group."""

    name: str
    perplexities: Sequence[float | None]
    best_for: str
    gain: str
    samples: str
    is_estimated: bool = False


def look_ahead(
    inputs: Inputs,
    seeds: SeedSet,
    settings: RouterSettings,
    device: torch.device,
    *,
    bytes_ours: int,
    quiet: bool,
) -> Outlook:
    """Compare the best checkpoint for each sample with the dense models of the same checkpoints.

    The dense models cost half of what the checkpoints' own losses do, at most.

    Args:
        bytes_ours: What the mixture will take on disk.

    Raises:
        UpitError: a loss is NaN or infinite.
    """
    models, count = dense_models(inputs), len(seeds.samples)
    quick = has_fast_bfloat16()
    with planned_stage(inputs, seeds, settings, device, quiet=quiet, quick=quick) as stage:
        losses = sample_losses(stage)
        allowance = SHARE * count * loss_sweeps(settings, stage.model.num_experts, count)
        # Of formats that need more experts than there are checkpoints, the last is there twice.
        losses = _of_checkpoints(losses, len(inputs.checkpoints))
        exact = exact_part(stage, losses, allowance / 2)
        kinds = Groups.of(seeds.samples).kinds
        ours = best_choice(exact, [*kinds.values()])
        known = ours.isfinite().nonzero().flatten().tolist()
        rivals = dense_rivals(
            models, stage, exact, known=known, allowance=allowance / (2 if losses.control else 1),
            random=len(inputs.checkpoints) > 1,
        )  # fmt: skip
    worth = Worth.of(
        ours,
        exact.counts.sum(1),
        rivals,
        kinds,
        bytes_ours=bytes_ours,
        bytes_dense=models.num_bytes,
        ours_kind="choice",
        given=count if losses.is_estimated else None,
    )
    recipe, unfit = None, ""
    if worth.outcome == "not_worth" and worth.advised is not None:
        named = MergekitModels.of(inputs.base, inputs.checkpoints)
        recipe = mergekit_recipe(worth.advised, named, inputs.dtype)
        unfit = named.unfit if has_recipe(worth.advised) else ""
    return Outlook(inputs.labels, losses, worth, models.one_mixture, recipe, unfit)


def _of_checkpoints(losses: SampleLosses, count: int) -> SampleLosses:
    control = losses.control and _of_checkpoints(losses.control, count)
    return SampleLosses(losses.sums[:, :count], losses.counts, losses.told, control)
