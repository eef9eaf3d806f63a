"""What an evaluation says in words: is the mixture worth its bytes?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from upit_merge.report.evaluation_record import Evaluation, Paired
from upit_merge.report.routing_advice import hardly_used
from upit_merge.router.paired import Gain

_NOT_MEASURED = (
    "Whether the mixture is worth its bytes was not measured: `upit-merge evaluate` compares it "
    "with the dense models that can be made of the same checkpoints, unless --no-rivals is given."
)


def evaluation_verdict(
    found: Evaluation,
    quoted: Callable[[str], str] = str,
    said: Callable[[str], str] = str,
) -> str:
    """Return one paragraph: is the mixture worth its bytes, and what could not be compared.

    Args:
        quoted: Makes names, which come from elsewhere, fit to be shown.
        said: Does so to sentences with such names, and commands, in them.
    """
    if found.worth is None:
        return " ".join([_NOT_MEASURED, *_of_earlier(found, quoted)])
    sentences = [said(found.worth.verdict), *_of_earlier(found, quoted)]
    if found.worth.left_out:
        sentences.append(said(found.worth.left_out))
    return " ".join(sentences)


def _of_earlier(found: Evaluation, quoted: Callable[[str], str]) -> Iterator[str]:
    """Yield that a model is better which an earlier call has measured on the same text."""
    ours = found.groups[found.whole].perplexity
    better = [other for other in found.earlier_others if other.perplexity < ours]
    if better:
        best = min(better, key=lambda other: other.perplexity)
        told = gain_in_words(best)
        yield (
            f'Of the models that were measured on the same text before, "{quoted(best.model)}" has '
            f"a lower perplexity{f' (the mixture is {told})' * bool(told)}."
        )


def gain_in_words(paired: Paired) -> str:
    """Return how much lower the mixture's perplexity is, with the margin of error; or nothing."""
    if paired.gain is None:
        return ""
    error = math.inf if paired.error is None else paired.error
    return str(Gain(paired.gain, math.nan, error, paired.samples))


def hardly_used_sentence(found: Evaluation, folder: str = "", data: str = "") -> str:
    """Return which experts the gates hardly use, and what dropping them saves; nothing if none.

    Args:
        folder, data: See `routing_advice.hardly_used`.
    """
    idle = found.hardly_used
    if idle is None or not idle.experts:
        return ""
    return hardly_used(
        sorted(idle.experts), len(found.by_layer[0]), idle.bytes, "tokens", folder, data
    )
