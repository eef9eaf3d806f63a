"""Text of benchmarks.paper: four domains, and the order in which training meets them.

Code and docs are the demo's; arithmetic is short enough that models of this size learn to answer
some of it, and symbols are names of characters. Every machine with Python has all of it. Base model,
fine-tuning and measurement never share a document.
"""

from __future__ import annotations

import random
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upit_merge.demo.corpus import (
    HELDOUT_DOCUMENTS,
    TRAIN_DOCUMENTS,
    Domain,
    documents_of,
    load_domains,
)
from upit_merge.demo.training import pack

NUMBERS = (1, 7)  # of a sum, smallest and largest
SUMS_PER_DOCUMENT = 3  # times four, which the demo puts into a document
SYMBOLS_PER_DOCUMENT = 8
FEWEST_TOKENS = 32  # of a document, on average: no more are looked at than can be needed
SWEEP_SEED = 1000  # on which learning rates are chosen
# Names that count through thousands of characters, which hold nothing to learn but the counting.
COUNTED = re.compile(r"-[0-9A-F]{3,}$|^HANGUL SYLLABLE|^EGYPTIAN|^CUNEIFORM|^ANATOLIAN|^BAMUM|^VAI")


@dataclass(frozen=True)
class Corpus:
    """Documents by what they are for; each list has one entry per domain.

    Attributes:
        base: For the base model.
        tuning: For fine-tuning and the router; a share of the data is the first so many rows.
        heldout: For perplexity.
        problems: Held-out arithmetic for exact match: (prompt, answer).
    """

    names: list[str]
    base: list[list[str]]
    tuning: list[list[str]]
    heldout: list[list[str]]
    problems: list[tuple[str, str]]

    def of_seed(self, seed: int) -> Corpus:
        """With fine-tuning data of the seed's own; for the sweep, measured on other text too."""
        rng = random.Random(seed)
        tuning = [rng.sample(texts, len(texts)) for texts in self.tuning]
        if seed != SWEEP_SEED:
            return replace(self, tuning=tuning)
        counts = [len(texts) for texts in self.heldout]
        return replace(
            self,
            tuning=[texts[:-count] for texts, count in zip(tuning, counts, strict=True)],
            heldout=[texts[-count:] for texts, count in zip(tuning, counts, strict=True)],
        )


