"""Mistakes in a pipeline: one sentence, before anything is trained where that is possible."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Family, byte_tokenizer
from tests.support.pipelines import Written
from upit_merge.errors import UpitError
from upit_merge.pipeline.checks import check_pipeline
from upit_merge.pipeline.config import load_pipeline
from upit_merge.pipeline.run import run_pipeline


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"post_tain": {}}, r"unknown key post_tain \(did you mean post_train\?\)"),
        ({"base_model": None}, "base_model is missing"),
        ({"data": None}, "data is missing"),
        ({"checkpoints": "x/*"}, "checkpoints and prepare are both given"),
        ({"post_train": None, "baseline": True}, "baseline has no meaning without post_train"),
        ({"merge": {"router": {}}}, "merge: router is at the top level"),
        ({"merge": {"models": []}}, "merge: models is filled in"),
        ({"device": "gpu"}, "device is 'gpu', expected cpu, cuda or auto"),
        ({"evaluate": {"data": "x", "groupby": "y"}}, r"evaluate.groupby \(did you mean group_by"),
        ({"prepare": {"output_dir": "x"}}, "prepare.output_dir is filled in by the pipeline"),
        ({"prepare": "nowhere.yml"}, "training configuration nowhere.yml does not exist"),
        ({"prepare": {"learning_rat": 1}}, r"unknown key learning_rat"),
        ({"post_train": {"train_modules": "x"}}, "train_modules"),
        ({"merge": {"parameters": {"num_expert": 4}}}, "merge and router: unknown key"),
        ({"router": {"data": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"evaluate": {"data": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"base_model": "./nowhere"}, "nowhere"),
        ({"launch": "'"}, "launch"),
        ({"baseline": {"output_dir": "x"}}, "baseline.output_dir is filled in"),
        ({"baseline": True, "post_train": {"train_modules": "router"}}, "baseline: train_modules"),
        (
            {"prepare": {"use_peft": True, "lora_target_modules": ["q_proj"]}},
            "lora_target_modules has no part of the FFN",
        ),
        (
            {"prepare": {"use_peft": True, "lora_target_modules": ["up_proj", "gate_up_proj"]}},
            "run.yml: prepare: lora_target_modules has gate_up_proj, which matches nothing",
        ),
        (
            {"post_train": {"use_peft": True, "lora_target_modules": ["q_proj", "expert"]}},
            "run.yml: post_train: lora_target_modules has expert, which matches nothing in the mod",
        ),
        (
            {"post_train": {"use_peft": True, "lora_target_modules": ["gate_up_proj"]}},
            "run.yml: post_train: lora_dropout is 0.05",
        ),
        ({"device": "cuda:7"}, "cuda"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    written: Written, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpitError, match=message) as caught:
        run_pipeline(written(**keys), quiet=True)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "run" / "prepare").exists()


def test_tokens_that_a_mixture_cannot_carry_are_refused_before_anything_is_trained(
    written: Written, tmp_path: Path
) -> None:
    """Unless the preparation has added them already."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "chat")
    template = {"chat_template_path": str(tmp_path / "chat")}
    lora = {"use_peft": True, "lora_target_modules": ["q_proj"], **template}
    with pytest.raises(UpitError, match="makes a vocabulary of 320 of one of 259") as caught:
        run_pipeline(written(post_train=lora), quiet=True)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "run" / "prepare").exists()
    check_pipeline(load_pipeline(written(post_train=lora, prepare=template)))


def test_a_base_in_bin_files_is_refused_before_anything_is_trained(
    written: Written, four: Family, tmp_path: Path
) -> None:
    """Training would read it, and the merge after that would not."""
    base = tmp_path / "pickled"
    shutil.copytree(four.base, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(
        UpitError, match=r"run.yml: base_model is .*pickled', whose weights are in "
    ):
        run_pipeline(written(base_model=str(base)), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_stage_that_is_not_there(written: Written) -> None:
    with pytest.raises(UpitError, match="--redo is router, but the stages are prepare, merge"):
        run_pipeline(written(), redo="router")


def test_a_launcher_that_is_not_there(written: Written) -> None:
    with pytest.raises(UpitError, match="no-such-launcher cannot be started"):
        run_pipeline(written(launch="no-such-launcher --x"), quiet=True)


def test_a_stage_that_fails_says_how_to_go_on(written: Written, tmp_path: Path) -> None:
    path = written(launch=f"{sys.executable} -c 'import_nothing' ")
    with pytest.raises(UpitError, match="The stage prepare ended early"):
        run_pipeline(path, quiet=True)
    run_pipeline(written(), until="prepare", quiet=True)
    assert len(list((tmp_path / "run" / "prepare").glob("checkpoint-*"))) == 4
