"""What checkpoints must agree in: not with a base that is not read, nor in how a value is spelled.

The judge is transformers: a mixture of copies of a checkpoint computes what it makes of that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family, build_family
from tests.support.commands import done, refused
from tests.support.loading import load
from tests.support.naive import load_model
from upit_merge.models.dense import same_setting

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(3, 43).view(1, -1)
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
RAISED = {"rope_type": "default", "rope_theta": 1e6}

# What a trainer changes for a whole run, and the base has not.
OF_A_RUN: dict[str, dict[str, Any]] = {
    "linear rope": {"rope_parameters": LINEAR},
    "raised theta": {"rope_parameters": RAISED},
    "sliding window": {"sliding_window": 4},
}


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resize(folder: Path, size: int) -> None:
    """Give a model another vocabulary, as a trainer does that adds tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(size)
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)


def copies(family: Family, merge: Callable[..., Path], **parameters: Any) -> Path:
    """Make a mixture of two copies of the last checkpoint."""
    settings = {"num_experts": 2, "expansion": "copy", **parameters}
    return merge(family.recipe(models=[str(family.checkpoints[-1])], parameters=settings))


@torch.no_grad()
def assert_same_model(out: Path, checkpoint: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)(IDS).logits
    torch.testing.assert_close(load(out)(IDS).logits, expected, rtol=0, atol=1e-5)


# ---- the base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_A_RUN)
def test_settings_of_a_base_that_is_not_read(tmp_path, merge, caplog, name: str) -> None:
    family = build_family(tmp_path, kind="mistral", sliding_window=None)
    for folder in family.checkpoints:
        edit(folder, **OF_A_RUN[name])
    assert_same_model(copies(family, merge), family.checkpoints[-1])
    assert "only the base's FFNs are read, and the output is like the checkpoints" in caplog.text


def test_tokens_that_the_base_has_not(family, merge, caplog) -> None:
    for folder in family.checkpoints:
        resize(folder, 264)
    out = copies(family, merge)
    assert json.loads((out / CONFIG).read_text())["vocab_size"] == 264
    assert_same_model(out, family.checkpoints[-1])
    assert "has vocab_size 259, the checkpoints have 264" in caplog.text


def test_untied_in_training(tmp_path, merge) -> None:
    family = build_family(tmp_path, tie_word_embeddings=True)
    for folder in family.checkpoints:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
        model.save_pretrained(folder)
    assert_same_model(copies(family, merge), family.checkpoints[-1])


