"""`upit-merge pipeline`: all stages in order, skipped when done, the same model after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Family
from tests.support.crash import forked, wait
from tests.support.lora import save_adapter, with_adapters
from tests.support.pipelines import TRAINING, Written, writer
from tests.support.warm import Program
from upit_merge.errors import UpitError
from upit_merge.output.identity import file_states
from upit_merge.pipeline import dense_start
from upit_merge.pipeline.config import load_pipeline
from upit_merge.pipeline.run import run_pipeline
from upit_merge.pipeline.stages import stages_of


def model_files(run: Path) -> dict[str, bytes]:
    """What must be the same however often the pipeline was killed."""
    found = [*run.rglob("*.safetensors"), *run.rglob("config.json"), run / "evaluation.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def whole(
    four: Family, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Written, Path, dict[str, bytes]]:
    """A pipeline that nothing has disturbed: how its file is written, its folder, its files."""
    folder = tmp_path_factory.mktemp("pipeline")
    written = writer(folder, four)
    run_pipeline(written(baseline=True), quiet=True)
    return written, folder / "run", model_files(folder / "run")


def test_all_stages_once(
    whole: tuple[Written, Path, dict[str, bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    written, run, before = whole
    path = written(baseline=True)
    report = json.loads((run / "model" / "upit_report.json").read_text())
    assert report["post_training"]["steps"] == 8
    assert report["router"]["data"]["samples"] == 24
    others = [other["model"] for other in report["evaluation"]["others"]]
    assert others == [
        "base model",
        "last checkpoint",
        "dense, same tokens",
        "mixture before post-training",
    ]
    evaluated = json.loads((run / "evaluation.json").read_text())
    assert set(evaluated["groups"]) == {"letters", "digits", "all"}
    assert evaluated["others"][0]["perplexity"] > evaluated["groups"]["all"]["perplexity"]
    page = (run / "model" / "README.md").read_text()
    for section in ("# run", "## Post-training", "## Evaluation", "upit-merge finetune"):
        assert section in page
    assert len(list((run / "dense").glob("checkpoint-*"))) == 1

    # Once more: nothing is done.
    capfd.readouterr()
    run_pipeline(path, quiet=True)
    assert capfd.readouterr().out.count(": done\n") == 5
    assert model_files(run) == before

    # The files it left are what the other commands take.
    from upit_merge.config.recipe import load_recipe

    assert load_recipe(run / "recipe.yml")[0].router is not None

    # Other settings are not mixed with what is done.
    with pytest.raises(UpitError, match=r"prepare is done in .*learning_rate was 0.01 and is 0.02"):
        run_pipeline(written(prepare={**TRAINING, "learning_rate": 0.02, "save_steps": 0.25}))
    changed = written(baseline=True, router={"sample": 12})
    with pytest.raises(UpitError, match=r"router.sample was 24 and is 12"):
        run_pipeline(changed, redo="evaluate", quiet=True)
    assert (run / "evaluation.json").exists()
    with pytest.raises(UpitError, match=r"but router.sample was 24 and is 12.*--redo merge"):
        run_pipeline(changed, quiet=True)
    prepared = {name: data for name, data in before.items() if name.startswith("prepare")}
    run_pipeline(changed, redo="merge", until="merge", quiet=True)
    after = model_files(run) if (run / "evaluation.json").exists() else None
    assert after is None
    assert not (run / "model").exists()
    for name, data in prepared.items():
        assert (run / name).read_bytes() == data
    report = json.loads((run / "moe" / "upit_report.json").read_text())
    assert report["router"]["data"]["samples"] == 12


def test_checkpoints_that_are_there_are_not_prepared(
    written: Written, four: Family, tmp_path: Path
) -> None:
    checkpoints = str(four.root / "sft" / "checkpoint-*")
    path = written(checkpoints=checkpoints, prepare=None, post_train=None, merge={})
    run_pipeline(path, quiet=True)
    run = tmp_path / "run"
    assert not (run / "prepare").exists()
    report = json.loads((run / "moe" / "upit_report.json").read_text())
    assert [Path(name).name for name in report["checkpoints"]] == [
        f"checkpoint-{step}" for step in (500, 1000, 1500, 2000)
    ]
    assert report["evaluation"]["groups"]["all"]["samples"] == 32


# ---- killed ------------------------------------------------------------------------------------


def started(path: Path, folder: Path) -> Program:
    words = ("upit_merge", "pipeline", path, "--quiet")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("a") as log:
        return Program(*words, stdout=subprocess.PIPE, stderr=log, env=environment)


def kill_when(process: Program, line: str, sign: Callable[[], bool]) -> None:
    """Kill a pipeline when it has printed a line and then shown a sign; with it its child."""
    assert process.stdout is not None
    for told in process.stdout:
        if told.startswith(line):
            break
    else:
        raise AssertionError(f"never printed {line}")
    until = time.monotonic() + 120
    while not sign() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    assert process.poll() is None, f"ended before it could be killed: {line}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a killed parent's child is killed on Linux")
def test_killed_in_every_stage_it_ends_with_the_same_model(
    whole: tuple[Written, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    written, folder, reference = whole
    path, run = written("cut", baseline=True), folder.parent / "cut"

    def checkpoint(folder: str) -> Callable[[], bool]:
        return lambda: any((run / folder).glob("checkpoint-*/*.safetensors"))

    staged = run / "moe" / ".upit-staging" / "model"
    signs: list[tuple[str, Callable[[], bool]]] = [
        ("[1/5] prepare: fine", checkpoint("prepare")),
        # It is short: on a busy machine it may be over before anybody looks.
        ("[2/5] merge: grow", lambda: any(map(Path.exists, (staged, run / "moe" / "config.json")))),
        ("[3/5] post_train: train", checkpoint("model")),
        ("[4/5] baseline: train", checkpoint("dense")),
        ("[5/5] evaluate: measure", lambda: True),
    ]
    for line, sign in signs:
        kill_when(started(path, tmp_path), line, sign)
    process = started(path, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()[-2000:]
    assert output.count(": done\n") == 4
    assert model_files(run) == reference


# ---- mistakes ----------------------------------------------------------------------------------


def test_nothing_but_its_own_is_removed(written: Written, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "mine.txt").write_text("mine")
    with pytest.raises(UpitError, match=r"is not empty .it holds model. and not a pipeline's"):
        run_pipeline(written(), quiet=True)
    (run / "pipeline.json").write_text('{"stages": {}}')
    with pytest.raises(UpitError, match="model is in the way of the stage post_train"):
        run_pipeline(written(), quiet=True)
    assert (run / "model" / "mine.txt").read_text() == "mine"
    (run / "pipeline.json").write_text('{"stages": {"prepare": {}}}')
    with pytest.raises(UpitError, match="is not the record of a pipeline"):
        run_pipeline(written(), quiet=True)


def test_one_pipeline_at_a_time(written: Written, tmp_path: Path) -> None:
    from upit_merge.output.lock import exclusive

    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run"), pytest.raises(UpitError, match="Another run is writing"):
        run_pipeline(written(), quiet=True)


def test_a_merge_that_was_complete_but_not_recorded(
    written: Written, four: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upit_merge.pipeline.record import Record

    keys: dict[str, Any] = {
        "checkpoints": str(four.root / "sft" / "checkpoint-*"),
        "prepare": None,
        "post_train": None,
        "evaluate": None,
    }

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "done", dies)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(written(**keys), quiet=True)
    moe = tmp_path / "run" / "moe"
    before = (moe / "upit_report.json").stat().st_mtime_ns
    run_pipeline(written(**keys), quiet=True)
    assert (moe / "upit_report.json").stat().st_mtime_ns == before
    # Made with other settings, and never recorded: it is made again.
    (tmp_path / "run" / "pipeline.json").write_text(
        json.dumps({"stages": {"merge": {"identity": {"recipe": {}}}}})
    )
    run_pipeline(written(**keys, merge={"parameters": {"num_experts": 4}}), quiet=True)
    assert json.loads((moe / "config.json").read_text())["num_local_experts"] == 4


def test_lora_in_both_stages_beside_a_dense_model(written: Written, tmp_path: Path) -> None:
    lora = {**TRAINING, "use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
    ffn = ["gate_proj", "up_proj", "down_proj"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    path = written(
        prepare={**lora, "save_steps": 0.5, "lora_target_modules": ffn},
        post_train={
            **lora,
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_target_parameters": experts,
        },
        baseline=True,
    )
    run_pipeline(path, quiet=True)
    report = json.loads((tmp_path / "run" / "model" / "upit_report.json").read_text())
    named = {other["model"]: other["perplexity"] for other in report["evaluation"]["others"]}
    assert len(named) == 4
    assert named["dense, same tokens"] < named["last checkpoint"] < named["base model"]


@pytest.mark.parametrize("end", ["error", "killed"])
def test_the_last_checkpoint_is_made_whole_or_not_at_all(
    written: Written, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Cut off before the tokenizer is there, and once more when the training has begun."""
    with_adapters(family)
    path = written(
        base_model=str(family.base),
        checkpoints=str(family.root / "lora" / "checkpoint-*"),
        prepare=None,
        baseline=True,
    )
    stage = next(s for s in stages_of(load_pipeline(path), quiet=True) if s.name == "baseline")
    run = tmp_path / "run"
    run.mkdir()
    commands: list[list[str]] = []
    monkeypatch.setattr("upit_merge.pipeline.stages._wait", lambda c: commands.append(c) or 0)

    def fail(*_: Any, **__: Any) -> None:
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk is gone")

    def run_without_tokenizer() -> None:
        dense_start.copy_tokenizer_files = fail
        stage.run(False)

    status = wait(forked(run_without_tokenizer))
    assert status == (-signal.SIGKILL if end == "killed" else 1)
    assert os.listdir(run) == ([".last.draft"] if end == "killed" else [])
    # As an earlier version left it: half a model, which is not taken for a whole one.
    (run / "last").mkdir()
    shutil.copy(family.base / "config.json", run / "last")

    stage.run(True)
    assert sorted(os.listdir(run)) == ["baseline.yml", "last"]
    tensors = load_file(run / "last" / "model.safetensors")
    for name, tensor in save_adapter(family.base, tmp_path / "again", seed=2).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-6)
    assert (run / "last" / "tokenizer.json").is_file()
    before = file_states((run / "last").iterdir(), "")
    stage.run(True)
    assert file_states((run / "last").iterdir(), "") == before  # else training would not go on
    assert commands[0] == commands[1]


