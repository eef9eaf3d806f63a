"""A model under torch.compile's names is not trained from random weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import Family
from tests.support.spoilt import BASE, assert_sentence, refusal, renamed
from tests.support.training import trainer_in

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def test_a_compiled_model_is_refused_and_the_docs_mend_it(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 40).unsqueeze(0)
    before = AutoModelForCausalLM.from_pretrained(family.base)(ids).logits
    renamed(BASE, lambda name: f"_orig_mod.{name}")(family)
    assert_sentence(
        refusal(trainer_in(tmp_path), family.base),
        f"{family.base}/model.safetensors has _orig_mod.…, a name of torch.compile's that training "
        "does not find; remove _orig_mod. from the names, as docs/troubleshooting.md shows.",
    )
    assert not (tmp_path / "trained").exists()
    section = PAGE.read_text(encoding="utf-8").partition("a name of torch.compile's")[2]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet
    monkeypatch.chdir(family.base)
    exec(compile(snippet[1], str(PAGE), "exec"), {})
    assert "model.norm.weight" in load_file(family.base / "model.safetensors")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(family.base)(ids).logits, before)
    trainer_in(tmp_path)(family.base, num_train_epochs=1)
