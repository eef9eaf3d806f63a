"""Real text that every machine with Python has, in three domains, without a download.

* ``code``: the standard library's own source, without docstrings and comments;
* ``docs``: English prose about Python: the language reference that ``help()`` shows
  (``pydoc_data.topics``) and the docstrings taken out of the code;
* ``arithmetic``: generated problems with worked, correct answers.

Training and held-out text never share a source file, a help topic or a first operand, so a low
held-out perplexity cannot come from a document whose other half was trained on.
"""

import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from upit_merge.io.text_file import write_unless_there

CHUNK_CHARACTERS = (150, 400)  # shortest and longest document; 400 is about 150 tokens of the demo
HELDOUT_DOCUMENTS = 100  # per domain: evaluated in seconds by a tiny model
HELDOUT_DOCUMENTS_PER_SOURCE = 5  # no single file or topic may decide a domain's perplexity
TRAIN_DOCUMENTS = 6000  # at most, per domain: more than the demo has time to read
MAX_FILE_BYTES = 150_000
MIN_DOCSTRING_CHARACTERS = 150  # shorter ones are one-line summaries, hardly prose
PROSE_LETTER_SHARE = 0.9  # reached by 80 % of the docstrings' text and 2 % of the code's
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")

# Tests, tables, build configuration and other people's packages: not the library's own code.
SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "config",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, a few hundred characters each.

    Both lists are shuffled or drawn at random; no source, and no document, is in both.
    """

    name: str
    train: list[str]
    heldout: list[str]


def load_domains(seed: int = 0) -> list[Domain]:
    """Load the three domains, the same for the same ``seed`` and Python version.

    Args:
        seed: decides which files and topics are held out, and the arithmetic problems.

    Returns:
        ``code``, ``docs`` and ``arithmetic``, each with ``HELDOUT_DOCUMENTS`` held-out documents
        and training documents in a shuffled order.
    """
    rng = random.Random(seed)
    files = library_files()
    rng.shuffle(files)
    code_sources: list[list[str]] = []
    docs_sources: list[list[str]] = []
    for path in files:
        code, docstrings = separate_docstrings(path.read_text(encoding="utf-8"))
        code_sources.append(chunks(code))
        docs_sources.append([chunk for text in docstrings for chunk in prose_chunks(text)])
    docs_sources += [prose_chunks(text) for text in help_topics()]
    rng.shuffle(docs_sources)
    return [
        split_by_source("code", code_sources, rng),
        split_by_source("docs", docs_sources, rng),
        arithmetic_domain(rng),
    ]


def write_texts(path: Path, domains: Sequence[Domain], texts: Iterable[Iterable[str]]) -> None:
    """Write documents of every domain, one domain after the other, each with its name, as jsonl.

    A file that is the same already keeps its time of change, by which a merge knows its inputs.
    """
    lines = [
        json.dumps({"text": text, "domain": domain.name}) + "\n"
        for domain, documents in zip(domains, texts, strict=True)
        for text in documents
    ]
    write_unless_there(path, "".join(lines))


def split_by_source(name: str, sources: list[list[str]], rng: random.Random) -> Domain:
    """Hold out whole sources from the front until there are enough documents; train on the rest."""
    heldout: list[str] = []
    used = 0
    while len(heldout) < HELDOUT_DOCUMENTS:
        source = sources[used]
        heldout += rng.sample(source, min(HELDOUT_DOCUMENTS_PER_SOURCE, len(source)))
        used += 1
    heldout = heldout[:HELDOUT_DOCUMENTS]
    known = set(heldout)  # the library repeats itself: licences, copied docstrings
    train = [text for source in sources[used:] for text in source if text not in known]
    rng.shuffle(train)
    return Domain(name, train[:TRAIN_DOCUMENTS], heldout)


def chunks(text: str) -> list[str]:
    """Cut ``text`` at line ends into documents within ``CHUNK_CHARACTERS``; drop the short rest."""
    shortest, longest = CHUNK_CHARACTERS
    documents: list[str] = []
    current = ""
    for line in text.splitlines(keepends=True):
        if current and len(current) + len(line) > longest:
            documents.append(current)
            current = ""
        current += line
    documents.append(current)
    stripped = (document.strip("\n") for document in documents)
    return [document for document in stripped if shortest <= len(document) <= longest]


def prose_chunks(text: str) -> list[str]:
    """Return the documents of ``text`` that are sentences, not tables, grammar or sessions."""
    return [chunk for chunk in chunks(text) if letter_share(chunk) >= PROSE_LETTER_SHARE]


def letter_share(text: str) -> float:
    """Return the share of letters and single spaces; indentation does not count."""
    text = " ".join(text.split())
    return sum(character.isalpha() or character == " " for character in text) / len(text)


# ---- code and docs


def library_files() -> list[Path]:
    """List the standard library's Python files that are its own, readable code, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if is_library_code(path, root)]


