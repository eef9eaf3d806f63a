"""What 0.5.0 made is read, verified and changed; what it left unfinished goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from upit_merge.cli.main import main as upit_merge
from upit_merge.errors import UpitError
from upit_merge.io.shards import ShardWriter
from upit_merge.output.journal import Journal
from upit_merge.output.staging import STAGING
from upit_merge.pipeline.record import Record
from upit_merge.report.document import Report, read_report
from upit_merge.router.progress import Progress
from upit_merge.training.run_state import RunState

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "made_by_050"
SHARD_SIZE = ("--out-shard-size", "60000")
GATES = "model-00003-of-00003.safetensors"

# Of the files of an uninterrupted run of 0.5.0. Its gates are compared as numbers, as they are
# fitted with matrix products, which round differently on another processor.
SHA256 = {
    "config.json": "7c1a1643af27fcb164db3a0090d4474e0ae29676cda0118c202b4f8d72169a16",
    "generation_config.json": "96d19b7896ab9d773f818dc5f9a947bfad4c876c213aa601c39ca66a89230435",
    "mergekit_config.yml": "1c694197436e32a384efa78ebc06496b48f181694f0c1013d2aeaf3f7dc36adb",
    "model-00001-of-00003.safetensors": (
        "78718d5b82606b00363aaff8c9c340438d2e927581dc0204bdd1fe9caf65f552"
    ),
    "model-00002-of-00003.safetensors": (
        "e4021ebfbdaf071a1e7cd223bc5c00191a3484042e4a76b53708f0f9a9b08735"
    ),
    "model.safetensors.index.json": (
        "7d675e9c2565cc5712fbb1cdedf038f67e31e228d9a910a8adabb4328215f0a2"
    ),
    "tokenizer.json": "4a691796d3cc11d62d8110bef2dba0f96c430677d603e2237465a853b0882a5b",
    "tokenizer_config.json": "35c49649703c869bcc94ce0c259281124b35bba41af40686bf6b97cf898e8e2e",
}

# 0.5.0 copied the tokenizer's settings as transformers 5 saves them; now transformers 4 reads them.
SHA256_NOW = SHA256 | {
    "tokenizer_config.json": "6a443c5ceddcd3323e2d1f74b02c4745d62c466395f2cb7d9c6d5dcf2872e8a6"
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture that is the working directory, as its recipe's paths are relative."""
    folder = tmp_path / "made"
    shutil.copytree(FIXTURE, folder)
    monkeypatch.chdir(folder)
    return folder


def invoke(*args: object) -> Result:
    return CliRunner().invoke(upit_merge, [str(arg) for arg in args])


