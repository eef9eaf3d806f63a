"""What readers found, compared with the reference, as rows of a table: for benchmarks/runtimes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

HEADER = (
    "family",
    "format",
    "reader",
    "ids",
    "greedy tokens",
    "same top token",
    "difference",
    "KL",
)
HEADER += ("chat", "ends at", "cannot")
TOLERANCE = 1e-3  # of logprobs; float32 in another order of sums gives 1e-5 to 1e-4
# Mean divergence of a quantised model of random weights, whose gates often choose between two
# experts by a hair. It tells a broken file; what computes otherwise shows in float32.
QUANTISED_TOLERANCE = 0.5
LONGEST_ERROR = 150  # characters


@dataclass
class Row:
    """One reader of one mixture.

    Attributes:
        ids: Whether it reads the text as the same tokens.
        tokens: How many of the reference's greedy tokens come out first, and of how many.
        top: Share of positions with the same most probable token.
        difference: Largest difference of logprobs.
        divergence: Kullback-Leibler divergence from the reference, mean over positions, in nats.
        chat: What the reader's own chat gave, beside the reference's.
        ends: Tokens at which it ends a text.
        errors: What it could not do, and why.
        quantised: Whether its weights are rounded, so that tokens may differ.
    """

    family: str
    format: str
    reader: str
    ids: bool | None = None
    tokens: tuple[int, int] | None = None
    top: float | None = None
    difference: float | None = None
    divergence: float | None = None
    chat: str = ""
    ends: str = ""
    errors: str = ""
    quantised: bool = False

    @property
    def right(self) -> bool:
        """Whether the reader computes the same model, and its chat ends where it should."""
        if self.ids is False or self.errors:
            return False
        if self.quantised:
            return self.divergence is not None and self.divergence <= QUANTISED_TOLERANCE
        return (
            self.tokens is not None
            and self.tokens[0] == self.tokens[1]
            and (self.difference or 0.0) <= TOLERANCE
            and self.chat == "same, ends"
        )

    def shortly(self) -> str:
        """Return one number, for an overview."""
        value = self.divergence if self.quantised else self.difference
        if value is None:
            return "no" if self.errors else "?"
        shown = "0" if not value else format(value, ".0e")
        return shown if self.right else f"**{shown}**"

    def cells(self) -> list[str]:
        def shown(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        return [
            self.family,
            f"`{self.format}`",
            self.reader,
            {True: "same", False: "**other**", None: ""}[self.ids],
            "" if self.tokens is None else f"{self.tokens[0]} of {self.tokens[1]}",
            shown(self.top, ".0%"),
            shown(self.difference, ".1e"),
            shown(self.divergence, ".1e"),
            self.chat,
            self.ends,
            self.errors,
        ]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "right": self.right}


def row_from_json(stored: Mapping[str, Any]) -> Row:
    values = {key: value for key, value in stored.items() if key != "right"}
    return Row(**{**values, "tokens": values["tokens"] and tuple(values["tokens"])})


def failed(family: str, format: str, reader: str, step: str, why: str) -> Row:
    """Return the row of a reader that gave nothing at all."""
    return Row(family, format, reader, errors=error_text({step: why}))


def error_text(errors: Mapping[str, str]) -> str:
    """Return the first error in a few words; others mostly follow from it."""
    if not errors:
        return ""
    step, why = next(iter(errors.items()))
    why = " ".join(why.replace("|", "/").split())
    if len(why) > LONGEST_ERROR:
        why = why[: LONGEST_ERROR - 1].rstrip() + "…"
    return f"{step}: {why}"


def compared(
    row: Row,
    reference: Mapping[str, Any],
    found: Mapping[str, Any],
    logprobs: tuple[np.ndarray, np.ndarray] | None,
    names: Mapping[int, str],
) -> Row:
    """Fill a row with what a reader found.

    Args:
        reference, found: What `benchmarks/runtimes_probes.py` wrote.
        logprobs: The reference's and the reader's, (positions, vocabulary); the reader's may lack
            the last positions and tokens.
        names: Tokens by id.
    """
    row.errors = error_text(found["errors"])
    if "ids" in found:
        row.ids = found["ids"] == reference["ids"]
    if "tokens" in found:
        row.tokens = common(reference["tokens"], found["tokens"]), len(reference["tokens"])
    elif "said" in found:
        row.tokens = said_alike(reference["pieces"], found["said"]), len(reference["tokens"])
    if logprobs is not None:
        row.top, row.difference, row.divergence = distances(*logprobs)
    elif "logprobs" in found.get("chat", {}):
        row.difference = chat_difference(reference["chat"], found["chat"])
    if "chat" in found:
        row.chat = chat_verdict(reference["chat"], found["chat"])
    if "eos" in found:
        ends = [str(names.get(i, i)).replace("|", "\\|") for i in found["eos"]]
        row.ends = ", ".join(f"`{name}`" for name in ends)
    return row


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many first entries are the same."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def said_alike(pieces: Sequence[str], text: str) -> int:
    """Return how many tokens' texts, one after the other, begin a text."""
    text, count, begun = text.strip(), 0, ""
    for piece in pieces:
        begun = (begun + piece).lstrip()
        if not text.startswith(begun):
            break
        count += 1
    return count


def distances(reference: np.ndarray, found: np.ndarray) -> tuple[float, float, float | None]:
    """Return the share of equal top tokens, the largest difference, and the mean divergence.

    Where the reader has told logprobs of some tokens alone there is no divergence.
    """
    positions, tokens = np.minimum(reference.shape, found.shape)
    one = reference[:positions, :tokens].astype("float64")
    other = found[:positions, :tokens].astype("float64")
    top = float((one.argmax(-1) == np.nanargmax(other, -1)).mean())
    difference = float(np.nanmax(np.abs(one - other)))
    if np.isnan(other).any():
        return top, difference, None
    divergence = (np.exp(one) * (one - other)).sum(-1).mean()
    return top, difference, max(float(divergence), 0.0)


def chat_difference(reference: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """Return the largest difference of the logprobs of the chat's tokens, while they are equal."""
    count = common(reference["tokens"], found["tokens"])
    pairs = list(zip(reference["logprobs"][:count], found["logprobs"][:count], strict=False))
    return max((abs(one - other) for one, other in pairs), default=None)


def chat_verdict(reference: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return whether prompt and answer are the reference's, and whether the turn ended."""
    count = len(found["ids"]) if "ids" in found else found.get("count", len(reference["ids"]))
    same_prompt = found.get("ids", reference["ids"]) == reference["ids"]
    if not same_prompt or count != len(reference["ids"]):
        verdict = "**other prompt**"
    elif found["text"].strip() == reference["text"].strip():
        verdict = "same"
    else:
        verdict = "other answer"
    return verdict + (", ends" if found["stopped"] else ", does not end")


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown, without columns that are empty in all of them."""
    lines = [row.cells() for row in rows]
    kept = [i for i in range(len(HEADER)) if any(line[i] for line in lines)]
    lines = [list(HEADER), ["---"] * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def overview(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Return one line for a mixture and a column for a reader.

    A cell holds the largest difference of logprobs, of quantised models the divergence; in bold
    where the reader is not right, and `no` where it cannot read the model.

    Args:
        rows: By mixture and reader.
    """
    readers = list(dict.fromkeys(reader for of_one in rows.values() for reader in of_one))
    lines = [["family", "format", *readers], ["---"] * (2 + len(readers))]
    for of_one in rows.values():
        first = next(iter(of_one.values()))
        cells = [of_one[reader].shortly() if reader in of_one else "" for reader in readers]
        lines.append([first.family, f"`{first.format}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
