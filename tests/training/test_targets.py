"""What LoRA trains of a model: every name that was given, or a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family, build_family
from tests.support.training import Finetune, changed
from upit_merge.errors import UpitError
from upit_merge.training.targets import dense_targets

LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "num_train_epochs": 1}


def kinds(names: set[str]) -> set[str]:
    """Tensors' names without layers and experts."""
    return {re.sub(r"\.\d+", "", name).removesuffix(".weight").split(".", 2)[-1] for name in names}


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    root = tmp_path_factory.mktemp("qwen3")
    family = build_family(root, kind="qwen3", count=2)
    source = json.dumps(family.recipe())
    run_recipe(parse_recipe(family.recipe()), source, root / "moe", RunOptions(quiet=True))
    return root / "moe"


EXPERTS = {f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
MIXTRALS = {f"block_sparse_moe.experts.{name}" for name in ("w1", "w2", "w3")}


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["gate_up_proj", "down_proj"], EXPERTS),
        (["gate_up_proj"], EXPERTS - {"mlp.experts.down_proj"}),
        (["gate_proj", "up_proj", "down_proj"], EXPERTS),
        (
            ["q_proj", "mlp.experts.gate_up_proj"],
            {"self_attn.q_proj", *EXPERTS} - {"mlp.experts.down_proj"},
        ),
        (["gate_up_proj", "gate_proj", "up_proj"], EXPERTS - {"mlp.experts.down_proj"}),
        (["q_proj", "gate"], {"self_attn.q_proj", "mlp.gate"}),
    ],
)
def test_experts_of_a_qwen3_moe(
    train: Finetune, qwen3_moe: Path, modules: list[str], expected: set[str]
) -> None:
    names = changed(qwen3_moe, train(qwen3_moe, lora_target_modules=modules, **LORA))
    assert kinds(names) == expected
    if "mlp.experts.gate_proj" in expected:  # of both layers and all experts
        assert len([name for name in names if name.endswith("gate_proj.weight")]) == 4


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["gate_up_proj", "down_proj"], MIXTRALS),
        (["w1", "w2", "w3"], MIXTRALS),
        (["q_proj", "gate_proj", "up_proj", "down_proj"], {"self_attn.q_proj", *MIXTRALS}),
        (["q_proj", "down_proj"], {"self_attn.q_proj", "block_sparse_moe.experts.w2"}),
    ],
)
def test_experts_of_a_mixtral(
    train: Finetune, moe: Path, modules: list[str], expected: set[str]
) -> None:
    """A dense model's names will do, too."""
    assert kinds(changed(moe, train(moe, lora_target_modules=modules, **LORA))) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_target_modules": ["q_proj", "w1", "w3"]},
            "lora_target_modules has w1, which matches nothing in the model; it has embed_tokens, "
            "q_proj, k_proj, v_proj, o_proj, lm_head, gate_proj, down_proj, up_proj, gate.",
        ),
        ({"lora_target_modules": ["c_attn"]}, "lora_target_modules has c_attn, which matches not"),
        ({"lora_target_modules": ["gate_proj"]}, "has gate_proj without up_proj, but an expert"),
        (
            {"lora_target_parameters": ["experts.w1"], "lora_target_modules": ["q_proj"]},
            "lora_target_parameters has experts.w1, which matches nothing in the model; it has "
            "down_proj, gate_up_proj.",
        ),
        (
            {"lora_modules_to_save": ["heads"], "lora_target_modules": ["q_proj"]},
            "lora_modules_to_save has heads, which matches nothing",
        ),
        (
            {"lora_target_modules": ["down_proj"], "lora_dropout": None},
            "lora_dropout is 0.05 (0.05 if it is not given), which PEFT cannot do where LoRA "
            "trains experts or the router; write lora_dropout: 0.0.",
        ),
        ({"lora_target_modules": "all-linear", "lora_dropout": 0.1}, "lora_dropout is 0.1 (0.05"),
    ],
)
def test_what_a_mixture_has_not(
    train: Finetune, qwen3_moe: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UpitError, match=re.escape(message)) as caught:
        train(qwen3_moe, **(LORA | settings))
    assert "\n" not in caught.value.message
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("name", ["gate_up_proj", "w1", "qproj"])
def test_what_a_dense_model_has_not(
    train: Finetune, four: Family, tmp_path: Path, name: str
) -> None:
    """Beside a name that it has, which alone was trained."""
    with pytest.raises(UpitError, match=f"lora_target_modules has {name}, .* up_proj, down_proj"):
        train(four.base, lora_target_modules=["up_proj", name], **LORA)
    assert not (tmp_path / "trained").exists()


def test_factors_of_a_tied_mixtures_table(
    train: Finetune, tmp_path: Path, merge: Callable[..., Path]
) -> None:
    family = build_family(tmp_path / "tied", count=2, tie_word_embeddings=True)
    moe = merge(family.recipe(), "tied-moe")
    for modules in (["q_proj", "embed_tokens"], ["q_proj", "lm_head"]):
        with pytest.raises(UpitError, match=r"lora_target_modules has (embed_tokens|lm_head), but"):
            train(moe, lora_target_modules=modules, **LORA)


def test_what_a_mixtures_modules_are_called_in_a_dense_model() -> None:
    dense = ["gate_proj", "up_proj", "down_proj"]
    assert dense_targets(["q_proj", "gate_up_proj", "down_proj"]) == ["q_proj", *dense]
    assert dense_targets(["w1", "w3", "w2", "gate"]) == dense
    assert dense_targets(dense) == dense