def succeed(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def all_but_gates(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if ".gate." not in name}


# ---- a finished mixture ------------------------------------------------------------------------


def test_its_report_is_read(made: Path) -> None:
    report = read_report(made / "moe")
    assert report.versions["upit-merge"] == "0.5.0"
    assert report.checkpoints == [f"./sft/checkpoint-{step}" for step in (500, 1000, 1500)]
    assert isinstance(report, Report)


def test_verify_agrees_with_it(made: Path) -> None:
    said = succeed("verify", "moe", "--gates")
    assert "moe is what its recipe makes of these models." in said
    assert "differ" not in said


def test_it_is_measured_and_its_page_made_anew(made: Path) -> None:
    moe = made / "moe"
    before = (moe / "README.md").read_text(encoding="utf-8")
    succeed("page", moe)
    told = "Write the model's id on the Hub, or its folder, for `your-name/moe`."
    now = "Where `your-name/moe` stands, write the model's id on the Hub, or its folder."
    assert (moe / "README.md").read_text(encoding="utf-8") == before.replace(told, now)
    succeed("evaluate", moe, "--data", "seed.jsonl", "--card", "--quiet")
    assert read_report(moe).document["evaluation"]["groups"]["all"]["samples"] == 24
    assert "## Evaluation" in (moe / "README.md").read_text(encoding="utf-8")
    assert digests(moe, SHA256) == SHA256
    succeed("verify", moe)


def test_its_router_is_trained_again(made: Path) -> None:
    moe = made / "moe"
    succeed("router", moe, "--data", "seed.jsonl", "--objective", "ridge", "--quiet")
    report = read_report(moe)
    assert report.document["router"]["settings"]["objective"] == "ridge"
    assert report.versions["upit-merge"] == "0.5.0"
    assert digests(moe, SHA256) == SHA256
    assert "fitted again" in succeed("verify", moe, "--gates")


def test_it_is_extended_and_shrunk(made: Path) -> None:
    moe = made / "moe"
    before = all_but_gates(moe)
    # The seed data is known from the report.
    succeed("extend", moe, "--model", "base", "--quiet")
    after = all_but_gates(moe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((moe / "config.json").read_text())["num_local_experts"] == 5
    assert "as recorded" in succeed("verify", moe)
    succeed("shrink", moe, "--experts", "3", "--data", "seed.jsonl", "--quiet")
    assert json.loads((moe / "config.json").read_text())["num_local_experts"] == 3


# ---- an unfinished run -------------------------------------------------------------------------


@pytest.fixture
def unfinished(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that was killed, as if it had happened in this folder, with this version."""
    out = made / "unfinished" / "moe"
    path = out / STAGING / "run.json"
    path.write_text(path.read_text().replace("@FOLDER@", str(made)))
    for file, state in json.loads(path.read_text())["identity"]["file"].items():
        time_of_change = int(state.split()[1])
        os.utime(file, ns=(time_of_change, time_of_change))
    # Another version may make other bytes and would refuse.
    monkeypatch.setattr("upit_merge.commands.finished.__version__", "0.5.0")
    return out


def test_an_unfinished_run_goes_on(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(unfinished / STAGING)
    assert len(journal.written) == 33
    assert len(journal.grams) == 6
    append, write = Journal.append, ShardWriter.write
    grams_again: set[int] = set()
    written_again: set[str] = set()

    def noted_append(
        self: Journal, grams: Mapping[int, torch.Tensor], written: Iterable[str]
    ) -> None:
        grams_again.update(grams)
        append(self, grams, written)

    def noted_write(self: ShardWriter, name: str, start: int, rows: torch.Tensor) -> None:
        written_again.add(name)
        write(self, name, start, rows)

    monkeypatch.setattr(Journal, "append", noted_append)
    monkeypatch.setattr(ShardWriter, "write", noted_write)
    with caplog.at_level(logging.INFO):
        succeed("run", "recipe.yml", "unfinished/moe", *SHARD_SIZE, "--quiet")
    assert "Going on with the unfinished run in unfinished/moe." in caplog.text
    assert not grams_again
    index = json.loads((unfinished / "model.safetensors.index.json").read_text())
    assert written_again == {*index["weight_map"]} - journal.written
    assert not (unfinished / STAGING).exists()
    assert digests(unfinished, SHA256_NOW) == SHA256_NOW
    fitted, reference = load_file(unfinished / GATES), load_file(FIXTURE / "moe" / GATES)
    assert fitted.keys() == reference.keys()
    largest = max(gate.abs().max() for gate in reference.values())
    for name, gate in reference.items():
        assert (fitted[name] - gate).abs().max() <= 0.01 * largest, name


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (("--random-seed", "3"), "parameters.seed was 0 and is 3"),
        (("--out-shard-size", "70000"), "--out-shard-size was 60000 and is 70000"),
    ],
)
def test_another_run_does_not_go_on_with_it(
    unfinished: Path, options: tuple[str, ...], change: str
) -> None:
    result = invoke("run", "recipe.yml", "unfinished/moe", *SHARD_SIZE, *options)
    assert result.exit_code == 1
    assert f"unfinished/moe holds an unfinished run, but {change}; undo that" in result.stderr


# ---- records of what was begun -----------------------------------------------------------------


def test_a_training_that_was_begun_goes_on(tmp_path: Path) -> None:
    identity = {"upit-merge": "0.5.0", "training": {"learning_rate": 0.01}, "file": {"/x": "1 2"}}
    record = {"identity": identity, "saved": [4, 8], "seconds": 3.5, "finished": False}
    (tmp_path / ".upit-finetune.json").write_text(json.dumps(record, indent=2))
    (tmp_path / "checkpoint-8").mkdir()
    state = RunState(tmp_path, identity)
    assert (state.newest, state.seconds) == (tmp_path / "checkpoint-8", 3.5)
    with pytest.raises(UpitError, match=r"but training.learning_rate was 0.01 and is 0.02; undo"):
        RunState(tmp_path, identity | {"training": {"learning_rate": 0.02}})


def test_stages_that_were_done_stay_so(tmp_path: Path) -> None:
    identity = {"settings": {"prepare": {"learning_rate": 0.01}}, "file": {"/x": "1 2"}}
    entries = {
        "prepare": {"identity": identity, "seconds": 12.3, "done": True},
        "merge": {"identity": {"recipe": {"dtype": None}}, "seconds": None, "done": False},
    }
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": entries}, indent=2))
    record = Record(tmp_path)
    assert record.is_done("prepare", identity)
    assert record.seconds("prepare") == 12.3
    assert record.was_begun("merge", {"recipe": {"dtype": None}})
    assert not record.is_done("merge", {"recipe": {"dtype": None}})


def test_gates_that_were_fitted_are_kept(tmp_path: Path) -> None:
    identity = {"upit-merge": "0.5.0", "settings": {"steps": 2}, "files": {"/x": "1 2"}}
    (tmp_path / "identity.json").write_text(json.dumps(identity, indent=2))
    save_file({"00000": torch.ones(2, 3)}, tmp_path / "gates.safetensors")
    assert len(Progress(tmp_path, identity).kept_layers("gates")) == 1
    assert not Progress(tmp_path, identity | {"settings": {"steps": 3}}).kept_layers("gates")
