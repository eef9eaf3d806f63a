"""There is a recipe for every family, and it runs; `plan` names the programs that run the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.commands import done
from tests.support.families import GEMMA4, QWEN35
from upit_merge.config.recipe import load_recipe
from upit_merge.models.families import FAMILIES
from upit_merge.models.formats import FORMATS, found_format

# Once each, whatever names they have: alone, or inside of a model of text and images.
NAMES = {family.title: family.model_type for family in FAMILIES.values()}.values()
FOLDER = Path(__file__).parents[2] / "recipes" / "families"
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": QWEN35,
    "gemma4_text": GEMMA4,
    "cohere2": {"head_dim": 8, "sliding_window": 12, "num_hidden_layers": 4},
    "ernie4_5": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "ministral": {"head_dim": 8, "sliding_window": 12},
    "ministral3": {"head_dim": 8},
    "seed_oss": {"head_dim": 12},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def test_there_is_one_for_every_family() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = build_family(tmp_path, kind=name, count=2, **SETTINGS.get(name, {}))
    family.seed_file()
    monkeypatch.chdir(tmp_path)
    path = FOLDER / f"{name}.yml"
    architecture = load_recipe(path)[0].architecture
    assert architecture == FAMILIES[name].targets[0]
    done("run", path, "out", "--quiet")
    model, told = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    assert found_format(model.config.to_dict()) is FORMATS[architecture]
    assert model(torch.arange(3, 40).unsqueeze(0)).logits.isfinite().all()
    done("verify", "out", "--quiet")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "qwen2",
            "Format: GLM-4-MoE, run by transformers, vLLM, llama.cpp, mlx-lm; architecture: "
            "granitemoe would be a GraniteMoE, run by transformers, vLLM (not with attention "
            "biases, which it drops without a word), llama.cpp, mlx-lm.",
        ),
        ("qwen3", "Format: Qwen3-MoE, run by transformers, vLLM, llama.cpp, mlx-lm."),
        ("olmo2", "Format: FlexOlmo, run by transformers."),
    ],
)
def test_plan_names_what_runs_each_choice(kind: str, told: str, tmp_path: Path) -> None:
    family = build_family(tmp_path, kind=kind, count=2)
    result = done("plan", family.write_recipe(family.recipe()), "--quiet")
    assert told in result.stdout.splitlines()
