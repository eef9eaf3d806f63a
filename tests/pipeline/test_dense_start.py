"""The dense baseline's start: what PEFT computes with an adapter, as one complete model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_family
from tests.support.loading import load
from upit_merge.errors import UpitError
from upit_merge.pipeline.dense_start import write_complete

FFN = ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "FFNs alone": (259, {}),
    "factors of a tied head": (259, {"target_modules": [*FFN, "lm_head"]}),
    "resized, both tables": (264, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_complete_model(tmp_path: Path, kind: str) -> None:
    size, settings = KINDS[kind]
    family = build_family(tmp_path, count=0, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    torch.manual_seed(1)
    model.resize_token_embeddings(size)
    lora = LoraConfig(**{"r": 2, "target_modules": FFN, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "whole").mkdir()
    write_complete(f"{family.base}+{tmp_path / 'adapter'}", tmp_path / "whole")
    ids = torch.arange(3, 43).view(1, -1)
    with torch.no_grad():
        found, expected = load(tmp_path / "whole")(ids).logits, adapted.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (family.base, tmp_path / "whole")]
    assert tokenizers[0]("a b").input_ids == tokenizers[1]("a b").input_ids


def test_adapter_of_another_model(tmp_path: Path) -> None:
    family = build_family(tmp_path / "one", count=0)
    other = build_family(tmp_path / "other", count=0, intermediate_size=64)
    model = AutoModelForCausalLM.from_pretrained(other.base)
    get_peft_model(model, LoraConfig(r=2, target_modules=FFN)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UpitError, match="was trained for another base"):
        write_complete(f"{family.base}+{tmp_path / 'adapter'}", tmp_path)
