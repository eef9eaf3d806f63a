"""Whether checkpoints were saved in the middle of a learning-rate schedule, by their trainer's notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from upit_merge.io.trainer_state import TrainerState

# Of the peak's share: below it a rate counts as come to zero. Trainers log the rate that a step was
# taken with, so that even a linear schedule of 10 steps ends here, and many end at a tenth.
_AT_ZERO = 0.1
# Rates that differ by less are one: they have been through decimal digits.
_SAME = 1e-3


@dataclass(frozen=True)
class Rate:
    """Says how high the learning rate was when a checkpoint was saved.

    Attributes:
        kind: `mid`: in the middle of its run; `constant`: at the end of a run whose rate never
            fell; `floor`: at the end of one that fell, but not to zero; `unlogged`: in the middle
            of a run of which no rate is logged.
        value: The last one logged; None if none was.
        share: Of the run's peak, 0 to 1.
        logged: The step at which it was logged.
        state: The notes this is by.
    """

    kind: str
    value: float | None
    share: float
    logged: int | None
    state: TrainerState

    def told(self, checkpoint: int) -> str:
        """Return the numbers in a few words."""
        step, last = self.state.step, self.state.last_step
        parts = []
        if self.value is not None:
            parts.append(f"{self.value:.3g}, {self.share:.0%} of the run's peak")
            if self.kind == "constant":
                parts = [f"{self.value:.3g}"]
        if step is not None and self.kind in ("mid", "unlogged"):
            parts.append(f"at step {step:,}" + (f" of {last:,}" if last else ""))
        if self.logged is not None and self.logged != step:
            parts.append(f"last logged at step {self.logged:,}")
        return f"{checkpoint} ({', '.join(parts)})"


def rate_when_saved(state: TrainerState, run: Sequence[TrainerState] = ()) -> Rate | None:
    """Return how high the rate was when a checkpoint was saved; None if at zero, or not known.

    Args:
        run: Notes of other checkpoints: those of the same run may know of a higher peak.
    """
    if not state.rates:
        middle = state.step is not None and state.last_step is not None and not state.is_at_end
        return Rate("unlogged", None, 0.0, None, state) if middle else None
    known = [
        rate for other in (state, *run) if _is_one_run(other, state) for _, rate in other.rates
    ]
    (logged, value), peak = state.rates[-1], max(known)
    if value <= _AT_ZERO * peak:
        return None
    rate = Rate("mid", value, value / peak, logged, state)
    if not state.is_at_end:
        # A cycle may have ended since the rate was logged; not if its next logs are missing too.
        if len(state.rates) < 2 or state.step is None:
            return rate
        is_next = state.step - logged <= logged - state.rates[-2][0]
        return None if is_next and _expected(state) <= _AT_ZERO * peak else rate
    if len(state.rates) < 2:
        return None  # one value says nothing of what came after it
    if value >= (1 - _SAME) * peak:
        return Rate("constant", value, value / peak, logged, state)
    if _expected(state) <= _AT_ZERO * peak:
        return None
    return Rate("floor", value, value / peak, logged, state)


def _expected(state: TrainerState) -> float:
    """Return the rate when a checkpoint was saved, on a straight line through the last two.

    What was logged last may be steps ago, or the rate before the last step.
    """
    (before, earlier), (logged, value) = state.rates[-2:]
    assert state.step is not None
    return value + (value - earlier) / (logged - before) * (state.step + 1 - logged)


def _is_one_run(one: TrainerState, other: TrainerState) -> bool:
    return one is other or one.continues(other) or other.continues(one)


def rate_sentences(states: Mapping[int, TrainerState]) -> Iterator[tuple[str, list[int], str]]:
    """Yield what the learning rates of the checkpoints mean: a kind, which ones, and a sentence.

    Args:
        states: By checkpoint; those without notes are missing.
    """
    found: dict[str, dict[int, Rate]] = {}
    for checkpoint, state in states.items():
        if rate := rate_when_saved(state, list(states.values())):
            found.setdefault(rate.kind, {})[checkpoint] = rate
    for kind, (meaning, remedy) in _SENTENCES.items():
        if rates := found.get(kind):
            told = ", ".join(rate.told(checkpoint) for checkpoint, rate in rates.items())
            yield f"rate {kind}", [*rates], f"{meaning} checkpoint(s) {told}: {remedy}."


_NOISE = "the noise of a high rate, and an average of such is often better than each of them"
_SENTENCES = {
    "mid": (
        "The learning rate was not at zero when the trainer saved",
        f"saved in the middle of a schedule they carry {_NOISE} and than a router between them; "
        "take checkpoints from the ends of cycles, or train on for a while with the rate going to "
        "zero",
    ),
    "constant": (
        "The learning rate never fell before the end of the run that saved",
        f"a constant rate has no end at which noise settles, so that they carry {_NOISE}; train on "
        "for a while with the rate going to zero",
    ),
    "floor": (
        "The learning rate fell, but not to zero, in the run that saved",
        "some of the noise of a high rate is left; compare with the average of the checkpoints, or "
        "let the schedule end at zero",
    ),
    "unlogged": (
        "No learning rate is logged, but in the middle of their run were saved",
        f"unless the rate was at zero there, they carry {_NOISE}; take checkpoints from the ends of "
        "cycles",
    ),
}
