"""`upit-merge finetune`, cut off and started again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.support.training import Finetune, changed, weights
from upit_merge.errors import UpitError
from upit_merge.training.run_state import RunState


class CutOffError(Exception):
    """Stands for the end of a process."""


_saved = RunState.saved


def saves_and_dies(*arguments: Any) -> None:
    """In place of `RunState.saved`: the process ends when its first checkpoint is recorded."""
    _saved(*arguments)
    raise CutOffError


@pytest.mark.parametrize("kind", ["ffn", "mixture", "lora"])
@pytest.mark.parametrize("saves", [1, 3])
def test_a_run_that_is_cut_off_ends_with_the_same_bytes(
    train: Finetune,
    moe: Path,
    four: Family,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    saves: int,
) -> None:
    lora = {
        "use_peft": True,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["mlp.experts.down_proj"],
    }
    settings: dict[str, Any] = {"ffn": {"train_modules": "ffn"}, "lora": lora, "mixture": {}}[kind]
    model = four.base if kind == "ffn" else moe
    whole = train(model, "whole", **settings)

    saved = RunState.saved
    count = 0

    def dies(self: RunState, step: int, seconds: float, limit: int | None) -> None:
        nonlocal count
        saved(self, step, seconds, limit)
        count += 1
        if count == saves:
            # As a kill would leave the checkpoint that comes next.
            torn = self.folder / f"checkpoint-{step + 4}"
            shutil.copytree(self.folder / f"checkpoint-{step}", torn, dirs_exist_ok=True)
            for path in torn.glob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:100])
            raise CutOffError

    monkeypatch.setattr(RunState, "saved", dies)
    with pytest.raises(CutOffError):
        train(model, "cut", **settings)
    monkeypatch.setattr(RunState, "saved", saved)
    cut = train(model, "cut", **settings)

    def files(folder: Path) -> dict[str, bytes]:
        found = folder.rglob("*.safetensors")
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    assert files(cut) == files(whole)
    assert not changed(whole, cut)


def test_a_run_that_is_finished_is_left_alone(
    train: Finetune, moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(moe)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    train(moe)
    assert "holds the result of this run already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UpitError, match="with other settings"):
        train(moe, learning_rate=1e-3)


def test_an_unfinished_run_does_not_go_on_with_other_settings(
    train: Finetune, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "saved", saves_and_dies)
        with pytest.raises(CutOffError):
            train(moe)
    with pytest.raises(UpitError, match=r"unfinished run, but training.learning_rate was 0.01 and"):
        train(moe, learning_rate=1e-3)
    # Where it goes on the screen is not what it computes.
    train(moe, disable_tqdm=True)


def test_killed_while_old_checkpoints_are_removed(
    train: Finetune, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(moe, "whole", save_total_limit=1)
    removed = RunState._remove

    def dies(self: RunState, step: int) -> None:
        (self.folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "_remove", dies)
        with pytest.raises(CutOffError):
            train(moe, "cut", save_total_limit=1)
    folders = sorted(path.name for path in (moe.parent / "cut").glob("checkpoint-*"))
    assert folders == ["checkpoint-4", "checkpoint-8"]
    monkeypatch.setattr(RunState, "_remove", removed)
    cut = train(moe, "cut", save_total_limit=1)
    assert not changed(whole, cut)
    assert not [path for path in cut.iterdir() if "checkpoint" in path.name]


def test_a_checkpoint_that_somebody_removed(
    train: Finetune, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "saved", saves_and_dies)
        with pytest.raises(CutOffError):
            train(moe)
    shutil.rmtree(moe.parent / "trained" / "checkpoint-4")
    with pytest.raises(UpitError, match="checkpoint-4 is gone"):
        train(moe)


def test_data_that_changed_is_other_data(
    train: Finetune, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text('{"text": "abc def"}\n' * 16)
    settings = {"data": None, "datasets": [{"path": "json", "data_files": str(data)}]}
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "saved", saves_and_dies)
        with pytest.raises(CutOffError):
            train(moe, **settings)
    data.write_text('{"text": "abc def"}\n' * 17)
    with pytest.raises(UpitError, match=r"other.jsonl changed since"):
        train(moe, **settings)


def test_killed_while_the_model_is_moved_into_place(
    train: Finetune, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    whole = train(moe, "whole")
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if Path(target).suffix == ".safetensors":
            raise CutOffError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(CutOffError):
            train(moe, "cut")
    assert not (whole.parent / "cut" / "config.json").exists()
    assert not changed(whole, train(moe, "cut"))


def test_a_disk_that_is_too_small_is_found_first(
    train: Finetune, moe: Path, four: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upit_merge.io import disk

    weights_of_dense = 4 * sum(tensor.numel() for tensor in weights(four.base).values())
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda folder: 8 * weights_of_dense)
        with pytest.raises(UpitError, match="8 checkpoints of the training"):
            train(four.base, save_steps=0.125)
        assert not (moe.parent / "trained").exists()
        # One at a time, with the optimiser's state, and one that is being written.
        train(four.base, save_steps=0.125, save_total_limit=1)
    train(four.base, "dense", save_steps=0.125)