# ---- what the stages are told ------------------------------------------------------------------


def test_settings_are_filled_in(written: Written, four: Family, tmp_path: Path) -> None:
    own = tmp_path / "prepare.yml"
    own.write_text(yaml.safe_dump({"output_dir": "elsewhere", "datasets": [{"path": "a/b"}]}))
    loaded = load_pipeline(written(prepare=str(own), baseline={"learning_rate": 1e-4}, seed=3))
    prepare = loaded.prepare_settings()
    assert prepare["model_name_or_path"] == str(four.base)
    assert prepare["output_dir"] == str(tmp_path / "run" / "prepare")
    assert prepare["seed"] == 3
    assert (prepare["num_train_epochs"], prepare["save_steps"]) == (2, 0.125)
    assert "data" not in prepare  # it names its own
    post = loaded.post_train_settings()
    assert (post["num_train_epochs"], post["router_aux_loss_coef"]) == (2, 0.01)
    assert post["warmup_steps"] == 0.1
    dense = loaded.baseline_settings("x")
    assert dense["learning_rate"] == 1e-4
    assert "router_aux_loss_coef" not in dense
    warm = load_pipeline(written(post_train={"warmup_steps": 0.3}, baseline=True))
    # A dense model that were trained in another way would be no comparison.
    assert warm.baseline_settings("x")["warmup_steps"] == 0.3
    recipe = loaded.recipe()
    assert recipe["parameters"] == {"seed": 3, "num_experts": 5}
    assert recipe["models"] == [{"model": f"{tmp_path}/run/prepare/checkpoint-*"}]
    assert recipe["router"]["data"] == str(tmp_path / "train.jsonl")