def test_nothing_of_the_base_but_ffns_decides_the_output(family, merge) -> None:
    """Noise in every other tensor of it, and another vocabulary: the same bytes."""
    document = family.recipe(parameters={"num_experts": 5})
    before = load_model(merge(document, "before"))
    resize(family.base, 300)
    tensors = load_file(family.base / WEIGHTS)
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            tensors[name] = torch.randn(tensor.shape)
    save_file(tensors, family.base / WEIGHTS, {"format": "pt"})
    after = load_model(merge(document, "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unread_base_still_needs_its_own_tensors(family) -> None:
    """By its own configuration, not by the checkpoints'."""
    for folder in family.checkpoints:
        resize(folder, 264)
    edit(family.base, vocab_size=264)
    recipe = family.write_recipe(family.recipe())
    sentence = (
        f"The base {family.base} should have {EMBEDDINGS} of shape [264, 32] by its config.json "
        "but has it in shape [259, 32]; use a complete checkpoint."
    )
    assert refused("plan", recipe) == sentence


# ---- spellings ---------------------------------------------------------------------------------

SPELLINGS: dict[str, dict[str, Any]] = {
    "type beside rope_type": {"rope_parameters": RAISED | {"rope_theta": 1e4, "type": "default"}},
    "theta as an integer": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "swish": {"hidden_act": "swish"},
    "eps as float32": {"rms_norm_eps": torch.tensor(1e-6).item()},
    "no quantisation": {"quantization_config": None},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_equal_settings_in_another_spelling(family, merge, caplog, name: str) -> None:
    before = load_model(merge(family.recipe(), "before"))
    for folder in family.checkpoints[1:]:
        edit(folder, **SPELLINGS[name])
    out = merge(family.recipe())
    assert all(torch.equal(before[key], value) for key, value in load_model(out).items())
    config = json.loads((out / CONFIG).read_text())
    # Others know this activation by one name.
    assert config["hidden_act"] == "silu"
    assert "quantization_config" not in config
    assert not said(caplog)
    assert_same_model(copies(family, lambda document: merge(document, "copies")), folder)


def test_scaled_ropes_are_told_apart() -> None:
    legacy = {"type": "linear", "rope_type": "linear", "factor": 2, "rope_theta": 10000}
    assert same_setting("rope_parameters", legacy, LINEAR)
    assert not same_setting("rope_parameters", legacy | {"factor": 4}, LINEAR)
    assert not same_setting("rope_parameters", {**LINEAR, "rope_type": "dynamic"}, LINEAR)
    assert not same_setting("rope_parameters", RAISED, LINEAR)
    assert not same_setting("rms_norm_eps", 1.00001e-6, 1e-6)


# ---- head and embeddings -----------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about models."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("upit_merge.m")]


def give_head(folder: Path, change: float) -> None:
    """Leave what merging an adapter with both tables leaves in a tied model's file."""
    tensors = load_file(folder / WEIGHTS)
    noise = torch.randn(tensors[EMBEDDINGS].shape, generator=torch.Generator().manual_seed(1))
    tensors[HEAD] = tensors[EMBEDDINGS] + change * noise
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_trained_head_is_kept(tmp_path, merge, caplog, kind: str) -> None:
    family = build_family(tmp_path, kind=kind, tie_word_embeddings=True)
    for folder in family.checkpoints:
        give_head(folder, 0.05)
    out = copies(family, merge)
    assert json.loads((out / CONFIG).read_text())["tie_word_embeddings"] is False
    head = load_file(family.checkpoints[-1] / WEIGHTS)[HEAD]
    assert torch.equal(load_model(out)[HEAD], head)
    assert_same_model(out, family.checkpoints[-1])
    assert "but its lm_head.weight is not its embeddings; the output has both" in caplog.text


def test_copy_of_the_embeddings_is_no_head(tmp_path, merge, caplog) -> None:
    family = build_family(tmp_path, tie_word_embeddings=True)
    before = load_model(copies(family, merge))
    for folder in family.checkpoints:
        give_head(folder, 0.0)
    out = copies(family, lambda document: merge(document, "again"))
    assert json.loads((out / CONFIG).read_text())["tie_word_embeddings"] is True
    after = load_model(out)
    assert before.keys() == after.keys()
    assert HEAD not in after
    assert not said(caplog)


def test_some_heads_are_trained_and_some_are_not(tmp_path) -> None:
    family = build_family(tmp_path, tie_word_embeddings=True)
    give_head(family.checkpoints[-1], 0.05)
    recipe = family.write_recipe(family.recipe())
    told = refused("plan", recipe)
    assert told.endswith(
        f"has one table for embeddings and head, {family.checkpoints[-1]}, which the backbone comes "
        "from, a head of its own; save all checkpoints in one way."
    )


def test_head_of_a_mixture_counts(tmp_path, merge) -> None:
    """A tied mixture of somebody else's, with a head: evaluated as transformers computes it."""
    family = build_family(tmp_path, tie_word_embeddings=True)
    out = copies(family, merge)
    give_head(out, 0.5)
    data = family.seed_file()
    done("router", out, "--data", data, "--quiet")
    result = out.parent / "result.json"
    done("evaluate", out, "--data", data, "--json", result, "--quiet")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer
    encode, total, count = tokenizer.from_pretrained(out), 0.0, 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([encode(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    report = json.loads(result.read_text())
    assert report["groups"]["all"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
