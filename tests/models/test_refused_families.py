"""What no format can express is refused in one sentence with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import build_family
from upit_merge.commands.plan import plan_recipe
from upit_merge.commands.run import RunOptions
from upit_merge.config.recipe import parse_recipe
from upit_merge.errors import UpitError
from upit_merge.models.families import FAMILIES, REFUSED
from upit_merge.models.families.refused import MIXTURES
from upit_merge.models.formats import FORMATS

QUIET = RunOptions(quiet=True)
PARTIAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    }
}
# Family, settings, architecture, what is said.
SETTINGS: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"mlp_bias": True}, "auto", "sets mlp_bias, which Mixtral cannot express; use a"),
    ("llama", {"mlp_bias": True}, "granitemoe", "sets mlp_bias, which GraniteMoE cannot express"),
    (
        "llama",
        {"attention_bias": True},
        "glm4_moe",
        "sets attention_bias, which GLM-4-MoE cannot express; write architecture: granitemoe, "
        "which vLLM reads not with attention biases, which it drops without a word.",
    ),
    ("granite", {"mlp_bias": True}, "auto", "sets mlp_bias, which GraniteMoE cannot express"),
    ("smollm3", {"mlp_bias": True}, "auto", "sets mlp_bias, which GraniteMoE-SWA cannot express"),
    (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 32},
        "auto",
        "sets use_sliding_window, on the layers that no reader but transformers windows",
    ),
    ("seed_oss", {"mlp_bias": True, "head_dim": 8}, "auto", "sets mlp_bias, which GLM-4-MoE"),
    (
        "seed_oss",
        {"attention_out_bias": True, "head_dim": 12, "attention_bias": False},
        "auto",
        "sets attention_out_bias, which GLM-4-MoE cannot express; use a model without it.",
    ),
    (
        "ernie4_5",
        {"use_bias": True, "head_dim": 8},
        "auto",
        "sets use_bias, but no expert of an ERNIE-4.5-MoE has biases; use a model without it.",
    ),
    (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 32},
        "auto",
        "sets use_sliding_window, which acts on other layers in a GLM-4-MoE",
    ),
    (
        "phi3",
        PARTIAL,
        "mixtral",
        "sets partial_rotary_factor, which Mixtral cannot express; write architecture: glm4_moe.",
    ),
    (
        "phi3",
        {"sliding_window": 32},
        "glm4_moe",
        "sets sliding_window, which GLM-4-MoE cannot express; write architecture: mixtral",
    ),
    (
        "phi3",
        {"sliding_window": 32, **PARTIAL},
        "auto",
        "sets partial_rotary_factor, which Mixtral cannot express; use a model without it.",
    ),
    (
        "ministral",
        {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
        "auto",
        "has a window in some layers only (layer_types), but a Mixtral in all or none",
    ),
]


def refusal(recipe: dict[str, Any]) -> str:
    with pytest.raises(UpitError) as caught:
        plan_recipe(parse_recipe(recipe), QUIET)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "settings", "architecture", "told"), SETTINGS)
def test_settings_of_a_family(
    tmp_path: Path, kind: str, settings: dict[str, Any], architecture: str, told: str
) -> None:
    family = build_family(tmp_path, count=1, kind=kind, **settings)
    message = refusal(family.recipe(architecture=architecture))
    assert message.startswith(f"Checkpoint {family.base} ") or str(family.root) in message
    assert told in message
    assert message.count(". ") == 0


def of_type(tmp_path: Path, model_type: str) -> str:
    family = build_family(tmp_path, count=1)
    for folder in (family.base, *family.checkpoints):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return refusal(family.recipe()).replace(str(family.base), "base")


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_no_format_can_express(tmp_path: Path, model_type: str) -> None:
    assert of_type(tmp_path, model_type) == (
        f"Checkpoint base has model_type {model_type!r}, of which no mixture can be made: "
        f"{REFUSED[model_type]}; docs/families.md has those of which one can."
    )


# A dense Gemma 4 and its mixture share the name: of the latter `enable_moe_block` tells.
@pytest.mark.parametrize("model_type", [*sorted({*FORMATS} - {*FAMILIES}), *sorted(MIXTURES)])
def test_mixtures_as_dense_models(tmp_path: Path, model_type: str) -> None:
    assert of_type(tmp_path, model_type) == (
        f"Checkpoint base has model_type {model_type!r}, a mixture of experts already; give dense "
        "checkpoints (upit-merge extend adds one to a mixture)."
    )


def test_others_are_told_of_the_families_that_there_are(tmp_path: Path) -> None:
    message = of_type(tmp_path, "mamba")
    assert message.startswith("Checkpoint base has model_type 'mamba'; use llama, mistral,")
    assert all(kind in message for kind in FAMILIES)


def test_nothing_is_refused_that_there_is_a_family_for() -> None:
    assert not {*FAMILIES} & {*REFUSED, *MIXTURES}
    assert {*FAMILIES} & {*FORMATS} == {"gemma4"}


def test_a_ministral_3_ends_where_queries_begin_to_grow(tmp_path: Path, merge, caplog) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e6,
        "llama_4_scaling_beta": 0.1,
    }
    family = build_family(tmp_path / "f", count=2, kind="ministral3", rope_parameters=rope)
    out = merge(family.recipe())
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 32
    assert "llama_4_scaling_beta" not in config["rope_scaling"]
    assert "Beyond 32 tokens a Ministral 3 scales its queries" in caplog.text
