"""Configurations of mergekit-moe against mergekit-moe itself: experts, backbone, gates, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_family
from tests.support.commands import done, refused
from upit_merge.config.recipe import load_recipe
from upit_merge.errors import UpitError

# From mergekit's docs/moe.md, word for word.
CLOWN_CAR = r"""
base_model: NousResearch/Hermes-2-Pro-Mistral-7B
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: NousResearch/Hermes-2-Pro-Mistral-7B
    positive_prompts:
      - "<|im_start|>user\nHello, who are you?<|im_end|>"
      - "<|im_start|>user\nI need help with"
  - source_model: BioMistral/BioMistral-7B-DARE
    positive_prompts:
      - "As a doctor of medicine,"
  - source_model: PocketDoc/Dans-AdventurousWinds-7b
    positive_prompts:
      - "[Genres: Science Fiction]\n[Tags: humor, old school, sci fi]"
      - "> get ye flask"
      - "[Mode: Interactive Storyteller]"
  - source_model: VAGOsolutions/SauerkrautLM-7b-HerO
    positive_prompts:
      - "<|im_start|>user\nWie geht es dir?<|im_end|>"
      - "Das ist ein Satz auf Deutsch."
"""
UPCYCLING = """
base_model: BEE-spoke-data/smol_llama-220M-GQA
gate_mode: random
dtype: bfloat16
experts:
  - source_model: BEE-spoke-data/smol_llama-220M-GQA
  - source_model: BEE-spoke-data/smol_llama-220M-GQA
  - source_model: BEE-spoke-data/smol_llama-220M-GQA
  - source_model: BEE-spoke-data/smol_llama-220M-GQA
