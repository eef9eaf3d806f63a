"""Hostile input: model folders that lead out of themselves, or hold what is no file.

What is merely broken is in `test_bad_input.py`; its way of running and judging is used here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.commands.test_bad_input import (
    LAST,
    UP,
    assert_refused,
    pickled,
    run,
    sharded,
)
from tests.conftest import Family
from upit_merge.cli.main import main as upit_merge
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


def assert_run_refused(family: Family, sentence: str, *options: str) -> None:
    """`upit-merge run` gives one sentence and leaves the disk as it was."""
    recipe = family.write_recipe(family.recipe())
    before = sorted(family.root.rglob("*"))
    assert_refused(run("upit-merge", recipe, family.root / "out", *options), sentence, family)
    assert sorted(family.root.rglob("*")) == before


# ---- links ---------------------------------------------------------------------------------


def moved_out(family: Family, name: str) -> None:
    """Put a link in the place of a file of the last checkpoint, to a good copy outside it."""
    path, outside = family.root / LAST / name, family.root / "outside"
    outside.mkdir(exist_ok=True)
    if path.exists():
        path.rename(outside / name)
    else:
        (outside / name).write_text("{}")
    path.symlink_to(Path(os.path.relpath(outside / name, path.parent)))


@pytest.mark.parametrize(
    "name",
    [
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
    ],
)
def test_a_link_out_of_the_folder(family: Family, name: str) -> None:
    """The copy outside is as good as the file was: only where it lies is wrong."""
    moved_out(family, name)
    assert_run_refused(
        family,
        f"{LAST}/{name} is a link to outside/{name}, outside its folder; copy the file there, or "
        "link the whole folder.",
    )


@pytest.mark.parametrize("name", ["part-1.safetensors", "model.safetensors.index.json"])
def test_a_link_among_shards(family: Family, name: str) -> None:
    sharded(lambda folder, weight_map: None)(family)
    moved_out(family, name)
    assert_run_refused(family, f"{LAST}/{name} is a link to outside/{name}, outside its folder; …")


def test_a_link_to_a_pickle(family: Family) -> None:
    pickled()(family)
    moved_out(family, "pytorch_model.bin")
    sentence = f"{LAST}/pytorch_model.bin is a link to outside/pytorch_model.bin, outside …"
    assert_run_refused(family, sentence, "--lazy-unpickle")


def test_a_link_to_a_folder_of_templates(family: Family) -> None:
    templates = family.root / "templates"
    templates.mkdir()
    (family.root / LAST / "additional_chat_templates").symlink_to(templates)
    assert_run_refused(
        family, f"{LAST}/additional_chat_templates is a link to templates, outside its folder; …"
    )


def test_a_link_in_an_output(family: Family) -> None:
    """`upit-merge router` reads a folder that may come from elsewhere, too."""
    out, outside = family.root / "out", family.root / "outside.json"
    assert run("upit-merge", family.write_recipe(family.recipe()), out).exit_code == 0
    (out / "tokenizer.json").rename(outside)
    (out / "tokenizer.json").symlink_to(outside)
    command = ["router", str(out), "--data", str(family.seed_file()), "--quiet"]
    sentence = "out/tokenizer.json is a link to outside.json, outside its folder; …"
    assert_refused(CliRunner().invoke(upit_merge, command), sentence, family)


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


# ---- files that are none -------------------------------------------------------------------


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def directory(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


NO_FILE = " is a pipe, socket or device, not a file; remove it."
NO_WEIGHTS = f"Checkpoint {LAST} has no weights (model.safetensors or …) in …; give …"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (pipe("model.safetensors"), NO_WEIGHTS),
        (directory("model.safetensors"), NO_WEIGHTS),
        (pipe("config.json"), f"{LAST}/config.json{NO_FILE}"),
        (directory("config.json"), f"{LAST}/config.json cannot be read (Is a directory); …"),
        (pipe("tokenizer_config.json"), f"{LAST}/tokenizer_config.json{NO_FILE}"),
        (pipe("generation_config.json"), f"{LAST}/generation_config.json{NO_FILE}"),
        (pipe("README.md"), f"{LAST}/README.md{NO_FILE}"),
    ],
)
def test_not_a_regular_file(make: Callable[[Path], None], sentence: str, family: Family) -> None:
    make(family.checkpoints[-1])
    assert_run_refused(family, sentence)


@pytest.mark.parametrize("make", [pipe("part-1.safetensors"), directory("part-1.safetensors")])
def test_a_shard_that_is_no_file(make: Callable[[Path], None], family: Family) -> None:
    sharded(lambda folder, _: make(folder))(family)
    assert_run_refused(family, f"Checkpoint {LAST} lacks the shard part-1.safetensors that its …")


def test_a_device(family: Family) -> None:
    (family.root / LAST / "model.safetensors").unlink()
    (family.root / LAST / "model.safetensors").symlink_to("/dev/zero")
    assert_run_refused(family, NO_WEIGHTS)


def test_huge_json(family: Family) -> None:
    """A hole of a terabyte costs its author nothing."""
    with (family.root / LAST / "config.json").open("r+b") as file:
        file.truncate(2**40)
    assert_run_refused(
        family, f"{LAST}/config.json is too large for JSON of a model; copy or download it again."
    )


OUTSIDE = f"{LAST}/model.safetensors.index.json points outside its folder ("
NAMES = f"{LAST}/model.safetensors.index.json names "


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
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
    ],
)
def test_names_in_an_index(name: str, sentence: str, family: Family) -> None:
    sharded(lambda _, weight_map: weight_map.update({UP: name}))(family)
    assert_run_refused(family, sentence)


def test_the_index_of_a_pickle_that_is_not_used(family: Family) -> None:
    pickled()(family)
    (family.root / LAST / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    sentence = f"{LAST}/pytorch_model.bin.index.json has no usable weight_map; …"
    assert_run_refused(family, sentence, "--lazy-unpickle")


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
