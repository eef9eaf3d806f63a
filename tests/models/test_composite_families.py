"""Language models inside models of text and images, under every name that trainers give them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.conftest import build_family
from tests.support.commands import done, refused
from tests.support.composites import COPIED, KINDS, build, recipe
from tests.support.families import GEMMA4, INPUTS, KEYS_SHARED, QWEN35
from tests.support.lora import FFN
from upit_merge.errors import UpitError


def renamed(source: Path, folder: Path, change: Callable[[str], str | None]) -> Path:
    """Copy a model with other names of its tensors; None leaves one out."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    kept = {new: t for old, t in tensors.items() if (new := change(old)) is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def flat(source: Path, folder: Path, prefix: str = "model.") -> Path:
    """Save the language model alone; with a longer prefix as who has loaded it alone does."""
    whole = "model.language_model."

    def change(name: str) -> str | None:
        if name.startswith(whole):
            return prefix + name.removeprefix(whole)
        return name if "head" in name else None

    renamed(source, folder, change)
    AutoConfig.from_pretrained(source).text_config.save_pretrained(folder)
    return folder


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max() / other.abs().max()) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_a_model_of_images(
    kind: str, tmp_path: Path, merge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The towers are left out, which is said; names and settings are the published ones."""
    source = build(tmp_path / "model", kind)
    expected = AutoModelForImageTextToText.from_pretrained(source)
    if kind == "qwen3_5":
        source = renamed(
            source, tmp_path / "hub", lambda n: n if "visual.b" not in n else f"mtp.{n}"
        )
    with caplog.at_level(logging.WARNING):
        out = merge(recipe(kind, source, source))
    (told,) = [m for m in caplog.messages if "left out" in m]
    assert told.startswith(f"Of {source} the ")
    assert "vision tower" in told
    assert ("further tokens" in told) == (kind == "qwen3_5")
    ids = torch.arange(3, 200).unsqueeze(0)
    with torch.no_grad():
        assert close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected(ids).logits)
    names = load_file(out / "model.safetensors").keys()
    assert {n.split(".layers.")[0] for n in names if ".layers." in n} == {"model.language_model"}
    assert {n for n in names if "experts.gate_up_proj" in n}
    assert not {n for n in names if "visual" in n or "vision" in n or "mtp" in n}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].endswith("ForConditionalGeneration")
    assert config["text_config"]["num_experts"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_all_spellings_are_one_model(kind: str, tmp_path: Path, merge: Any) -> None:
    """On one base: as published, flat, flat with the whole model's names, and without a head's."""
    source = build(tmp_path / "model", kind)
    alone = flat(source, tmp_path / "alone")
    mixed = flat(source, tmp_path / "mixed", "model.language_model.")
    body = renamed(
        source, tmp_path / "body", lambda n: n if "head" in n else n.removeprefix("model.")
    )
    reference = load_file(merge(recipe(kind, source, source)) / "model.safetensors")
    for model in (alone, mixed, body):
        out = merge(recipe(kind, source, model), f"out-{model.name}")
        tensors = load_file(out / "model.safetensors")
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[name], reference[name]) for name in reference)


@pytest.mark.parametrize("trained", ["whole", "text"])
@pytest.mark.parametrize("based", ["whole", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind: str, trained: str, based: str, tmp_path: Path, merge: Any) -> None:
    """Trained on the whole model or its language model, used with either."""
    source = build(tmp_path / "model", kind)
    alone = flat(source, tmp_path / "alone")
    of_all = AutoModelForImageTextToText if trained == "whole" else AutoModelForCausalLM
    torch.manual_seed(1)
    settings = LoraConfig(
        r=2, target_modules=r"(?!.*vis[iu]).*layers.*\.(gate_proj|up_proj|down_proj|q_proj)"
    )
    model = get_peft_model(of_all.from_pretrained(source), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name and "layers" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    changes = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    changes["target_modules"] = [*FFN, "q_proj"]  # a list is checked against the base's modules
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(changes))
    ids = torch.arange(3, 200).unsqueeze(0)
    with torch.no_grad():
        expected = model.merge_and_unload()(ids).logits
    base = source if based == "whole" else alone
    out = merge(recipe(kind, base, f"{base}+{tmp_path / 'adapter'}"))
    with torch.no_grad():
        assert close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected)


def test_other_families_stay_refused(tmp_path: Path, merge: Any) -> None:
    source = build(tmp_path / "model", "qwen3_5")
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(UpitError, match="as models of text and images have"):
        merge(recipe("qwen3_5", source, source))


def test_a_gate_of_attention_cannot_be_missing(tmp_path: Path, merge: Any) -> None:
    source = build(tmp_path / "model", "qwen3_5")
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attn_output_gate"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(UpitError, match=r"attn_output_gate: false, which a Qwen3\.5-MoE cannot"):
        merge(recipe("qwen3_5", source, source))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            INPUTS,
            r"has inputs of their own for its layers \(hidden_size_per_layer_input\), so that",
        ),
        (INPUTS | KEYS_SHARED, "has inputs of their own for its layers"),
    ],
)
def test_layers_that_cannot_be_computed_one_by_one(
    settings: dict[str, Any], reason: str, tmp_path: Path, merge: Any
) -> None:
    """Their mixtures are made, but a router is refused before anything is written."""
    family = build_family(tmp_path, kind="gemma4_text", count=2, **(GEMMA4 | settings))
    router = {"data": str(family.seed_file())}
    with pytest.raises(UpitError, match=reason):
        merge(family.recipe(router=router), "with-router")
    assert not (tmp_path / "with-router").exists()
    out = merge(family.recipe())
    done("verify", out, "--quiet")
    told = refused("router", out, "--data", router["data"])
    assert "so that it cannot be computed layer by layer, as router, evaluate" in told


def test_text_that_is_read_both_ways_is_refused(tmp_path: Path, merge: Any) -> None:
    both = {"use_bidirectional_attention": "all"}
    family = build_family(tmp_path, kind="gemma4_text", count=1, **(GEMMA4 | both))
    with pytest.raises(UpitError, match="use_bidirectional_attention: all, so that it does not"):
        merge(family.recipe())


def test_a_mixture_is_no_checkpoint(tmp_path: Path, merge: Any) -> None:
    family = build_family(tmp_path, kind="gemma4_text", count=1, **GEMMA4)
    out = merge(family.recipe(parameters=COPIED))
    with pytest.raises(UpitError, match=r"is a mixture already \(enable_moe_block\); use a model"):
        merge(family.recipe(models=[str(out)]), "again")
    (told,) = refused("router", family.base, "--data", family.seed_file()).splitlines()
    assert "has model_type 'gemma4_text'; the router needs a" in told


def test_an_odd_width_cannot_be_split(tmp_path: Path, merge: Any) -> None:
    odd = QWEN35 | {"intermediate_size": 47}
    family = build_family(tmp_path, kind="qwen3_5_text", count=1, **odd)
    with pytest.raises(UpitError, match=r"has an odd intermediate_size \(47\) to split; use"):
        merge(family.recipe(parameters=COPIED | {"shared": "split"}))


@pytest.mark.parametrize("kind", KINDS)
def test_ropes_of_layers_are_compared(kind: str, tmp_path: Path, merge: Any) -> None:
    """Checkpoints that turn queries otherwise, in whatever kind of layer, are not of one run."""
    first, second = (flat(build(tmp_path / n, kind), tmp_path / f"{n}-alone") for n in "ab")
    path = first / "config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    (rope if kind == "qwen3_5" else rope["full_attention"])["rope_theta"] = 123456.0
    path.write_text(json.dumps(config))
    with pytest.raises(UpitError, match="has rope_parameters"):
        merge(recipe(kind, second, first, second))


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_norms_after_experts_do_not_show(scale: float, tmp_path: Path, merge: Any) -> None:
    """However little an FFN of a Gemma 4 gives, and whatever its layers are multiplied with."""
    family = build_family(tmp_path, kind="gemma4_text", count=1, **GEMMA4)
    path = family.checkpoints[0] / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("mlp.down_proj.weight"):
            tensor *= scale
        if name.endswith("layer_scalar"):
            tensor *= 0.7
    save_file(tensors, path, {"format": "pt"})
    out = merge(family.recipe(parameters=COPIED))
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (out, family.checkpoints[0])
        )
    assert float((one - other).abs().max() / other.abs().max()) < 1e-5


def test_keys_of_no_layer_are_refused(tmp_path: Path, merge: Any) -> None:
    family = build_family(tmp_path, kind="gemma4_text", count=1, **GEMMA4)
    path = family.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_kv_shared_layers": 9}))
    with pytest.raises(UpitError, match="is not a valid gemma4_text configuration"):
        merge(family.recipe())
