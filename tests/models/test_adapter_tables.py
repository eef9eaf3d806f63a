"""Adapters that change embeddings or head: logits are those of PEFT's own model, not merged.

PEFT's merge of factors for one of two tied tables changes both, so it is no judge here.
"""

from __future__ import annotations

import json
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import VOCABULARY, build_family
from tests.support.lora import FFN, save_adapter
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.models.lora.adapter import Adapter, open_model

RESIZED, SHRUNK = 320, 256
TOKENS, OTHERS = [3, 7, 200], [5, 9]

# What is trained besides the FFNs, and whether a tied base's head is its embeddings afterwards.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "both tables": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "the head": ({"modules_to_save": ["lm_head"]}, False),
    "the embeddings": ({"modules_to_save": ["embed_tokens"]}, False),
    "both tables, kept tied": (
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        True,
    ),
    "the embeddings, kept tied": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "factors of the embeddings": ({"target_modules": [*FFN, "embed_tokens"]}, False),
    "factors of the head": ({"target_modules": [*FFN, "lm_head"]}, False),
    "DoRA of the head": ({"target_modules": [*FFN, "lm_head"], "use_dora": True}, False),
    "factors of both": ({"target_modules": [*FFN, "embed_tokens", "lm_head"]}, False),
    "factors of both, kept tied": (
        {"target_modules": [*FFN, "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "tokens": ({"trainable_token_indices": TOKENS}, True),
    "tokens of the embeddings": ({"trainable_token_indices": {"embed_tokens": TOKENS}}, True),
    "the same tokens of both": (
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
        True,
    ),
    "other tokens of the head": (
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": OTHERS}},
        False,
    ),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": OTHERS}}, False),
    "nothing": ({}, True),
}
# What a resized, untied model has in neither its file nor its base: the other table.
INCOMPLETE = (
    "factors of the embeddings",
    "factors of the head",
    "DoRA of the head",
    "factors of both, kept tied",  # of the embeddings alone where they are not tied
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return build_family(folder, count=0, tie_word_embeddings=request.param).base


@pytest.mark.parametrize("size", [VOCABULARY, RESIZED, SHRUNK])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(base: Path, tmp_path: Path, kind: str, size: int) -> None:
    config, stays_tied = KINDS[kind]
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    train_adapter(base, tmp_path / "adapter", size, **config)
    if kind in INCOMPLETE and size == RESIZED and not is_tied:
        with pytest.raises(UpitError, match=r"has a vocabulary of \d+, but of .* save_embedding_"):
            ours(base, tmp_path / "adapter")
        return
    model, reread = ours(base, tmp_path / "adapter")
    expected = pefts(base, tmp_path / "adapter", size)
    assert_same_logits(model, expected, size)
    assert model.config.tie_word_embeddings == (is_tied and stays_tied)
    assert model.config.vocab_size == size
    assert all(torch.equal(*pair) for pair in reread)


def test_new_tokens_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    """Saved without tables, as where the base's settings cannot be looked up; tokens are all."""
    tables = ("embed_tokens", "lm_head")
    new = list(range(VOCABULARY, RESIZED))
    train_adapter(
        base,
        tmp_path / "adapter",
        RESIZED,
        save_embedding_layers=False,
        trainable_token_indices={table: [7, *new] for table in tables},
    )
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) < 15
    model, reread = ours(base, tmp_path / "adapter")
    assert_same_logits(model, pefts(base, tmp_path / "adapter", RESIZED), RESIZED)
    assert model.config.vocab_size == RESIZED
    assert all(torch.equal(*pair) for pair in reread)


def test_tokens_have_the_bits_of_the_file(base: Path, tmp_path: Path) -> None:
    train_adapter(base, tmp_path / "adapter", VOCABULARY, trainable_token_indices=TOKENS)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    delta = next(tensor for name, tensor in stored.items() if "trainable_tokens" in name)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    table[TOKENS] = delta
    with opened_adapter(base, tmp_path / "adapter") as adapter:
        assert torch.equal(adapter.tensor("model.embed_tokens.weight"), table)


def test_a_resized_adapter_that_lacks_a_table_and_its_remedies(tmp_path: Path) -> None:
    """The sentence leads to two ways, and both work."""
    family = build_family(tmp_path, count=0)
    target = [*FFN, "embed_tokens", "lm_head"]
    settings: dict[str, Any] = {"target_modules": target, "save_embedding_layers": False}
    model = train_adapter(family.base, tmp_path / "adapter", RESIZED, **settings)
    with pytest.raises(UpitError, match="save_embedding_layers=True") as caught:
        ours(family.base, tmp_path / "adapter")
    assert f"write BASE+{tmp_path / 'adapter'} with the resized model" in caught.value.message
    expected = model(ids(RESIZED)).logits
    model.save_pretrained(tmp_path / "again", save_embedding_layers=True)
    assert_same_logits(ours(family.base, tmp_path / "again")[0], expected, RESIZED)
    resized_base(family.base, RESIZED).save_pretrained(tmp_path / "resized")
    assert_same_logits(ours(tmp_path / "resized", tmp_path / "adapter")[0], expected, RESIZED)


def test_dora_on_embeddings_and_its_remedy(tmp_path: Path) -> None:
    """Where head and embeddings are one, PEFT's merge needs them apart to be right."""
    family = build_family(tmp_path, count=0, tie_word_embeddings=True)
    settings: dict[str, Any] = {"target_modules": [*FFN, "embed_tokens"], "use_dora": True}
    train_adapter(family.base, tmp_path / "adapter", VOCABULARY, **settings)
    with pytest.raises(
        UpitError, match=r"not supported on embeddings; merge it .* untied first \(tie"
    ):
        ours(family.base, tmp_path / "adapter")
    untied = AutoModelForCausalLM.from_pretrained(family.base, tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
    merged = PeftModel.from_pretrained(untied, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    complete = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = pefts(family.base, tmp_path / "adapter", VOCABULARY)
    assert_same_logits(complete, expected, VOCABULARY)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"trainable_token_indices": [3, 7]}, {}, r"trained tokens of shape \[3, 32\] for model"),
        ({"trainable_token_indices": None}, {}, r"has trained tokens of shape \[3, 32\] for model"),
        ({"trainable_token_indices": [3, 7, 400]}, {}, "has a vocabulary of 401, but of model.emb"),
        ({"trainable_token_indices": [3, 3, 7]}, {}, "is not a plain value of this setting"),
        ({"trainable_token_indices": [3, 7, -1]}, {}, "is not a plain value of this setting"),
        ({"trainable_token_indices": 3}, {}, "is not a plain value of this setting"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, {}, "is not a plain value of this set"),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 7, 9], "lm_head": [5]}},
            {},
            "no trained",
        ),
        ({}, {"model.embed_tokens.weight": (256, 32)}, "trained the token 300 of model.embed_tok"),
        ({}, {"model.embed_tokens.weight": (32,)}, "trained the token 300 of model.embed_tokens"),
        ({}, {"model.embed_tokens.lora_embedding_A": (4, 301)}, "factors and trained tokens of"),
        ({}, {"lm_head.weight": (400, 32)}, "has a vocabulary of 400, but of model.embed_tokens"),
        ({}, {"lm_head.token_adapter.trainable_tokens_delta": (3, 32)}, "tokens of shape .* lm_he"),
        (
            {},
            {"model.layers.0.mlp.up_proj.token_adapter.trainable_tokens_delta": (3, 32)},
            "no tab",
        ),
        ({}, {"model.norm.original_module.weight": (32,)}, "which the base"),
    ],
)
def test_bad_tokens(
    tmp_path: Path,
    untied: Path,
    settings: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    """One sentence; tokens 3, 7 and 300 of 301 were trained."""
    folder = tmp_path / "adapter"
    shape = (3, 32)
    save_adapter(untied, folder, target_modules=FFN)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"trainable_token_indices": [3, 7, 300]} | settings
    path.write_text(json.dumps(config))
    found = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    found[name] = torch.randn(shape)
    found |= {f"base_model.model.{k}": torch.randn(v) for k, v in tensors.items()}
    save_file(found, folder / "adapter_model.safetensors")
    with pytest.raises(UpitError, match=message) as caught:
        ours(untied, folder)
    assert "\n" not in caught.value.message


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("untied"), count=0).base


