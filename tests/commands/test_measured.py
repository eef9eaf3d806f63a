"""What `upit-merge evaluate` has measured of a mixture is not measured again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.conftest import Family
from tests.support.commands import done, two
from tests.support.seeds import held_out
from upit_merge.commands import compare, measured
from upit_merge.commands.measured import Measured, cache_folder, keep, kept

KNOWN = "This mixture was measured on these samples before: nothing of it was computed."


@pytest.fixture
def out(shared_family: Family, merge) -> Path:
    router = {"data": str(shared_family.seed_file())}
    return merge(shared_family.recipe(parameters={"num_experts": 4}, router=router))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return held_out(tmp_path)


@contextlib.contextmanager
def passes() -> Iterator[list[str]]:
    """Every module of torch that is called meanwhile, by the name of its class."""
    seen: list[str] = []
    hook = register_module_forward_pre_hook(lambda module, _: seen.append(type(module).__name__))
    try:
        yield seen
    finally:
        hook.remove()


def evaluated(out: Path, data: Path, *words: object) -> tuple[bytes, str, int]:
    """The bytes of --json, what was said, and how many modules were called."""
    file = out.parent / "numbers.json"
    file.unlink(missing_ok=True)
    with passes() as seen:
        result = done("evaluate", out, "--data", data, "--json", file, *words)
    return file.read_bytes(), result.stdout, len(seen)


def without_cache() -> None:
    shutil.rmtree(cache_folder())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--group-by", "kind", "--control"],
        ["--no-experts", "--sample", "9"],
        ["--compute", "bfloat16"],
    ],
    ids=" ".join,
)
def test_the_second_call_writes_what_computing_would(out: Path, data: Path, words) -> None:
    first = evaluated(out, data, *words)
    assert first[2] > 0
    assert "before" not in first[1]
    second = evaluated(out, data, *words)
    assert second[2] == 0
    assert second[0] == first[0]
    assert second[1].count(KNOWN) == 1
    assert second[1].replace(f"{KNOWN}\n", "") == first[1]


def test_report_and_card_are_those_of_computing(out: Path, data: Path, tmp_path: Path) -> None:
    computed, kept_before = tmp_path / "a" / "out", tmp_path / "b" / "out"
    for folder in (computed, kept_before):
        shutil.copytree(out, folder)  # a copy has files of its own, and is measured by itself
    words = ["--data", data, "--group-by", "kind"]
    with passes() as seen:
        done("evaluate", computed, *words, "--card")
    assert seen
    without_cache()
    done("evaluate", kept_before, *words, "--quiet")
    with passes() as seen:
        said = done("evaluate", kept_before, *words, "--card", "--plot", tmp_path / "p.png").stdout
    assert not seen
    assert said.count(KNOWN) == 1
    for path in computed.iterdir():
        assert path.read_bytes() == (kept_before / path.name).read_bytes(), path.name
    # Report and card are no part of what was measured.
    assert evaluated(kept_before, data, "--group-by", "kind")[2] == 0


def test_estimated_losses_are_kept_with_their_control_group(
    shared_family: Family, merge, data: Path
) -> None:
    router = {"data": str(shared_family.seed_file())}
    parameters = {"num_experts": 12}
    out = merge(shared_family.recipe(parameters=parameters, router=router), "twelve")
    first, second = (evaluated(out, data) for _ in range(2))
    assert "estimated" in " ".join(first[1].split())
    assert "control" in json.loads(first[0])["buckets"]["losses"]
    assert second[0] == first[0]
    assert second[2] == 0


def test_only_what_is_missing_is_computed(out: Path, data: Path) -> None:
    without = evaluated(out, data, "--no-experts", "--no-rivals")
    whole = evaluated(out, data)
    assert "Measured on these samples before, and not computed again: the mixture." in whole[1]
    assert evaluated(out, data, "--no-experts", "--no-rivals")[0] == without[0]
    # Kinds of text are told apart after the measurement.
    grouped = evaluated(out, data, "--group-by", "kind")
    assert grouped[2] == 0
    control = evaluated(out, data, "--control")
    assert "again: the mixture, its single experts and the models beside it." in control[1]
    without_cache()
    afresh = evaluated(out, data, "--control")
    assert afresh[0] == control[0]
    assert max(whole[2], control[2]) < afresh[2]
    without_cache()
    assert evaluated(out, data, "--group-by", "kind")[0] == grouped[0]


def _weight(out: Path, data: Path) -> list[str]:
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    return []


def _config(out: Path, data: Path) -> list[str]:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 1}))
    return []


def _like_before(path: Path, content: bytes) -> None:
    """Put another file in the place of one, of the same size and time of change."""
    state = path.stat()
    assert len(content) == state.st_size
    new = path.with_name("new")
    new.write_bytes(content)
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(new, path)


def _weight_of_the_same_time(out: Path, data: Path) -> list[str]:
    path = out / "model.safetensors"
    content = path.read_bytes()
    _like_before(path, content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    return []


def _config_of_the_same_time(out: Path, data: Path) -> list[str]:
    path = out / "config.json"
    content = path.read_bytes()
    assert content.count(b'"num_experts_per_tok": 2') == 1
    _like_before(path, content.replace(b'"num_experts_per_tok": 2', b'"num_experts_per_tok": 1'))
    return []


def _tokenizer(out: Path, data: Path) -> list[str]:
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None  # no <s> before the text
    path.write_text(json.dumps(content))
    return []


def _text(out: Path, data: Path) -> list[str]:
    data.write_text(data.read_text().replace("0123", "0124", 1))
    return []


@pytest.mark.parametrize(
    "change",
    [
        *(_weight, _config, _tokenizer, _text),
        *(_weight_of_the_same_time, _config_of_the_same_time),
        *(["--sample", "7"], ["--max-length", "8"], ["--compute", "bfloat16"]),
        *(["--batch-tokens", "60"],),
    ],
    ids=lambda change: change[0] if isinstance(change, list) else change.__name__,
)
def test_what_may_give_other_numbers_is_measured(out: Path, data: Path, change) -> None:
    evaluated(out, data, "--no-experts")
    words = change if isinstance(change, list) else change(out, data)
    numbers, said, count = evaluated(out, data, "--no-experts", *words)
    assert count > 0
    assert "before" not in said
    without_cache()
    assert evaluated(out, data, "--no-experts", *words)[0] == numbers


@pytest.mark.parametrize(
    "harm", ["cut", "turned", "emptied", "text", "version", "folder", "link", "pipe"]
)
def test_what_cannot_be_trusted_is_measured_in_silence(
    out: Path, data: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(out, data)
    files = list((cache_folder() / "losses").iterdir())
    assert len(files) == 3  # the mixture, its experts, the models beside it
    for path in files:
        content = path.read_bytes()
        if harm == "cut":
            path.write_bytes(content[:-3])
        elif harm == "turned":  # one bit of one number
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "emptied":
            path.write_bytes(b"")
        elif harm == "text":
            path.write_text('{"sums": []}')
        elif harm == "folder":
            path.unlink()
            path.mkdir()
        elif harm in ("link", "pipe"):
            elsewhere = path.rename(out.parent / path.name)
            path.symlink_to(elsewhere) if harm == "link" else os.mkfifo(path)
    if harm == "version":
        monkeypatch.setattr(measured, "_MEASUREMENT", 0)
    assert evaluated(out, data) == first
    assert evaluated(out, data)[2] == (first[2] if harm == "folder" else 0)


@pytest.mark.parametrize("cache", ["file", "~nosuchuser/c", "\udcff"])
def test_a_folder_that_cannot_be_written_is_no_failure(
    out: Path, data: Path, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    folder = cache if cache.startswith("~") else str(tmp_path / cache)
    monkeypatch.setenv("UPIT_MERGE_CACHE", folder)
    first = evaluated(out, data)
    assert first[2] > 0
    assert evaluated(out, data) == first


def test_another_version_of_what_computes_is_measured(
    out: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(out, data)

    def version(package: str) -> str:
        return "5.99.0" if package == "transformers" else metadata.version(package)

    monkeypatch.setattr(measured, "version", version, raising=False)
    assert evaluated(out, data) == first
    assert evaluated(out, data)[2] == 0


@pytest.mark.parametrize(
    "moment",
    [
        *("evaluate.MixtureMeasurement.of", "evaluate.check_router_memory"),
        *("measured_mixture.run_mixture", "measured_mixture.sample_losses"),
        *("measured_mixture.assigned", "session.seed_set_for"),
    ],
)
def test_a_model_that_is_replaced_meanwhile_has_its_own_numbers(
    shared_family: Family, merge, data: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of fewer experts comes in its place, as of `shrink`, or of a mere `mv`."""
    router = {"data": str(shared_family.seed_file())}
    out, other = (
        merge(shared_family.recipe(parameters={"num_experts": count}, router=router), str(count))
        for count in (4, 3)
    )
    with monkeypatch.context() as patched:
        _swapped_at(f"upit_merge.commands.{moment}", out, other, patched)
        done("evaluate", out, "--data", data, "--control")
    assert not other.exists()
    second = evaluated(out, data, "--control")
    assert second[2] > 0
    without_cache()
    assert evaluated(out, data, "--control") == second


