"""`upit-merge finetune`: what is trained, what comes out, and that a run can be cut off."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Family, build_family
from tests.support.training import STEPS, Finetune, changed, weights
from upit_merge.errors import UpitError

# ---- dense models, stage 1 ---------------------------------------------------------------------


def test_ffns_alone_become_checkpoints_a_recipe_takes(
    train: Finetune, four: Family, merge: Callable[..., Path]
) -> None:
    out = train(four.base, train_modules="ffn", save_steps=0.125)
    found = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in found] == [f"checkpoint-{s}" for s in range(2, STEPS + 1, 2)]
    for path in found:
        names = changed(four.base, path)
        assert len(names) == 2 * 3  # the FFNs of both layers
        assert all(".mlp." in name for name in names)
        # What only training needs, and TRL's card, are not kept.
        assert not [*path.glob("optimizer*"), *path.glob("rng*"), *path.glob("README.md")]
    document = {
        "merge_method": "upit",
        "base_model": str(four.base),
        "models": [{"model": f"{out}/checkpoint-*"}],
    }
    report = json.loads((merge(document) / "upit_report.json").read_text())
    assert [Path(name).name for name in report["checkpoints"]] == [path.name for path in found]


def test_adapters_become_checkpoints_a_recipe_takes(
    train: Finetune, four: Family, merge: Callable[..., Path]
) -> None:
    modules = ["gate_proj", "up_proj", "down_proj"]
    out = train(four.base, use_peft=True, lora_r=4, lora_target_modules=modules)
    document = {
        "merge_method": "upit",
        "base_model": str(four.base),
        "models": [{"model": f"{out}/checkpoint-*"}],
    }
    moe = merge(document)
    assert json.loads((moe / "config.json").read_text())["num_local_experts"] == 4
    expert = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    assert not torch.equal(weights(moe)[expert.format(0)], weights(moe)[expert.format(3)])


def test_all_weights_are_trained_unless_told_otherwise(train: Finetune, four: Family) -> None:
    out = train(four.base, keep_checkpoints=True)
    names = changed(four.base, out / f"checkpoint-{STEPS}")
    assert names == set(weights(four.base))


# ---- mixtures, stage 4 -------------------------------------------------------------------------


def test_a_mixture_keeps_its_names_settings_and_tokenizer(
    train: Finetune, moe: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (moe / "README.md").write_text((moe / "README.md").read_text())
    out = train(moe)
    assert changed(moe, out) == set(weights(moe))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "mergekit_config.yml"):
        assert (out / name).read_bytes() == (moe / name).read_bytes()
    assert not list(out.glob("checkpoint-*"))
    assert str(tmp_path) not in (out / ".upit-finetune.json").read_text()
    _model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] | told["unexpected_keys"]

    report = json.loads((out / "upit_report.json").read_text())
    record = report["post_training"]
    assert record["steps"] == STEPS
    assert record["samples"] == 32
    assert record["data"] == "train.jsonl"
    assert record["settings"]["train_modules"] == "all"
    assert [entry["step"] for entry in record["history"]] == [4, 8, 12, 16]
    losses = [entry["loss"] for entry in record["history"]]
    assert losses[-1] < losses[0]
    for entry in record["history"]:
        assert 0 < entry["routing_entropy"] <= 1
        assert 0 < entry["load_entropy"] <= 1
        assert entry["aux_loss"] >= 1.9  # n · Σ f_i · P_i with f summing to 2: even is 2
    assert set(report["files"]) <= {path.name for path in out.iterdir()}
    assert "## Post-training" in (out / "README.md").read_text()


def test_every_format_keeps_its_names(train: Finetune, tmp_path: Path, merge: Any) -> None:
    family = build_family(tmp_path / "qwen", kind="qwen3", count=2, tie_word_embeddings=True)
    moe = merge(family.recipe(), "qwen-moe")
    out = train(moe, train_modules="ffn")
    names = changed(moe, out)
    assert names
    assert all(".mlp." in name for name in names)
    assert any(name.endswith("mlp.gate.weight") for name in names)


def test_the_router_alone_is_trained(train: Finetune, moe: Path) -> None:
    names = changed(moe, train(moe, train_modules="router"))
    assert names == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)}


def test_what_lora_learns_is_added_to_the_weights(train: Finetune, moe: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    out = train(
        moe,
        use_peft=True,
        lora_r=4,
        lora_dropout=0.0,
        lora_target_modules=["q_proj", "v_proj"],
        lora_target_parameters=parameters,
    )
    names = changed(moe, out)
    kinds = {name.split(".", 3)[-1].rsplit(".experts.", 1)[-1] for name in names}
    assert {"self_attn.q_proj.weight", "block_sparse_moe.gate.weight", "0.w1.weight"} <= kinds
    assert not any("embed" in name or "norm" in name for name in names)
    assert not (out / "adapter_config.json").exists()
    # The routers are found where PEFT has wrapped them.
    history = json.loads((out / "upit_report.json").read_text())["post_training"]["history"]
    assert all({"routing_entropy", "dead_experts", "aux_loss"} <= entry.keys() for entry in history)


def test_a_list_of_one_module_is_a_list(train: Finetune, moe: Path) -> None:
    names = changed(moe, train(moe, use_peft=True, lora_target_modules=["q_proj"]))
    assert names == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_load_balancing_evens_the_load(train: Finetune, moe: Path) -> None:
    def load(coefficient: float) -> float:
        out = train(moe, f"balance-{coefficient}", router_aux_loss_coef=coefficient)
        report = json.loads((out / "upit_report.json").read_text())
        return float(report["post_training"]["history"][-1]["load_entropy"])

    assert load(1.0) > load(0.0)


def test_verify_says_that_it_was_trained_further(train: Finetune, moe: Path) -> None:
    from upit_merge.commands.run import RunOptions
    from upit_merge.commands.verify import verify_output

    with pytest.raises(UpitError, match="trained further"):
        verify_output(train(moe), None, RunOptions(quiet=True))


def test_an_evaluation_of_the_model_before_is_not_kept(train: Finetune, moe: Path) -> None:
    report = json.loads((moe / "upit_report.json").read_text())
    report["evaluation"] = {"data": "x"}
    (moe / "upit_report.json").write_text(json.dumps(report))
    assert "evaluation" not in json.loads((train(moe) / "upit_report.json").read_text())


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, r"unknown key learning_rat \(did you mean learning_rate\?\)"),
        ({"train_modules": "attention"}, r"train_modules.*invalid choice|train_modules is"),
        ({"train_modules": "ffn", "use_peft": True}, "has no meaning with use_peft"),
        ({"train_modules": "router"}, "leaves nothing to train"),
        ({"save_only_model": True}, "save_only_model would keep a run"),
        ({"data": "nowhere.jsonl"}, "data is nowhere.jsonl, but there is no such file"),
        ({"data": None}, "data is missing"),
        ({"dataset_name": "a/b"}, "data and TRL's own dataset keys are both given"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"model_name_or_path": "./nowhere"}, "The model ./nowhere does not exist"),
        ({"save_strategy": "sometimes"}, "sometimes"),
        ({"num_train_epochs": "two"}, "num_train_epochs|num-train-epochs"),
        ({"router_aux_loss_coef": 0.01}, "is not a Mixture-of-Experts model"),
        ({"keep_checkpoints": False}, "keep_checkpoints: false would leave nothing"),
        ({"save_strategy": "no"}, "save_strategy is no"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch"),
        ({"model_revision": "v2"}, "write model_name_or_path: .*@v2"),
        ({"dataset_streaming": True}, "streaming has no meaning"),
        ({"dataset_train_split": "validation"}, "has no split validation"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    train: Finetune, four: Family, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpitError, match=message) as caught:
        train(four.base, **settings)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "trained").exists()


def test_a_tied_mixture_is_not_parted(train: Finetune, tmp_path: Path, merge: Any) -> None:
    family = build_family(tmp_path / "tied", count=2, tie_word_embeddings=True)
    moe = merge(family.recipe(), "tied-moe")
    with pytest.raises(UpitError, match="lora_modules_to_save has lm_head"):
        train(moe, use_peft=True, lora_modules_to_save=["lm_head"])


def test_a_mixture_that_could_not_be_written_is_refused_first(
    train: Finetune, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(UpitError):
        train(moe)
    assert not (moe.parent / "trained").exists()


def test_data_that_cannot_be_read(train: Finetune, four: Family, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{nothing\n")
    with pytest.raises(UpitError, match=r"broken\.jsonl line 1 is not JSON"):
        train(four.base, data=str(broken))
    broken.write_text('{"number": 1}\n')
    with pytest.raises(UpitError, match="line 1 has `number` and no usable column"):
        train(four.base, "other", data=str(broken))


def test_an_output_folder_with_something_in_it(train: Finetune, four: Family) -> None:
    with pytest.raises(UpitError, match="is not empty"):
        train(four.base, output_dir=str(four.base))
    assert (four.base / "config.json").is_file()


def test_without_trl(
    train: Finetune, four: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UpitError, match=r'pip install "upit-merge\[train\]"'):
        train(four.base)


def test_a_mixture_is_warmed_up_unless_told_otherwise(train: Finetune, moe: Path) -> None:
    settings = {"train_modules": "router", "num_train_epochs": 1}
    default, tenth, none = (
        weights(train(moe, out, **settings, **given))
        for out, given in (
            ("default", {}),
            ("tenth", {"warmup_steps": 0.1}),
            ("none", {"warmup_steps": 0}),
        )
    )
    assert all(torch.equal(default[name], tenth[name]) for name in default)
    assert not all(torch.equal(default[name], none[name]) for name in default)


def test_gates_of_single_experts_learn_nothing_from_the_text(
    train: Finetune, moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"train_modules": "router", "num_train_epochs": 1, "router_aux_loss_coef": 0.0}
    single = tmp_path / "single"
    shutil.copytree(moe, single)
    config = json.loads((single / "config.json").read_text())
    moved = {}
    for folder, count in ((moe, 2), (single, 1)):
        config["num_experts_per_tok"] = count
        (folder / "config.json").write_text(json.dumps(config))
        before = weights(folder)
        caplog.clear()
        after = weights(train(folder, f"with-{count}", **settings))
        moved[count] = max(float((before[name] - after[name]).abs().max()) for name in before)
        assert ("routes a token to one expert" in caplog.text) == (count == 1)
    assert moved[1] < moved[2] / 20  # by how a weight divided by itself is rounded


def test_a_dense_model_is_warmed_up_only_if_asked(tmp_path: Path) -> None:
    from upit_merge.training.settings import WARM_UP, load_job

    config = tmp_path / "c.yml"
    config.write_text(f"model_name_or_path: x\noutput_dir: {tmp_path}/o\ndata: a/b\n")
    job = load_job(config)
    assert job.training.warmup_steps == 0
    job.warm_up()
    assert job.training.warmup_steps == WARM_UP
    told = load_job(config, ["--warmup_steps", "3"])
    told.warm_up()
    assert told.training.warmup_steps == 3
