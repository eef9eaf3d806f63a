"""What an evaluation says in words: is the mixture better than what it was compared with?"""

from __future__ import annotations

from collections.abc import Iterator

from upit_merge.report.document import Evaluation
from upit_merge.report.markdown import escaped

_SAME = 0.002  # relative difference of perplexities that is none


def evaluation_verdict(found: Evaluation) -> str:
    """Return one paragraph: the mixture beside its experts, a shuffled router and other models."""
    whole = found.groups[found.whole]
    sentences = [
        f"The mixture's perplexity is {', '.join(told)}." for told in [[*_told(found)]] if told
    ]
    if not found.others:
        sentences.append(
            "Whether it is worth its size, only other models on the same text can tell: the average "
            "of its checkpoints, or a dense model that was trained on all of the data."
        )
        return " ".join(sentences)
    best = min(found.others, key=lambda other: other.perplexity)
    name = f'"{escaped(best.model)}"'
    if whole.perplexity < best.perplexity * (1 - _SAME):
        sentences.append("Over all of this text it is the best of the models compared.")
    elif whole.perplexity > best.perplexity * (1 + _SAME):
        sentences.append(f"Over all of this text {name} is the better model.")
    else:
        sentences.append(f"Over all of this text {name} is as good.")
    if better := [*_better_on_a_kind(found)]:
        sentences.append(f"By kind: {', '.join(better)}.")
    return " ".join(sentences)


def _better_on_a_kind(found: Evaluation) -> Iterator[str]:
    """Yield the kinds of text on which another model is better, and which."""
    for kind, group in found.kinds.items():
        if kind == found.whole:
            continue
        others = {f'"{escaped(o.model)}"': o.groups[kind] for o in found.others if kind in o.groups}
        for expert, value in enumerate(group.experts_alone or []):
            others[f"expert {expert} alone"] = value
        best = min(others, key=others.__getitem__, default=None)
        if best is not None and others[best] < group.perplexity * (1 - _SAME):
            yield f"on {escaped(kind)} {best} is better"


def _told(found: Evaluation) -> Iterator[str]:
    whole = found.groups[found.whole]
    if whole.experts_alone and len(whole.experts_alone) > 1:
        best = min(range(len(whole.experts_alone)), key=whole.experts_alone.__getitem__)
        about = "about " if found.estimated else ""
        change = _change(whole.perplexity, whole.experts_alone[best])
        yield f"{about}{change} that of the best of its experts alone ({best})"
    if whole.control_perplexity is not None:
        yield f"{_change(whole.perplexity, whole.control_perplexity)} with a shuffled router"
    for other in sorted(found.others, key=lambda other: other.perplexity)[:3]:
        yield f'{_change(whole.perplexity, other.perplexity)} that of "{escaped(other.model)}"'


def _change(value: float, reference: float) -> str:
    share = value / reference - 1
    if abs(share) < _SAME:
        return "as high as"
    return f"{abs(share):.1%} {'lower' if share < 0 else 'HIGHER'} than"
