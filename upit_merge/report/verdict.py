"""What an evaluation says in words: is the mixture worth its bytes?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from upit_merge.errors import runs
from upit_merge.report.evaluation_record import Evaluation, Paired
from upit_merge.router.paired import Gain

_NOT_MEASURED = (
    "Whether the mixture is worth its bytes was not measured: `upit-merge evaluate` compares it "
    "with the dense models that can be made of the same checkpoints, unless --no-rivals is given."
)


def evaluation_verdict(found: Evaluation, quoted: Callable[[str], str] = str) -> str:
    """Return one paragraph: is the mixture worth its bytes, and what could not be compared.

    Args:
        quoted: Makes text with names in it, which come from elsewhere, fit to be shown.
    """
    if found.worth is None:
        return " ".join([_NOT_MEASURED, *_of_earlier(found, quoted)])
    sentences = [quoted(found.worth.verdict), *_of_earlier(found, quoted)]
    if found.worth.left_out:
        sentences.append(quoted(found.worth.left_out))
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


def hardly_used_sentence(found: Evaluation, folder: str = "", seeds: str = "") -> str:
    """Return which experts the gates hardly use, and what dropping them would save; or nothing.

    Args:
        folder, seeds: The mixture and seed data, as they are to stand in the command.
    """
    idle = found.hardly_used
    if idle is None or not idle.experts:
        return ""
    few, left = len(idle.experts) == 1, len(found.by_layer[0]) - len(idle.experts)
    words = [
        "upit-merge shrink",
        folder,
        f"--experts {left} --how drop",
        seeds and f"--data {seeds}",
    ]
    return (
        f"{'Expert' if few else 'Experts'} {runs(sorted(idle.experts))} "
        f"{'gets' if few else 'get'} less than a tenth of an even share of the tokens, mean over "
        f"the layers: leaving {'it' if few else 'them'} out would save {_size(idle.bytes)} "
        f"(`{' '.join(filter(None, words))}`)."
    )


def _size(num_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} kB"
