"""`upit-merge finetune` on mixtures of the other formats: all weights, the router alone, LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.commands import done
from tests.support.naive import load_model

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "glm4_moe": ("qwen2", {}, {}),
    "glm4_moe, split, dense": ("qwen2", {}, {"shared": "split", "dense_layers": 1}),
    "granitemoe": ("granite", {"residual_multiplier": 0.4, "logits_scaling": 3.0}, {}),
}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "router": {"train_modules": "router"},
    "lora": {
        "use_peft": True,
        "lora_target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_dropout": 0.0,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_writes_what_was_read(tmp_path: Path, merge: Any, kind: str, way: str) -> None:
    """Under the same names, trained where it should be, with what readers look for."""
    dense, settings, parameters = KINDS[kind]
    family = build_family(tmp_path, count=2, kind=dense, **settings)
    out = merge(family.recipe(parameters={"num_experts": 2, **parameters}))
    target, file = tmp_path / "trained", tmp_path / "finetune.yml"
    job = {
        "model_name_or_path": str(out),
        "output_dir": str(target),
        "data": str(family.seed_file()),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        **WAYS[way],
    }
    file.write_text(yaml.safe_dump(job))
    done("finetune", file, "--quiet")
    before, after = load_model(out), load_model(target)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gates = {name for name in before if name.endswith((".gate.weight", ".router.layer.weight"))}
    assert changed
    if way == "router":
        assert changed == gates
    if way == "lora":
        assert not changed & gates
        assert {name for name in changed if "q_proj" in name}
        assert {name for name in changed if ".experts." in name or "put_linear" in name}
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (out, target))
    assert {key: new.get(key) for key in old if key != "torch_dtype"} == {
        key: value for key, value in old.items() if key != "torch_dtype"
    }
    _model, told = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
