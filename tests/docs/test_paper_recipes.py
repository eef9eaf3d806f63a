"""The paper's schedules: what they say, and that TRL's own command takes those it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Family
from upit_merge.pipeline.config import load_pipeline
from upit_merge.training.finetune import finetune
from upit_merge.training.settings import load_job

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
TRAINING = sorted(path.name for path in PAPER.glob("[14]-*.yml"))


@pytest.mark.parametrize("name", TRAINING)
def test_schedules_are_those_of_the_paper(name: str) -> None:
    job = load_job(PAPER / name)
    assert job.training.num_train_epochs == 2
    lora = "lora" in name
    assert job.model.use_peft == lora
    assert job.training.learning_rate == (2e-4 if lora else 2e-5)
    if name.startswith("1"):
        assert job.training.save_steps == 0.125  # of two epochs: every quarter
    else:
        assert job.training.router_aux_loss_coef > 0


def test_every_command_in_them_names_a_file_that_is_there() -> None:
    for path in PAPER.glob("*.yml"):
        for word in path.read_text().split():
            if word.startswith("recipes/"):
                assert (PAPER.parent.parent / word).is_file(), f"{path.name}: {word}"


@pytest.mark.parametrize("name", ["pipeline-lora.yml", "pipeline-ffn.yml"])
def test_pipelines_take_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAPER.parent.parent)
    pipeline = load_pipeline(PAPER / name)
    assert pipeline.prepare_settings()["save_steps"] == 0.125
    assert pipeline.post_train_settings()["save_total_limit"] == 1
    assert pipeline.parsed_recipe().parameters.num_experts == (8 if "lora" in name else 4)


def train_file(family: Family) -> Path:
    rows = [{"text": f"sample {i}: " + "abcdef"[i % 6] * 9} for i in range(32)]
    path = family.root / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["1-prepare-lora.yml", "1-prepare-full.yml"])
def test_trl_itself_takes_those_it_can(family: Family, tmp_path: Path, name: str) -> None:
    settings = yaml.safe_load((PAPER / name).read_text())
    del settings["dataset_name"]
    # The same schedule at the size of a test.
    settings |= {
        "model_name_or_path": str(family.base),
        "datasets": [{"path": "json", "data_files": str(train_file(family))}],
        "output_dir": str(tmp_path / "out"),
        "max_length": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "dtype": "float32",
    }
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(settings))
    run(sys.executable, "-m", "trl.scripts.sft", "--config", str(config))
    found = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "out").glob("checkpoint-*"))
    assert found == list(range(2, 17, 2))  # eight, every quarter of an epoch


def test_several_processes_train_together(family: Family, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    settings = {
        "model_name_or_path": str(family.base),
        "data": str(train_file(family)),
        "output_dir": str(tmp_path / "out"),
        "train_modules": "ffn",
        "num_train_epochs": 1,
        "save_steps": 0.5,
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "use_cpu": True,
    }
    config.write_text(yaml.safe_dump(settings))
    launch = ("torch.distributed.run", "--nproc-per-node", "2")
    command = ("-m", "upit_merge", "finetune", str(config), "--quiet")
    run(sys.executable, "-m", *launch, *command)
    names = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4"}  # 32 samples, 8 at a time


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_mixture_spread_over_gpus_comes_back_whole(moe: Path, family: Family) -> None:
    """With the settings that recipes/paper has for accelerate, on as many GPUs as there are."""
    out = moe.parent / "out"
    settings = {
        "model_name_or_path": str(moe),
        "data": str(train_file(family)),
        "output_dir": str(out),
        "num_train_epochs": 1,
        "save_steps": 0.5,
        "per_device_train_batch_size": 4,
        "max_length": 32,
    }
    config = moe.parent / "config.yml"
    config.write_text(yaml.safe_dump(settings))
    launch = ("accelerate.commands.launch", "--config_file", str(PAPER / "fsdp.yml"))
    count = ("--num_processes", str(torch.cuda.device_count()))
    run(sys.executable, "-m", *launch, *count, "-m", "upit_merge", "finetune", str(config))

    def names(folder: Path) -> set[str]:
        return {name for path in folder.glob("*.safetensors") for name in load_file(path)}

    assert names(out) == names(moe)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mixed_precision_on_a_gpu(moe: Path, family: Family) -> None:
    config = moe.parent / "config.yml"
    settings = {
        "model_name_or_path": str(moe),
        "data": str(train_file(family)),
        "output_dir": str(moe.parent / "out"),
        "max_steps": 4,
        "save_steps": 2,
        "max_length": 32,
    }
    config.write_text(yaml.safe_dump(settings))
    finetune(config, quiet=True)
    report = json.loads((moe.parent / "out" / "upit_report.json").read_text())
    assert report["post_training"]["steps"] == 4
