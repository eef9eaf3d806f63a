"""Tiny models made on the spot; nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The size of a terminal that is not there: Python's `readline` leaves it to all that is started.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

# Models this small lose more to threads than they gain, in what tests start as well; tests about
# threads set their own.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 259  # every byte, and three special tokens

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; text starts with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocabulary |= {character: 3 + index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@dataclass(frozen=True)
class Family:
    """A base and checkpoints that differ from it, on disk."""

    root: Path
    base: Path
    checkpoints: list[Path]

    def recipe(self, *, models: Sequence[str] | None = None, **extra: Any) -> dict[str, Any]:
        """A upit document for this family; keyword arguments are further top-level keys."""
        listed = models or [str(path) for path in self.checkpoints]
        return {
            "merge_method": "upit",
            "base_model": str(self.base),
            "models": [{"model": model} for model in listed],
            **extra,
        }

    def write_recipe(self, document: dict[str, Any], name: str = "recipe.yml") -> Path:
        path = self.root / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def seed_file(self, count: int = 24, name: str = "seed.jsonl") -> Path:
        path = self.root / name
        rows = [{"text": f"sample {i}: " + "abcdef"[i % 6] * (1 + i % 9)} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def build_family(
    root: Path,
    *,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    kind: str = "llama",
    seed: int = 0,
    noise: float = 0.02,
    shard_size: str = "5GB",
    **config: Any,
) -> Family:
    """Make a base and `count` checkpoints, each the one before it plus noise.

    Args:
        kind: `llama`, `mistral` or `qwen3`.
    """
    torch.manual_seed(seed)
    settings = {**TINY, **config}
    if kind == "qwen3":
        settings = {"head_dim": 8, **settings}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype)
    folders = [root / "base"]
    folders += [root / "sft" / f"checkpoint-{step * 500}" for step in range(1, count + 1)]
    for index, folder in enumerate(folders):
        if index and noise:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_((torch.randn(parameter.shape) * noise).to(dtype))
        model.save_pretrained(folder, max_shard_size=shard_size)
        byte_tokenizer().save_pretrained(folder)
    return Family(root, folders[0], folders[1:])


def train_on(family: Family, texts: dict[str, str]) -> PreTrainedTokenizerFast:
    """Train the base's FFNs on each text, into folders of these names; returns the tokenizer."""
    tokenizer = byte_tokenizer()
    for name, text in texts.items():
        model = AutoModelForCausalLM.from_pretrained(family.base)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in parameter_name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        for _ in range(20):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        model.save_pretrained(family.root / name)
        tokenizer.save_pretrained(family.root / name)
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_garbage() -> None:
    """Every training ends with `gc.collect()`, which would look at all that was ever imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an earlier test measured, and nothing in the folder of whoever runs them."""
    monkeypatch.setenv("UPIT_MERGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def _pictures() -> Iterator[None]:
    """What every run draws is looked at by the tests of `report` alone."""
    from tests.support.pictures import kept_blank

    with kept_blank():
        yield


@pytest.fixture(scope="session")
def shared_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A float32 Llama and three checkpoints; do not write into it."""
    return build_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def family(shared_family: Family, tmp_path: Path) -> Family:
    """The same, in a folder that a test may change."""
    root = tmp_path / "family"
    # Without what other tests have put beside the models.
    shutil.copytree(shared_family.root, root, ignore=shutil.ignore_patterns("*.jsonl", "*.yml"))
    checkpoints = [
        root / path.relative_to(shared_family.root) for path in shared_family.checkpoints
    ]
    return Family(root, root / "base", checkpoints)


def run_document(document: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Run a recipe document through our pipeline; returns the output folder."""
    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, folder, RunOptions(quiet=True, **options))
    return folder


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Path]:
    """Run a recipe document into a folder of the test's own; returns it."""

    def run(document: dict[str, Any], out: str | Path = "out", **options: Any) -> Path:
        return run_document(document, tmp_path / out, **options)

    return run


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The last of the four checkpoints becomes an expert later."""
    return build_family(tmp_path_factory.mktemp("four"), count=4)


@pytest.fixture(scope="session")
def shared_moe(four: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of three checkpoints, in several files; do not write into it."""
    models = [str(path) for path in four.checkpoints[:3]]
    router = {"data": str(four.seed_file())}
    document = four.recipe(models=models, parameters={"num_experts": 4}, router=router)
    return run_document(document, tmp_path_factory.mktemp("moe") / "out", max_shard_bytes=50_000)


@pytest.fixture
def moe(shared_moe: Path, tmp_path: Path) -> Path:
    """The same, in a folder that a test may change."""
    return Path(shutil.copytree(shared_moe, tmp_path / "out"))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Train a model on 32 short samples; see `training.trainer_in`."""
    from tests.support.training import trainer_in

    return trainer_in(tmp_path)