# ---- PEFT's side, and ours ---------------------------------------------------------------------


def resized_base(base: Path, size: int, seed: int = 0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    if size != VOCABULARY:
        model.resize_token_embeddings(size)
    return model


def train_adapter(
    base: Path,
    folder: Path,
    size: int,
    *,
    save_embedding_layers: Any = "auto",
    **config: Any,
) -> Any:
    """Save an adapter on a resized base with random weights; returns PEFT's model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": FFN} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(resized_base(base, size), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return model.eval()


def pefts(base: Path, folder: Path, size: int) -> torch.Tensor:
    """Logits of what PEFT loads; new rows come from the adapter, other random ones show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(resized_base(base, size, seed=99), folder)
    return model.eval()(ids(size)).logits


def opened_adapter(base: Path, folder: Path) -> Any:
    complete = Checkpoint("base", base, OpenOptions())
    adapter = open_model(str(folder), complete, OpenOptions(), lambda *_: complete)
    assert isinstance(adapter, Adapter)
    return closing(adapter)


def ours(base: Path, folder: Path) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What transformers makes of the adapter's settings and tensors; tables whole and in blocks."""
    with opened_adapter(base, folder) as adapter:
        tensors = {name: adapter.tensor(name) for name in adapter.specs}
        assert all(tensors[name].shape == spec.shape for name, spec in adapter.specs.items())
        pieces = [
            (
                tensors[name],
                torch.cat(
                    [
                        adapter.rows(name, start, min(start + 50, tensors[name].shape[0]))
                        for start in range(0, tensors[name].shape[0], 50)
                    ]
                ),
            )
            for name in tensors
            if name in ("model.embed_tokens.weight", "lm_head.weight")
        ]
        config = AutoConfig.for_model(**adapter.config)
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval(), pieces


def ids(size: int) -> torch.Tensor:
    return torch.tensor([[*TOKENS, *OTHERS, 40, 41, min(size, 300) - 1, size - 1]])


def assert_same_logits(model: Any, expected: torch.Tensor, size: int) -> None:
    with torch.no_grad():
        found = model(ids(size)).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