def load_corpus(num_problems: int) -> Corpus:
    """The text of all seeds, which have one base model and so the same held-out text."""
    rng = random.Random(0)
    code, docs, _ = load_domains()
    domains = [code, docs, arithmetic_domain(rng), symbol_domain(rng)]
    halves = [len(domain.train) // 2 for domain in domains]
    return Corpus(
        [domain.name for domain in domains],
        [domain.train[:half] for domain, half in zip(domains, halves, strict=True)],
        [domain.train[half:] for domain, half in zip(domains, halves, strict=True)],
        [domain.heldout for domain in domains],
        heldout_problems(rng, num_problems),
    )


def symbol_domain(rng: random.Random) -> Domain:
    """Code points and names of characters; a character is in training or held out, never both."""
    lines = [
        f"U+{point:04X} {name}"
        for point in range(sys.maxunicode + 1)
        if (name := unicodedata.name(chr(point), "")) and not COUNTED.search(name)
    ]
    rng.shuffle(lines)
    starts = range(0, len(lines) - SYMBOLS_PER_DOCUMENT, SYMBOLS_PER_DOCUMENT)
    documents = ["\n".join(lines[start : start + SYMBOLS_PER_DOCUMENT]) for start in starts]
    train = documents[HELDOUT_DOCUMENTS:][:TRAIN_DOCUMENTS]
    return Domain("symbols", train, documents[:HELDOUT_DOCUMENTS])


def arithmetic_domain(rng: random.Random) -> Domain:
    """Sums with their answers; no sum is in training and held out."""
    train = documents_of(problems(rng, heldout=False), TRAIN_DOCUMENTS)
    return Domain("arithmetic", train, documents_of(problems(rng, heldout=True), HELDOUT_DOCUMENTS))


def problems(rng: random.Random, *, heldout: bool) -> Iterator[str]:
    """Endless documents of sums of two or three digits; every fourth sum is held out.

    Short, because in a longer text the few tokens of the answers would hardly count in the loss.
    """
    while True:
        lines: list[str] = []
        while len(lines) < SUMS_PER_DOCUMENT:
            total = rng.randint(*NUMBERS)
            told = str(total)
            for _ in range(rng.choice((1, 2))):
                change = rng.randint(*NUMBERS)
                sign = "-" if total >= change and rng.random() < 0.5 else "+"
                total += change if sign == "+" else -change
                told += f"{sign}{change}"
            if (zlib.crc32(told.encode()) % 4 == 0) == heldout:
                lines.append(f"{told}={total}")
        yield "\n".join(lines)


def heldout_problems(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Sums that are in no training document, no two alike, and their answers."""
    found: dict[str, str] = {}
    for text in islice(problems(rng, heldout=True), 20 * count):
        for line in text.split("\n"):
            question, answer = line.split("=")
            found.setdefault(question + "=", answer)
    return list(found.items())[:count]


def last_number(text: str) -> str:
    """The last number of a text's first line, where problems have their answer."""
    numbers = re.findall(r"\d+", text.split("\n", 1)[0])
    return numbers[-1] if numbers else ""


# ---- rows


@dataclass(frozen=True)
class TuningData:
    """What fine-tuning sees: `rows[d]`, [rows, context], cut from `documents[d]`."""

    documents: list[list[str]]
    rows: list[Tensor]


def tuning_data(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, rows_per_domain: int
) -> TuningData:
    """The first documents of every domain, as many as the rows take.

    Raises:
        ValueError: a domain has too little text.
    """
    documents, rows = [], []
    for name, texts in zip(corpus.names, corpus.tuning, strict=True):
        texts = texts[: rows_per_domain * context // FEWEST_TOKENS]
        tokens = torch.tensor([len(ids) for ids in tokenizer(texts)["input_ids"]]).cumsum(0)
        count = int(torch.searchsorted(tokens, rows_per_domain * context)) + 1
        packed = pack(tokenizer, texts[:count], context)[:rows_per_domain]
        if len(packed) < rows_per_domain:
            raise ValueError(f"{name} has {len(packed)} rows of {rows_per_domain}")
        documents.append(texts[:count])
        rows.append(packed)
    return TuningData(documents, rows)


def visits(rows: Sequence[Tensor], replay: float, generator: torch.Generator) -> list[Tensor]:
    """One epoch in as many visits as there are domains: every row once, home rows mostly at home.

    Args:
        rows: Of every domain, [rows, context].
        replay: Share of a domain's rows that is spread evenly over the other domains' visits.
            With three of four domains elsewhere, 0.75 makes an epoch well mixed.

    Returns:
        One tensor [rows, context] per visit, shuffled.
    """
    parts: list[list[Tensor]] = [[] for _ in rows]
    for home, domain in enumerate(rows):
        shuffled = domain[torch.randperm(len(domain), generator=generator)]
        away = round(replay * len(domain))
        others = [visit for visit in range(len(rows)) if visit != home]
        for visit, part in zip(others, shuffled[:away].tensor_split(len(others)), strict=True):
            parts[visit].append(part)
        parts[home].append(shuffled[away:])
    gathered = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in gathered]


def mixed_epochs(rows: Sequence[Tensor], epochs: int, generator: torch.Generator) -> Tensor:
    """All rows of all domains, shuffled anew for every epoch: [epochs · rows, context]."""
    every = torch.cat(list(rows))
    return torch.cat(
        [every[torch.randperm(len(every), generator=generator)] for _ in range(epochs)]
    )
