"""What trainers leave that is no model yet: recognised by its names, and what makes one of it.

Only names are looked at; what such files hold is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import one_line

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# What Unsloth adds to the names of models that it has quantised to 4 bits.
_FOUR_BITS = ("-unsloth-bnb-4bit", "-bnb-4bit")


@dataclass(frozen=True)
class Leaving:
    """One kind of folder that is no model.

    Attributes:
        patterns: Globs; what matches one of them shows the kind.
        sentence: What follows the folder's name. `{found}` is what matched, `{folder}` the folder,
            `{parent}` the folder of what matched.
    """

    patterns: tuple[str, ...]
    sentence: str

    def of(self, folder: str, found: str) -> str:
        """Return the sentence for a folder by its name, and for what was found there by its own."""
        parent = found.rpartition("/")[0]
        return self.sentence.format(folder=folder, found=found, parent=parent)


_BESIDE = "with the config.json and the tokenizer of the model it was trained from beside them"

GGUF = Leaving(
    ("*.gguf",),
    "is a GGUF, made to be run and not to be merged; write it out as a dense model first, as "
    "docs/troubleshooting.md shows under GGUF.",
)
_STEPS = ("checkpoint-[0-9]*/",)
_RUN = "has no weights itself, but checkpoints of a run; "
MANY_STEPS = Leaving(_STEPS, f"{_RUN}write {{folder}}/checkpoint-*.")
ONE_STEP = Leaving(_STEPS, f"{_RUN}name one of them, such as {{found}}.")

# The first that is recognised counts: the narrower kinds come first.
LEAVINGS = (
    Leaving(
        ("pytorch_model_fsdp_[0-9]*/",),
        "has its weights in shards of FSDP; join them by `accelerate merge-weights {found} "
        f"{{folder}}`, {_BESIDE}.",
    ),
    Leaving(
        ("pytorch_model_fsdp.bin",),
        "has its weights in {found}, FSDP's name for them; rename it to pytorch_model.bin and pass "
        "--lazy-unpickle.",
    ),
    Leaving(
        ("common.pt", "weights/common.pt", "latest_checkpointed_iteration.txt", "*.nemo"),
        "is a checkpoint of Megatron or NeMo ({found}); export it to Hugging Face's format, with "
        "Megatron Bridge (AutoBridge.export_ckpt) or NeMo (llm.export_ckpt).",
    ),
    Leaving(
        ("*.distcp",),
        "holds shards of FSDP ({found}); join them by `accelerate merge-weights {folder} OUT` and "
        f"give OUT, {_BESIDE}.",
    ),
    Leaving(
        ("zero_to_fp32.py",),
        "has its weights in DeepSpeed's shards; join them by `python {found} {folder} {folder} "
        "--safe_serialization`.",
    ),
    Leaving(
        ("mp_rank_[0-9]*_model_states.pt", "*zero_pp_rank_*.pt", "global_step[0-9]*/"),
        "has its weights as DeepSpeed keeps them ({found}); join them by the zero_to_fp32.py that "
        "DeepSpeed leaves beside its global_step folders, or save the model again with "
        "save_pretrained.",
    ),
    Leaving(
        ("adapters.safetensors", "adapters.npz"),
        "is an adapter of mlx ({found}); merge it into its base by `mlx_lm.fuse --model BASE "
        "--adapter-path {folder} --save-path OUT --dequantize` and give OUT.",
    ),
    Leaving(
        ("consolidated*.safetensors", "consolidated*.pth"),
        "has its weights in {found}, the form of Mistral's and Meta's own programs; take the "
        "model*.safetensors of the same model, or convert it with transformers' "
        "convert_mistral_weights_to_hf.py or convert_llama_weights_to_hf.py.",
    ),
    GGUF,
    MANY_STEPS,
    ONE_STEP,
    Leaving(
        tuple(f"*/{name}" for name in ("adapter_config.json", *SAFE_WEIGHTS, *PICKLED_WEIGHTS)),
        "has no weights itself, but there is a model in it; write {parent}.",
    ),
)


def describe_leaving(folder: Path, reference: str, *, is_entry: bool) -> str | None:
    """Return what a folder without weights is and what makes a model of it; None if unknown.

    Args:
        reference: The user's name for the folder, in which paths are given back.
        is_entry: Several checkpoints may be named in its place, by a glob.
    """
    weights = (*SAFE_WEIGHTS, *PICKLED_WEIGHTS, *ADAPTER_WEIGHTS)
    if any((folder / name).is_file() for name in weights):
        return None
    name = reference.rstrip("/")
    for leaving in LEAVINGS:
        if leaving is MANY_STEPS and not is_entry:
            continue
        if found := next(_matches(folder, leaving.patterns), None):
            return leaving.of(name, f"{name}/{one_line(found)}")
    return None


def _matches(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """Yield what is there in a folder by its globs, in order, hidden things left out."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            # Before Python 3.11 a glob that ends in a slash matches files, too.
            if not name.startswith(".") and (path.is_dir() or not pattern.endswith("/")):
                yield name


def without_four_bits(reference: str) -> str:
    """Return the name of the model of which Unsloth's 4-bit one was made; others as they are."""
    model, at, revision = reference.partition("@")
    for suffix in _FOUR_BITS:
        if model.lower().endswith(suffix):
            return model[: -len(suffix)]
    return f"{model}{at}{revision}"