def _swapped_at(moment: str, old: Path, new: Path, patched: pytest.MonkeyPatch) -> None:
    """Put a folder in the place of another one when a function is first called."""
    original = resolve_name(moment)

    def swapped(*args: Any, **kwargs: Any) -> Any:
        if new.exists():
            old.rename(old.with_name("moved"))
            new.rename(old)
        return original(*args, **kwargs)

    patched.setattr(moment, swapped)


@pytest.mark.parametrize("moment", ["checkpoint_losses", "opened_rival", "after opening"])
def test_a_rival_that_is_replaced_meanwhile_has_its_own_numbers(
    shared_family: Family,
    out: Path,
    data: Path,
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rival, other = tmp_path / "rival", tmp_path / "other"
    shutil.copytree(shared_family.checkpoints[0], rival)
    shutil.copytree(shared_family.checkpoints[1], other)
    words = ["--against", f"rival={rival}"]
    with monkeypatch.context() as patched:
        # The check of all models opens them, too.
        patched.setattr("upit_merge.commands.evaluate.check_rivals", lambda *_: None)
        if moment == "after opening":
            original = compare.opened

            @contextlib.contextmanager
            def opened(*args: Any) -> Iterator[Any]:
                with original(*args) as inputs:
                    rival.rename(tmp_path / "moved")
                    other.rename(rival)
                    yield inputs

            patched.setattr(compare, "opened", opened)
        else:
            _swapped_at(f"upit_merge.commands.compare.{moment}", rival, other, patched)
        done("evaluate", out, "--data", data, *words)
    second = evaluated(out, data, *words)
    without_cache()
    assert evaluated(out, data, *words)[0] == second[0]


def test_numbers_of_another_shape_are_measured_again(
    shared_family: Family, out: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are whole, and lie where this model's would; one row, or one expert, is missing."""
    words = ["--control", "--against", f"rival={shared_family.base}"]
    first = evaluated(out, data, *words)
    without_cache()
    found: list[tuple[Any, Measured]] = []
    with monkeypatch.context() as patched:
        for module in ("measured_mixture", "compare"):
            patched.setattr(f"upit_merge.commands.{module}.keep", lambda *both: found.append(both))
        evaluated(out, data, *words)
    assert len(found) == 5
    for cut in range(2):
        for identity, numbers in found:
            less = {
                name: t[:-1] if cut == 0 or t.ndim == 1 else t[:, :-1]
                for name, t in numbers.tensors.items()
            }
            keep(identity, Measured(less, numbers.facts))
        assert evaluated(out, data, *words) == first


def test_there_is_an_end_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def times() -> list[str]:
        """Numbers of those that are still there, the oldest first."""
        return [str(i) for i in range(12) if kept({"number": i}) is not None]

    monkeypatch.setattr(measured, "_MOST_FILES", 5)
    for number in range(8):
        keep({"number": number}, Measured({"sums": torch.zeros(9)}, {"number": number}))
        for path in (cache_folder() / "losses").iterdir():  # clocks are coarse
            state = path.stat()
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10_000_000))
    assert times() == ["3", "4", "5", "6", "7"]
    size = max(path.stat().st_size for path in (cache_folder() / "losses").iterdir())
    monkeypatch.setattr(measured, "_MOST_BYTES", 3 * size)
    keep({"number": 8}, Measured({"sums": torch.zeros(9)}, {"number": 8}))
    assert times() == ["6", "7", "8"]
    assert kept({"number": 8}).facts == {"number": 8}


def test_processes_that_share_the_samples_share_what_is_kept(out: Path, data: Path) -> None:
    """One process may end as two: samples are shared, and their sums are the same."""
    file = out.parent / "shared.json"
    words = ["evaluate", out, "--data", data, "--json", file, "--quiet"]
    found = two(*words, module="upit_merge")
    assert found.returncode == 0, found.stderr
    first = file.read_bytes()
    assert evaluated(out, data)[0] == first
    assert evaluated(out, data)[2] == 0
    file.unlink()
    found = two(*words, module="upit_merge")
    assert found.returncode == 0, found.stderr
    assert file.read_bytes() == first
