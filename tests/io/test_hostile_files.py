"""Hostile input: model folders that lead out of themselves, or hold what is no file.

What is merely broken is in `test_bad_checkpoints.py`; `tests/support/spoilt.py` says what a case is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.support.commands import invoke
from tests.support.spoilt import (
    LAST,
    UP,
    Case,
    Spoil,
    assert_case_refused,
    assert_refused,
    both,
    content,
    each,
    moved_out,
    pickled,
    run,
    sharded,
)
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions, resolve


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    """Who opens a pipe without a writer waits for ever."""

    def too_long(*_: Any) -> None:
        raise TimeoutError("hangs")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# ---- what spoils a folder ------------------------------------------------------------------


def link_to_templates(family: Family) -> None:
    templates = family.root / "templates"
    templates.mkdir()
    (family.root / LAST / "additional_chat_templates").symlink_to(templates)


def pipe(path: str) -> Spoil:
    def spoil(family: Family) -> None:
        (family.root / path).unlink(missing_ok=True)
        os.mkfifo(family.root / path)

    return spoil


def directory(path: str) -> Spoil:
    def spoil(family: Family) -> None:
        (family.root / path).unlink(missing_ok=True)
        (family.root / path).mkdir()

    return spoil


def device(family: Family) -> None:
    (family.root / LAST / "model.safetensors").unlink()
    (family.root / LAST / "model.safetensors").symlink_to("/dev/zero")


def terabyte(family: Family) -> None:
    """A hole of this size costs its author nothing."""
    with (family.root / LAST / "config.json").open("r+b") as file:
        file.truncate(2**40)


FILES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
]
NO_FILE = " is a pipe, socket or device, not a file; remove it."
NO_WEIGHTS = f"Checkpoint {LAST} has no weights (model.safetensors or …) in …; give …"
OUTSIDE = f"{LAST}/model.safetensors.index.json points outside its folder ("
NAMES = f"{LAST}/model.safetensors.index.json names "

INDEX_NAMES = [
    ("/etc/passwd", f"{OUTSIDE}/etc/passwd); do not use this checkpoint."),
    ("../part-0.safetensors", f"{OUTSIDE}../part-0.safetensors); …"),
    ("sub/part-0.safetensors", f"{OUTSIDE}sub/part-0.safetensors); …"),
    ("./part-0.safetensors", f"{OUTSIDE}./part-0.safetensors); …"),
    ("..\\part-0.safetensors", f"{OUTSIDE}..\\part-0.safetensors); …"),
    ("C:part-0.safetensors", f"{OUTSIDE}C:part-0.safetensors); …"),
    ("//host/\x1b[2J\n" + "x" * 999, f"{OUTSIDE}//host/\\x1b[2J\\nxxx…xxx...); …"),
    (".", f"{OUTSIDE}.); …"),
    ("..", f"{OUTSIDE}..); …"),
    ("", f"{NAMES}'' as a file; do not use this checkpoint."),
    ("a\0b", f"{NAMES}'a\\x00b' as a file; …"),
    ("part-0\n.safetensors", f"{NAMES}'part-0\\n.safetensors' as a file; …"),
    ("x" * 300, f"{NAMES}'xxx…... as a file; …"),
]

as_shards = sharded(lambda folder, weight_map: None)

CASES = {
    # The copy outside is as good as the file was: only where it lies is wrong.
    **{
        f"link instead of {name}": Case(
            moved_out(f"{LAST}/{name}"),
            f"{LAST}/{name} is a link to outside/{name}, outside its folder; copy the file there, "
            "or link the whole folder.",
        )
        for name in FILES
    },
    **{
        f"link instead of {name}": Case(
            both(as_shards, moved_out(f"{LAST}/{name}")),
            f"{LAST}/{name} is a link to outside/{name}, outside its folder; …",
        )
        for name in ("part-1.safetensors", "model.safetensors.index.json")
    },
    "link to a pickle": Case(
        both(pickled(), moved_out(f"{LAST}/pytorch_model.bin")),
        f"{LAST}/pytorch_model.bin is a link to outside/pytorch_model.bin, outside …",
        ("--lazy-unpickle",),
    ),
    "link to a folder of templates": Case(
        link_to_templates,
        f"{LAST}/additional_chat_templates is a link to templates, outside its folder; …",
    ),
    **{
        f"pipe instead of {name}": Case(pipe(f"{LAST}/{name}"), f"{LAST}/{name}{NO_FILE}")
        for name in (
            "config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "README.md",
        )
    },
    "pipe instead of weights": Case(pipe(f"{LAST}/model.safetensors"), NO_WEIGHTS),
    "folder instead of weights": Case(directory(f"{LAST}/model.safetensors"), NO_WEIGHTS),
    "device instead of weights": Case(device, NO_WEIGHTS),
    "folder instead of config.json": Case(
        directory(f"{LAST}/config.json"),
        f"{LAST}/config.json cannot be read (Is a directory); …",
    ),
    **{
        f"{spoil.__name__} instead of a shard": Case(
            both(as_shards, spoil(f"{LAST}/part-1.safetensors")),
            f"Checkpoint {LAST} lacks the shard part-1.safetensors that its …",
        )
        for spoil in (pipe, directory)
    },
    "huge JSON": Case(
        terabyte,
        f"{LAST}/config.json is too large for JSON of a model; copy or download it again.",
    ),
    **{
        f"index names {name!r:.20}": Case(
            sharded(lambda _, weight_map, name=name: weight_map.update({UP: name})),
            sentence,
        )
        for name, sentence in INDEX_NAMES
    },
    "index of a pickle that is not used": Case(
        both(
            pickled(),
            content(f"{LAST}/pytorch_model.bin.index.json", lambda _: b'{"weight_map": 3}'),
        ),
        f"{LAST}/pytorch_model.bin.index.json has no usable weight_map; …",
        ("--lazy-unpickle",),
    ),
}


@each(CASES)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


# ---- links, one by one ----------------------------------------------------------------------


def test_a_link_in_an_output(family: Family) -> None:
    """`upit-merge router` reads a folder that may come from elsewhere, too."""
    out, outside = family.root / "out", family.root / "outside.json"
    assert run("upit-merge", family.write_recipe(family.recipe()), out).exit_code == 0
    (out / "tokenizer.json").rename(outside)
    (out / "tokenizer.json").symlink_to(outside)
    command = ["router", str(out), "--data", str(family.seed_file()), "--quiet"]
    sentence = "out/tokenizer.json is a link to outside.json, outside its folder; …"
    assert_refused(invoke(*command), sentence, family)


def opened(reference: Path | str, **options: Any) -> list[str]:
    allowed = OpenOptions(**options)
    checkpoint = Checkpoint(str(reference), resolve(str(reference), allowed), allowed)
    checkpoint.tensor(UP)
    checkpoint.close()
    return sorted(checkpoint.specs)


def test_links_that_are_fine(family: Family) -> None:
    """Inside the folder, to the whole folder, and to a folder through which another link goes."""
    expected = opened(family.base)
    (family.base / "model.safetensors").rename(family.base / "weights.safetensors")
    (family.base / "model.safetensors").symlink_to("weights.safetensors")
    (family.root / "link").symlink_to(family.base)
    (family.root / "link to link").symlink_to("link")
    for folder in (family.base, family.root / "link", family.root / "link to link"):
        assert opened(folder) == expected


@pytest.fixture
def cached(family: Family) -> Path:
    """The base as the Hub's client keeps it: a snapshot of links to blobs."""
    model = family.root / "cache" / "models--owner--name"
    snapshot, blobs = model / "snapshots" / ("ab" * 20), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(family.base.iterdir())):
        path.rename(blobs / f"{index:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:064x}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_the_cache_of_the_hub(cached: Path, family: Family) -> None:
    (family.root / "link").symlink_to(cached)
    for folder in (cached, family.root / "link"):
        assert UP in opened(folder)
    cache = str(family.root / "cache")
    assert resolve("owner/name", OpenOptions(cache_dir=cache)) == cached
    assert UP in opened("owner/name", cache_dir=cache)


@pytest.mark.parametrize(
    "target", ["../../refs/main", "../../../models--other/blobs/0", "/etc/hostname"]
)
def test_the_cache_of_the_hub_is_no_way_out(cached: Path, target: str) -> None:
    (cached / target).parent.mkdir(parents=True, exist_ok=True)
    (cached / "chat_template.jinja").symlink_to(target)
    with pytest.raises(UpitError, match=r"chat_template.jinja is a link to .*, outside its folder"):
        opened(cached)


def test_blobs_elsewhere_are_not_a_cache(cached: Path) -> None:
    """Only below `models--…/snapshots` does a neighbour called `blobs` belong to a model."""
    cached.parents[1].rename(cached.parents[2] / "other")
    with pytest.raises(UpitError, match="outside its folder"):
        opened(cached.parents[2] / "other" / "snapshots" / cached.name)


@pytest.mark.parametrize(
    "model", ["~nobody-at-all/x", "x" * 300, f"{'x' * 300}/y", "nobody/" + "x" * 300]
)
def test_impossible_paths(model: str, family: Family) -> None:
    for document in (
        family.recipe(models=[model]),
        family.recipe() | {"base_model": model},
        family.recipe(parameters={"backbone": model}),
        family.recipe(tokenizer_source=model),
    ):
        result = run("upit-merge", family.write_recipe(document), family.root / "out")
        assert_refused(result, "…", family)
        assert len(result.stderr.splitlines()) == 1
