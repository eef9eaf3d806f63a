"""What trainers leave that is no model yet: recognised by its names, and what makes one of it.

Only names are looked at; what such files hold is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import UpitError, one_line

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
        sentence: What users are told. `{role}` is what the folder was given as, `{folder}` its name,
            `{found}` what matched, `{parent}` the folder of that.
    """

    patterns: tuple[str, ...]
    sentence: str

    def of(self, role: str, folder: str, found: str) -> UpitError:
        """Return the error for a folder by its name, and for what was found there by its own."""
        parent = found.rpartition("/")[0]
        return UpitError(self.sentence.format(role=role, folder=folder, found=found, parent=parent))


GGUF = Leaving(
    ("*.gguf",),
    "The {role} {folder} is a GGUF, made to be run and not to be merged; write it out as a dense "
    "model first, as docs/troubleshooting.md shows under GGUF.",
)
# One of a run's checkpoints, or all of them where several can be named.
ONE_STEP = Leaving(
    ("checkpoint-[0-9]*/",),
    "The {role} {folder} has no weights itself, but checkpoints of a run; name one of them, such "
    "as {found}.",
)
MANY_STEPS = Leaving(
    ("checkpoint-[0-9]*/",),
    "The {role} {folder} has no weights itself, but checkpoints of a run; name one of them, such "
    "as {found}, or in a recipe all of them by {folder}/checkpoint-*.",
)

# The first that is recognised counts: the narrower kinds come first.
LEAVINGS = (
    Leaving(
        ("pytorch_model_fsdp_[0-9]*/",),
        "The {role} {folder} has its weights in shards of FSDP; join them by `accelerate "
        "merge-weights {found} {folder}`, and put config.json and tokenizer of the model it was "
        "trained from beside them.",
    ),
    Leaving(
        ("pytorch_model_fsdp.bin",),
        "The {role} {folder} has its weights in {found}, FSDP's name for them; rename it to "
        "pytorch_model.bin and pass --lazy-unpickle.",
    ),
    Leaving(
        (
            "common.pt",
            "weights/common.pt",
            "iter_*/common.pt",
            "iter_*/mp_rank_*/",
            "latest_checkpointed_iteration.txt",
            "*.nemo",
        ),
        "The {role} {folder} is a checkpoint of Megatron or NeMo ({found}); export it to Hugging "
        "Face's format, with Megatron Bridge (AutoBridge.export_ckpt) or NeMo (llm.export_ckpt).",
    ),
    Leaving(
        ("*.distcp", "*/*.distcp"),
        "The {role} {folder} holds shards of FSDP ({found}); join them by `accelerate "
        "merge-weights {parent} OUT`, put config.json and tokenizer of the model it was trained "
        "from beside them, and give OUT.",
    ),
    Leaving(
        ("zero_to_fp32.py",),
        "The {role} {folder} has its weights in DeepSpeed's shards; join them by DeepSpeed's own "
        "zero_to_fp32.py: `python -m deepspeed.utils.zero_to_fp32 {folder} {folder} "
        "--safe_serialization`.",
    ),
    Leaving(
        (
            *("mp_rank_[0-9]*_model_states.pt", "pytorch_model/mp_rank_[0-9]*_model_states.pt"),
            *("*zero_pp_rank_*.pt", "expert_*_model_states.pt", "global_step[0-9]*/"),
        ),
        "The {role} {folder} has its weights as DeepSpeed keeps them ({found}); join them by "
        "DeepSpeed's zero_to_fp32.py, or save the model again with save_pretrained.",
    ),
    Leaving(
        ("adapters.safetensors", "adapters.npz", "[0-9]*_adapters.safetensors"),
        "The {role} {folder} is an adapter of mlx ({found}); merge it into its base by "
        "`mlx_lm.fuse --model BASE --adapter-path {folder} --save-path OUT --dequantize` and give "
        "OUT.",
    ),
    Leaving(
        ("consolidated*.safetensors", "consolidated*.pth"),
        "The {role} {folder} has its weights in {found}, the form of Mistral's and Meta's own "
        "programs; take the model*.safetensors of the same model, or its conversion to Hugging Face's "
        "format.",
    ),
    GGUF,
    MANY_STEPS,
    ONE_STEP,
    Leaving(
        tuple(f"*/{name}" for name in ("adapter_config.json", *SAFE_WEIGHTS, *PICKLED_WEIGHTS)),
        "The {role} {folder} has no weights itself, but there is a model in it; write {parent}.",
    ),
)


def check_no_leaving(folder: Path, reference: str, role: str, *, is_entry: bool) -> None:
    """Refuse a folder without weights that is known to be no model, and say what makes one of it.

    Args:
        reference: The user's name for the folder, in which paths are given back.
        role: What it was given as.
        is_entry: Several checkpoints may be named in its place, by a glob.

    Raises:
        UpitError: it is one of `LEAVINGS`.
    """
    weights = (*SAFE_WEIGHTS, *PICKLED_WEIGHTS, *ADAPTER_WEIGHTS)
    if any((folder / name).is_file() for name in weights):
        return
    name = reference.rstrip("/")
    for leaving in LEAVINGS:
        if leaving is MANY_STEPS and not is_entry:
            continue
        if found := next(_matches(folder, leaving.patterns), None):
            raise leaving.of(role, name, f"{name}/{one_line(found)}")


def leaving_in(folder: Path, reference: str) -> UpitError | None:
    """Return what a folder without weights is told to be, by what lies in it and not below.

    Args:
        reference: The user's name for the folder.
    """
    name = reference.rstrip("/")
    for leaving in LEAVINGS:
        if leaving in (GGUF, MANY_STEPS, ONE_STEP):  # not this folder's business
            continue
        patterns = tuple(pattern for pattern in leaving.patterns if not pattern.startswith("*/"))
        if found := next(_matches(folder, patterns), None):
            return leaving.of("checkpoint", name, f"{name}/{one_line(found)}")
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