def is_library_code(path: Path, root: Path) -> bool:
    folders = path.relative_to(root).parts[:-1]
    if any(folder in SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
        return False
    # _sysconfigdata* is generated on the machine that built Python.
    if path.name.startswith("_sysconfigdata") or path.stat().st_size > MAX_FILE_BYTES:
        return False
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def separate_docstrings(source: str) -> tuple[str, list[str]]:
    """Split a module: source without docstrings and comment lines; longer docstrings in order.

    Left in place they would make ``code`` partly ``docs``, which no router could tell apart.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old library code are not our concern
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return source, []
    lines = source.splitlines(keepends=True)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        statement = node.body[0]
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        lines[first:last] = [""] * (last - first)
        if len(docstring) >= MIN_DOCSTRING_CHARACTERS:
            found.append((first, docstring))
    code = "".join(line for line in lines if not line.lstrip().startswith("#"))
    return code, [docstring for _, docstring in sorted(found)]


def help_topics() -> list[str]:
    """Return the texts behind ``help("topic")``; none where a distribution leaves them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [textwrap.dedent(topics[name]) for name in sorted(topics)]


# ---- arithmetic


def arithmetic_domain(rng: random.Random) -> Domain:
    """Make worked problems, several a document; held-out first operands are never trained on."""
    train = documents_of(problems(rng, heldout=False), TRAIN_DOCUMENTS)
    heldout = documents_of(problems(rng, heldout=True), HELDOUT_DOCUMENTS)
    return Domain("arithmetic", train, heldout)


def documents_of(stream: Iterator[str], count: int) -> list[str]:
    """Make ``count`` documents of four consecutive problems each."""
    return ["\n".join(islice(stream, 4)) for _ in range(count)]


def problems(rng: random.Random, *, heldout: bool) -> Iterator[str]:
    """Yield worked problems with a > b; every a belongs to one part of a fixed 9 : 1 split."""
    kinds = [column_sum, column_sum, purchase, gift, product]
    while True:
        a, b = rng.randint(100, 999), rng.randint(2, 99)
        if (a // 7 % 10 == 3) == heldout:
            yield rng.choice(kinds)(a, b, rng)


def column_sum(a: int, b: int, rng: random.Random) -> str:
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    return (
        f"Question: {a} + {b}? Units: {a % 10} + {b % 10} = {units}."
        f" Tens: {a // 10} + {b // 10} = {tens}. Total: {tens}0 + {units} = {a + b}."
        f" Answer: {a + b}."
    )


def product(a: int, b: int, rng: random.Random) -> str:
    digit, tens, units = b % 9 + 1, a // 10 * 10, a % 10
    return (
        f"Question: {digit} x {a}? {digit} x {tens} = {digit * tens} and"
        f" {digit} x {units} = {digit * units}. Answer: {digit * a}."
    )


def purchase(a: int, b: int, rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return (
        f"{name} has {a} {thing} and buys {b} more. How many now?"
        f" {a} + {b} = {a + b}. {name} has {a + b} {thing}."
    )


def gift(a: int, b: int, rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return (
        f"{name} has {a} {thing} and gives away {b}. How many are left?"
        f" {a} - {b} = {a - b}. {name} has {a - b} {thing}."
    )
