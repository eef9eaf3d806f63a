"""Sections of the model card: who the experts are, and how alike."""

from __future__ import annotations

from collections.abc import Collection

from upit_merge.errors import counted
from upit_merge.report.document import Expert, Matrix, Report, Shrinking
from upit_merge.report.markdown import escaped, folded, picture, table
from upit_merge.report.plots import SIMILARITY, TREE, expert_cosine, has_similarity
from upit_merge.report.sources import Source
from upit_merge.report.tables import origin_of

_MOST_SHARES = 6  # checkpoints named for one expert


def experts_section(report: Report, pictures: Collection[str]) -> str:
    """Tell what was done, with family tree and a row per expert; what was added or merged later."""
    parts = _ancestry(report, pictures)
    if not report.shrunk:
        return "\n\n".join(parts)
    merged = [part for record in report.shrunk for part in _fewer(record)]
    which = "some were dropped" if report.shrunk[0].how == "drop" else "they were merged"
    earlier = folded(f"The experts before {which}", "\n\n".join(parts))
    added = (
        f"Expert {extension.expert} is {linked(extension.source)}, added later."
        for extension in report.later_extensions
    )
    return "\n\n".join([*merged, earlier, *added])


def _ancestry(report: Report, pictures: Collection[str]) -> list[str]:
    lineage = report.lineage
    told = f"{lineage.summary[0].upper()}{lineage.summary[1:]}."
    if not report.is_copied:
        told += f" {_how_grown(report)}"
    parts = [told.strip()]
    if TREE in pictures:
        parts.append(picture(TREE, _tree_in_words(report)))
    parts.append(_expert_table(report))
    return parts


def _how_grown(report: Report) -> str:
    """Say what a child is made of, in a sentence; nothing if there are none."""
    experts = range(len(report.lineage.experts))
    if not any(part.parents for expert in experts for part in report.lineage.parts(expert)):
        return ""
    density = report.parameters.get("density")
    kept = f" {density:.0%} of" if isinstance(density, float | int) else " a share of"
    return (
        f"A child is a weighted mean of its parents' differences to "
        f"{linked(report.sources.base)}, of which DARE keeps{kept} the entries."
    )


def _expert_table(report: Report) -> str:
    """Tabulate the experts; columns that say nothing of any of them are left out."""
    experts = report.lineage.experts
    rows = [_row(report, index) for index in range(len(experts))]
    # Those that have been merged since had been added before.
    added = report.extensions[: report.shrunk[0].extensions] if report.shrunk else report.extensions
    rows += [[str(e.expert), f"{linked(e.source)}, added later", "", ""] for e in added]
    origin = "checkpoint" if all(e.checkpoint is not None for e in experts) else "grown from"
    titles = [">expert", "copy of" if report.is_copied else origin]
    titles += ["ratio", "share of each checkpoint"]
    used = [column for column in range(4) if any(row[column] for row in rows)]
    return table([titles[i] for i in used], [[row[i] for i in used] for row in rows])


def _row(report: Report, index: int) -> list[str]:
    """Return number, origin, ratio of the parents, and shares of the checkpoints."""
    expert = report.lineage.experts[index]
    if expert.checkpoint is not None:
        return [str(index), linked(report.sources.checkpoints[expert.checkpoint]), "", ""]
    ratio = "" if expert.alpha is None else f"{expert.alpha:.2f} : {1 - expert.alpha:.2f}"
    return [str(index), origin_of(report.lineage.parts(index)), ratio, _shares(report, expert)]


def _shares(report: Report, expert: Expert) -> str:
    """List the checkpoints in an expert, the largest share first; small ones are counted."""
    sources = report.sources.checkpoints
    shares = sorted(zip(expert.weights, sources, strict=True), key=lambda pair: -pair[0])
    shown = [f"{escaped(source.name)} {share:.0%}" for share, source in shares if share > 0.005]
    text = ", ".join(shown[:_MOST_SHARES])
    more = len(shown) - _MOST_SHARES
    return f"{text} and {more} more" if more > 0 else text


