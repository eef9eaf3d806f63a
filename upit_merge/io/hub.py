"""Models by reference: a folder, a Hub id, an adapter on a base; downloaded if need be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import UpitError, first_line, one_line
from upit_merge.io.leavings import GGUF, check_no_leaving, without_four_bits
from upit_merge.io.untrusted import TEMPLATE_FOLDER

# What a download needs: weights, configuration, tokenizer. Not optimizer states, other formats
# (`consolidated.safetensors` is a second copy of everything), or what is in subfolders, but for
# chat templates.
_HUB_PATTERNS = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "README.md",
)
# There is no pattern for "all folders but one": these are the folders whose names begin otherwise.
_OTHER_FOLDERS = [f"{TEMPLATE_FOLDER}/*/*", f"{TEMPLATE_FOLDER}[!/]*/*"]
for _length, _letter in enumerate(TEMPLATE_FOLDER):
    _OTHER_FOLDERS += [f"{TEMPLATE_FOLDER[:_length]}{rest}" for rest in (f"[!{_letter}]*/*", "/*")]


# For whom a model may be quantised: training loads it with transformers.
_TRAINED = ("model", "base model")


@dataclass(frozen=True)
class OpenOptions:
    """How checkpoints may be opened.

    Args:
        allow_pickle: Read `.bin` files, with `weights_only` and memory-mapped.
        cache_dir: Where downloads from the Hugging Face Hub are kept.
        trust_remote_code: Let `transformers` run code that comes with a tokenizer.
        local: Download nothing: what names them is a file, and not the user.
    """

    allow_pickle: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    local: bool = False


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split a model's reference into (model, None), or (base, adapter) if it is `BASE+ADAPTER`.

    A folder is taken as it is, whatever its name; the base is the longest part that is a folder.
    """
    plus = [index for index, character in enumerate(reference) if character == "+"]
    if not plus or is_folder(reference):
        return reference, None
    folders = [index for index in plus if is_folder(reference[:index])]
    at = folders[-1] if folders else plus[0]
    return reference[:at], reference[at + 1 :]


def is_folder(reference: str) -> bool:
    """Return whether a model reference is a local folder that is there."""
    return os.path.isdir(os.path.expanduser(reference))


def looks_like_path(reference: str) -> bool:
    """Return whether a model reference can only mean a local folder, never a Hub id."""
    return (
        reference.startswith((".", "/", "~"))
        or (os.sep != "/" and os.sep in reference)
        or (reference.count("/") != 1)
    )


def resolve(reference: str, options: OpenOptions, *, role: str = "checkpoint") -> Path:
    """Return a checkpoint's local folder; downloads a Hub id (`owner/name[@revision]`) if needed.

    Raises:
        UpitError: there is no such folder, or it holds what is no model yet, or the Hub has no such
            model or cannot be reached.
    """
    if not reference.strip():
        raise UpitError(f"The {role} has an empty name; give a folder or a Hub id.")
    # Unlike Path's, these take whatever a recipe may hold: `~nobody`, names too long for the disk.
    folder = Path(os.path.expanduser(reference))
    if os.path.isdir(folder):
        check_no_leaving(folder, reference, role, is_entry=role in ("checkpoint", "adapter"))
        return folder
    if os.path.isfile(folder):
        if folder.suffix.lower() == ".gguf":
            raise GGUF.of(role, reference, reference)
        raise UpitError(f"The {role} {reference} is a file; give the folder that holds it.")
    if looks_like_path(reference):
        raise UpitError(
            f"The {role} {reference} does not exist (looked in {Path.cwd()}); correct the path in "
            "the recipe."
        )
    full = without_four_bits(reference)
    if full != reference and role not in _TRAINED:
        raise UpitError(
            f"The {role} {reference} is quantised by bitsandbytes; give the 16-bit {full}."
        )
    from huggingface_hub import snapshot_download

    repo, _, revision = reference.partition("@")
    patterns = [*_HUB_PATTERNS]
    patterns += ["pytorch_model*.bin", "adapter_model.bin"] if options.allow_pickle else []
    patterns += ["*.py"] if options.trust_remote_code else []
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                cache_dir=options.cache_dir,
                allow_patterns=patterns,
                ignore_patterns=_OTHER_FOLDERS,
                local_files_only=options.local,
            )
        )
    except Exception as error:  # the Hub client raises dozens of types, none of them for users
        reason = one_line(first_line(error))
        raise UpitError(
            f"The {role} {reference} is neither a local folder nor a model the Hub could give "
            f"({reason}); correct the name or download it first."
        ) from error
