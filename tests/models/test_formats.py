"""Output formats: the names and settings each is known by, and that a third needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.naive import PROJECTIONS, grow, load_model
from upit_merge.commands.plan import plan_recipe
from upit_merge.commands.run import RunOptions
from upit_merge.commands.verify import verify_output
from upit_merge.config.recipe import parse_recipe
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.models import formats
from upit_merge.models.families import FAMILIES
from upit_merge.models.formats.qwen3_moe import Qwen3Moe
from upit_merge.models.mixture import opened_mixture

QUIET = RunOptions(quiet=True)


def test_names_are_those_of_the_published_qwen3_moes(tmp_path, merge) -> None:
    """What llama.cpp's converter and vLLM look for, and nothing else."""
    family = build_family(tmp_path / "f", count=2, kind="qwen3")
    names = set(load_model(merge(family.recipe(parameters={"num_experts": 3}))))
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        expected |= {f"{prefix}.self_attn.{p}_proj.weight" for p in "qkvo"}
        expected |= {f"{prefix}.self_attn.{p}_norm.weight" for p in "qk"}
        expected |= {f"{prefix}.{n}_layernorm.weight" for n in ("input", "post_attention")}
        expected.add(f"{prefix}.mlp.gate.weight")
        expected |= {
            f"{prefix}.mlp.experts.{e}.{p}_proj.weight"
            for e in range(3)
            for p in ("gate", "up", "down")
        }
    assert names == expected


def test_the_configuration_is_a_published_one_s(tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", count=2, kind="qwen3")
    out = merge(family.recipe(parameters={"num_experts": 3}))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    wanted = {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 8}
    wanted |= {"moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": []}
    assert config.items() >= wanted.items()
    assert "num_local_experts" not in config
    read = AutoConfig.from_pretrained(out)
    assert (read.num_experts, read.moe_intermediate_size, read.sliding_window) == (3, 48, None)
    assert "qwen3_moe" in (out / "README.md").read_text().split("---")[1]


def test_qwen3_experts_are_the_naive_ones(tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", kind="qwen3")
    document = family.recipe(parameters={"num_experts": 6, "density": 0.5, "seed": 3})
    out = merge(document | {"router": {"data": str(family.seed_file()), "refine": {"steps": 2}}})
    lineage = json.loads((out / "upit_report.json").read_text())["lineage"]
    base, *checkpoints = map(load_model, (family.base, *family.checkpoints))
    expected = grow(base, checkpoints, lineage, 0.5, 3, "once", torch.float32)
    dense = {short: projection for projection, short in PROJECTIONS.items()}
    written = load_model(out)
    for name, values in expected.items():
        prefix, short = (
            name.replace("block_sparse_moe", "mlp").removesuffix(".weight").rsplit(".", 1)
        )
        assert torch.equal(written[f"{prefix}.{dense[short]}.weight"], values)
    verify_output(out, None, QUIET)


WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "wanted", "told"),
    [
        ("llama", {}, "qwen3_moe", "architecture: qwen3_moe is made from qwen3 checkpoints, but "),
        (
            "qwen3",
            {},
            "mixtral",
            "architecture: mixtral is made from llama, mistral, ministral, "
            "ministral3, phi3 checkpoints",
        ),
        ("qwen3", WINDOWED, "auto", " sets use_sliding_window, which acts on "),
        ("qwen3", {"attention_bias": True}, "auto", " sets attention_bias, which Qwen3-MoE cannot"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], wanted: str, told: str
) -> None:
    family = build_family(tmp_path, count=2, kind=kind, **settings)
    recipe = parse_recipe(family.recipe(architecture=wanted))
    with pytest.raises(UpitError) as caught:
        plan_recipe(recipe, QUIET)
    assert told in str(caught.value)


def test_a_qwen3_moe_with_dense_layers_is_refused(tmp_path, merge) -> None:
    out = merge(build_family(tmp_path / "f", count=2, kind="qwen3").recipe())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0]}))
    with opened_mixture(out) as moe, pytest.raises(UpitError, match="has dense layers beside"):
        LayerwiseMixture(moe, torch.device("cpu"))


@pytest.mark.parametrize("wanted", ["auto", "qwen3_moe"])
def test_the_format_can_be_named(tmp_path, merge, wanted: str) -> None:
    family = build_family(tmp_path / "f", count=2, kind="qwen3")
    model = AutoModelForCausalLM.from_pretrained(merge(family.recipe(architecture=wanted)))
    assert type(model).__name__ == "Qwen3MoeForCausalLM"


def test_a_third_format_is_one_class_and_one_entry(tmp_path, merge, monkeypatch) -> None:
    """It is registered, and recipe, merge, router and verify take it."""

    class Other(Qwen3Moe):
        name = "other_moe"
        title = "Other"
        block = "feed_forward"

    monkeypatch.setitem(formats.FORMATS, "other_moe", Other())
    monkeypatch.setattr(FAMILIES["qwen3"], "targets", ("qwen3_moe", "other_moe"), raising=False)
    family = build_family(tmp_path / "f", count=2, kind="qwen3")
    router = {"data": str(family.seed_file())}
    out = merge(family.recipe(architecture="other_moe", router=router))
    assert json.loads((out / "config.json").read_text())["model_type"] == "other_moe"
    assert "model.layers.1.feed_forward.experts.1.up_proj.weight" in load_model(out)
    verify_output(out, None, QUIET)