# and then train the sucker!
"""


def mergekit_moe(config: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    """Run mergekit's own code in this process; returns what transformers loads of its output."""
    from click.testing import CliRunner
    from mergekit.scripts.moe import main

    result = CliRunner().invoke(main, [str(config), str(out), "--device", "cpu", *words])
    assert result.exit_code == 0, (result.output, result.exception)
    return loaded(out)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def is_gate(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def families(root: Path, document: dict[str, Any], **config: Any) -> None:
    """Give every model that a configuration names a folder of that name; its base's is larger."""
    names = dict.fromkeys(
        [document["base_model"], *(expert["source_model"] for expert in document["experts"])]
    )
    for seed, name in enumerate(names):
        made = build_family(root / "made" / str(seed), count=0, seed=seed, **config)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        made.base.rename(root / name)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (CLOWN_CAR, "mistral", ()),
        (UPCYCLING, "llama", ("--i-understand-this-is-not-useful-without-training",)),
    ],
)
def test_the_examples_of_its_documentation_run_unchanged(
    tmp_path, monkeypatch, text, kind, words
) -> None:
    """The same experts and backbone, bit for bit; what is stored reproduces the output."""
    document = yaml.safe_load(text)
    families(tmp_path, document, kind=kind, dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    config = Path("config.yml")
    config.write_text(text)
    theirs = mergekit_moe(config, Path("theirs"), *words)
    done("plan", config, "ours", "--quiet")
    printed = done("run", config, "ours").output
    assert "config.yml is a configuration of mergekit-moe, run as a recipe of upit:" in printed
    ours = loaded(Path("ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype == torch.bfloat16
        if not is_gate(name):
            assert torch.equal(tensor, ours[name]), name
    stored = Path("ours/mergekit_config.yml").read_text()
    assert stored.startswith("# Translated from config.yml, of mergekit-moe.\n")
    done("verify", "ours", "--gates")
    done("verify", "ours", "--recipe", config)
    settings = json.loads(Path("ours/config.json").read_text())
    expected = json.loads(Path("theirs/config.json").read_text())
    for key in ("num_local_experts", "num_experts_per_tok", "vocab_size", "model_type"):
        assert settings[key] == expected[key]
    tokens = [
        AutoTokenizer.from_pretrained(out)("Das ist ein").input_ids for out in ("ours", "theirs")
    ]
    assert tokens[0] == tokens[1]


def test_experts_of_another_vocabulary_lend_their_ffns(tmp_path, monkeypatch, caplog) -> None:
    """As Hermes and BioMistral have different ones."""
    document = yaml.safe_load(CLOWN_CAR)
    families(tmp_path, document, kind="mistral", dtype=torch.bfloat16)
    (tmp_path / "BioMistral/BioMistral-7B-DARE").rename(tmp_path / "old")
    other = build_family(
        tmp_path / "other", count=0, seed=9, kind="mistral", vocab_size=320, dtype=torch.bfloat16
    )
    other.base.rename(tmp_path / "BioMistral/BioMistral-7B-DARE")
    monkeypatch.chdir(tmp_path)
    config = Path("config.yml")
    config.write_text(CLOWN_CAR)
    theirs = mergekit_moe(config, Path("theirs"))
    done("run", config, "ours")
    ours = loaded(Path("ours"))
    assert all(torch.equal(t, ours[n]) for n, t in theirs.items() if not is_gate(n))
    assert "BioMistral-7B-DARE has vocab_size 320" in caplog.text
    done("verify", "ours", "--gates")
    recipe = yaml.safe_load(Path("ours/mergekit_config.yml").read_text())
    for parameters in ({"backbone": "average"}, {"expansion": "genetic"}):
        changed = {**recipe, "parameters": {**recipe["parameters"], **parameters}}
        Path("other.yml").write_text(yaml.safe_dump(changed))
        assert "has vocab_size 3" in refused("run", "other.yml", "other")


def test_what_its_hidden_gates_are_beside_ours(tmp_path, monkeypatch) -> None:
    """Of one dense model, computed by transformers alone: both are means of states, of others.

    mergekit's rows: the mean of the prompts' last tokens as they enter a layer, of unit length.
    Ours: the mean of all their tokens as the router sees them, all rows times one factor.
    """
    experts = [
        {"source_model": "a", "positive_prompts": ["one two three", "four"]},
        {"source_model": "a", "positive_prompts": ["DEFG HIJK"]},
    ]
    document = {"base_model": "a", "dtype": "float32", "experts": experts}
    families(tmp_path, document)
    monkeypatch.chdir(tmp_path)
    config = Path("config.yml")
    config.write_text(yaml.safe_dump(document))
    theirs = mergekit_moe(
        config, Path("theirs"), "--i-understand-this-is-not-useful-without-training"
    )
    recipe = load_recipe(config)[0].model_dump(exclude_none=True, mode="json")
    prompts = recipe["router"]["prompts"]
    recipe["router"] = {"prompts": prompts, "objective": "hidden", "compute": "float32"}
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    done("run", "recipe.yml", "ours")
    ours = loaded(Path("ours"))
    dense = AutoModelForCausalLM.from_pretrained("a", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("a")
    for index, layer in enumerate(dense.model.layers):
        entering, seen = [], []
        for expert in experts:
            found: list[torch.Tensor] = []
            hook = layer.post_attention_layernorm.register_forward_hook(
                lambda _module, _inputs, output, found=found: found.append(output[0])
            )
            last = []
            for prompt in expert["positive_prompts"]:
                ids = torch.tensor([tokenizer(prompt).input_ids])
                with torch.no_grad():
                    states = dense(ids, output_hidden_states=True).hidden_states
                last.append(states[index][0, -1])
            hook.remove()
            entering.append(torch.stack(last).mean(0))
            seen.append(torch.cat(found).mean(0))
        name = f"model.layers.{index}.mlp.gate.weight"
        expected = F.normalize(torch.stack(entering), dim=1)
        # It computes them in bfloat16; short prompts are padded on the left.
        torch.testing.assert_close(theirs[name], expected, rtol=0.1, atol=0.02)
        expected = F.normalize(torch.stack(seen), dim=1)
        torch.testing.assert_close(F.normalize(ours[name], dim=1), expected, rtol=1e-3, atol=1e-4)
        lengths = ours[name].norm(dim=1)
        assert lengths[0].item() == pytest.approx(lengths[1].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts": []}, "experts is [], expected a list of `- source_model: FOLDER` entries"),
        ({"experts": [{"model": "a"}]}, "experts.0 has no source_model that is a text"),
        ({"gate_mode": "best"}, "gate_mode is 'best', expected one of hidden, cheap_embed, random"),
        ({"base_model": 3}, "base_model is 3, expected a folder or a Hub id."),
        ({"architecture": "deepseek"}, "architecture is 'deepseek', which upit does not write"),
        ({"shared_experts": [{"source_model": "a"}]}, "shared_experts cannot be expressed"),
        ({"dtype": "int8"}, "dtype is 'int8', expected 'float32', 'float16' or 'bfloat16'"),
        ({"experts_per_token": 3}, "num_experts (2) is below experts_per_token (3)"),
        (
            {"experts": [{"source_model": "a", "positive_prompts": "x"}]},
            "experts.0.positive_prompts is 'x', expected a list of texts.",
        ),
        (
            {"experts": [{"source_model": "a"}, {"source_model": "b"}]},
            "experts 0, 1 have no positive_prompts, which gate_mode: hidden needs",
        ),
        (
            {"experts": [{"source_model": m, "positive_prompts": ["x"]} for m in "ab"]},
            "all experts have the same positive_prompts",
        ),
        (
            {"experts": [{"source_model": "a", "residual_scale": 0.1}]},
            "experts.0.residual_scale is 0.1, which cannot be expressed",
        ),
        (
            {"experts": [{"source_model": "a", "noise_scale": 0.1}]},
            "experts.0.noise_scale is 0.1, which cannot be expressed",
        ),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(tmp_path, changes, told) -> None:
    experts = [{"source_model": m, "positive_prompts": [m * 3]} for m in "ab"]
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({"base_model": "a", "experts": experts, **changes}))
    message = refused("plan", config)
    assert told in message
    assert message.count("\n") == 0


def test_what_changes_its_meaning_is_told(tmp_path, caplog) -> None:
    experts = [
        {"source_model": m, "positive_prompts": [m * 3], "negative_prompts": ["no"], "weight": 1}
        for m in "ab"
    ]
    document = {"base_model": "c", "gate_mode": "cheap_embed", "experts": experts, "seed": 1}
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(document))
    lines: list[str] = []
    recipe, text = load_recipe(config, lines.append)
    for words in (
        "is a configuration of mergekit-moe, run as a recipe of upit",
        "experts: models, in this order, with expansion: copy",
        "gate_mode: cheap_embed: router.prompts",
        "negative_prompts are left out",
        "experts.1.weight is left out; mergekit-moe ignores it, too.",
        "seed is left out",
    ):
        assert words in "\n".join([*lines, caplog.text])
    assert recipe.parameters.backbone == "base"
    assert recipe.tokenizer_source == "base"
    assert recipe.router is not None
    assert recipe.router.prompts == {0: ["aaa"], 1: ["bbb"]}
    again = tmp_path / "again.yml"
    again.write_text(text)
    caplog.clear()
    lines.clear()
    assert load_recipe(again, lines.append)[0] == recipe
    assert not caplog.text + "".join(lines)
    document |= {"gate_mode": "random", "architecture": "Mixtral"}
    config.write_text(yaml.safe_dump(document))
    recipe, _text = load_recipe(config)
    assert recipe.router is None
    assert recipe.architecture == "mixtral"


def test_a_recipe_with_its_keys_is_still_told_where_they_belong(tmp_path) -> None:
    config = tmp_path / "config.yml"
    config.write_text("merge_method: upit\nbase_model: a\nexperts: []\n")
    with pytest.raises(UpitError, match="experts is not supported by upit"):
        load_recipe(config)