def _tree_in_words(report: Report) -> str:
    experts = report.lineage.experts
    kept = sum(expert.checkpoint is not None for expert in experts)
    return (
        f"Family tree: {counted(len(experts), 'expert')}, {kept} of them checkpoints and "
        f"{len(experts) - kept} made from these; the table below has the same in words"
    )


def _fewer(record: Shrinking) -> list[str]:
    """Tell of experts that became fewer; of those that were dropped, which are left as what."""
    if record.how == "merge":
        return [_merged(record)]
    told = (
        f"Of {record.before} experts per layer {record.after} are left, as they were: those that "
        f"add most to the tokens they get, on {counted(record.data.samples, 'sample')} (the mean "
        "of the router's weight times the norm of what the expert gives, "
        "[REAP](https://arxiv.org/abs/2510.13999)). `upit_report.json` has all scores."
    )
    mixtures, kept = len(record.groups), record.kept()
    rows = []
    for old in sorted(kept)[: record.before]:
        places = sorted(kept[old].items())
        count = sum(len(layers) for _, layers in places)
        as_what = [f"expert {new}" + _of_some(layers, mixtures) for new, layers in places]
        rows.append([str(old), f"{count} of {mixtures}", ", ".join(as_what)])
    titles = [">expert before", ">left in mixtures", "as"]
    gone = record.before - len(rows)
    more = f"{counted(gone, 'expert')} of before {'is' if gone == 1 else 'are'} left nowhere."
    return [told, table(titles, rows), *([more] if gone > 0 else [])]


def _of_some(layers: list[int], mixtures: int) -> str:
    """Say which mixtures, counted from 0, are meant; nothing if all are."""
    if len(layers) == mixtures:
        return ""
    shown = ", ".join(map(str, layers[:_MOST_SHARES]))
    more = len(layers) - _MOST_SHARES
    return f" (in {shown}{f' and {more} more' if more > 0 else ''})"


def _merged(record: Shrinking) -> str:
    return (
        f"The mixture had {record.before} experts per layer, which were merged into "
        f"{record.after} by how often its router chose them on "
        f"{counted(record.data.samples, 'sample')} and how alike it judged them "
        "([MC-SMoE](https://arxiv.org/abs/2310.01334)). `upit_report.json` has the groups of "
        "every layer."
    )


def linked(source: Source) -> str:
    """Return a model's name; a link if it is on the Hub."""
    name = escaped(source.name)
    return f"[{name}](https://huggingface.co/{source.hub_ids[-1]})" if source.hub_ids else name


def similarity_section(report: Report, pictures: Collection[str]) -> str:
    """Tell how alike the checkpoints are, and the experts that were grown from them."""
    if not has_similarity(report):
        return ""
    before, after = report.checkpoint_cosine, expert_cosine(report)
    text = (
        f"Cosine of the checkpoints' differences to {linked(report.sources.base)}, in the FFNs: "
        f"{_range(before)}."
    )
    if after is not None:
        text += f" Of the {len(after)} experts that the merge made, as expected: {_range(after)}."
    lineage = report.lineage
    if lineage.smallest_distance is not None and lineage.mean_distance is not None:
        text += (
            f" The closest two experts are {lineage.smallest_distance:.4g} apart, two experts on "
            f"average {lineage.mean_distance:.4g} (Euclidean)."
        )
    shown = "checkpoints" + ", and of the experts grown from them" * (after is not None)
    alternative = f"Cosine similarity of the {shown}: {_range(after or before)}"
    parts = [text, picture(SIMILARITY, alternative) if SIMILARITY in pictures else ""]
    return "\n\n".join(part for part in parts if part)


def _range(matrix: Matrix) -> str:
    """Return lowest, mean and highest cosine of two different ones."""
    pairs = [value for i, row in enumerate(matrix) for value in row[:i]]
    if len(pairs) == 1:
        return f"{pairs[0]:.3f}"
    return f"{min(pairs):.3f} to {max(pairs):.3f}, mean {sum(pairs) / len(pairs):.3f}"
