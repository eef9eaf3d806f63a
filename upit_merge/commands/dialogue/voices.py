"""Models to talk to: found, held against the machine's memory, and loaded with transformers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from upit_merge.commands.compare import Rival, check_rival_names
from upit_merge.commands.preflight import gib, memory_limit
from upit_merge.engine.generation import Speaker
from upit_merge.engine.routed import RoutedModel, has_experts
from upit_merge.errors import UpitError, first_line, one_line
from upit_merge.io.checkpoint import (
    PICKLED_WEIGHTS,
    SAFE_WEIGHTS,
    Checkpoint,
    check_not_compiled,
    has_any,
    is_adapter,
)
from upit_merge.io.hub import OpenOptions, looks_like_path, resolve, split_reference
from upit_merge.io.language_part import language_settings
from upit_merge.io.untrusted import check_own_files, read_json
from upit_merge.models.formats import found_format
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.tokenizer import has_tokenizer, load_tokenizer
from upit_merge.output.staging import check_not_half_edited
from upit_merge.runtime.device import resolve_chat_device
from upit_merge.training.alone import load_alone

LOG = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What Python, torch and transformers take, and a conversation.
_MARGIN_BYTES = 1 << 30


@dataclass(frozen=True)
class VoiceOptions:
    """How models to talk to are loaded.

    Args:
        device: `cpu`, `cuda`, `mps` or `auto`.
        dtype: `auto`, which is the model's own, or one of `DTYPES`.
        open: How they may be opened.
        quiet: No progress bars.
    """

    device: str = "auto"
    dtype: str = "auto"
    open: OpenOptions = field(default_factory=OpenOptions)
    quiet: bool = False


@dataclass(frozen=True)
class Voice:
    """A model to talk to.

    Attributes:
        name: What to call it.
        speaker: The model.
        context: Tokens that it can read and say.
        expert: The expert that all tokens take; None for the model as it is.
    """

    name: str
    speaker: Speaker
    context: int | None
    expert: int | None = None

    @property
    def num_experts(self) -> int | None:
        """How many experts it has that can be watched; None if it has none."""
        routed = self.speaker.routed
        return routed.num_experts if routed else None

    def with_expert(self, expert: int | None) -> Voice:
        """Return the same model, of which all tokens take one expert, or those that they choose.

        Raises:
            UpitError: it has no such expert.
        """
        check_expert(self.name, self.num_experts, expert)
        return replace(self, expert=expert)


def check_expert(name: str, num_experts: int | None, expert: int | None) -> None:
    """Refuse a question for the experts of a model that are not there.

    Args:
        name: What the model is called.
        num_experts: How many it has that can be watched; None if it has none.
        expert: The expert that is asked for; None if it is all of them.

    Raises:
        UpitError: saying what there is.
    """
    if num_experts is None:
        raise UpitError(
            f"{name} has no experts that can be told apart here: it is a dense model, or a mixture "
            "in none of the formats of docs/families.md; leave the expert out."
        )
    if expert is not None and not 0 <= expert < num_experts:
        raise UpitError(
            f"{name} has the experts 0 to {num_experts - 1}, and no expert {expert}; give one of "
            "these."
        )


@dataclass(frozen=True)
class _Source:
    """A model on disk, not loaded yet.

    Attributes:
        num_bytes: Of its weights in memory.
        num_experts: How many its configuration has, if it is in one of the formats.
    """

    name: str
    folder: Path
    adapter: Path | None
    config: dict[str, Any]
    tokenizer: Any
    num_bytes: int
    num_experts: int | None


def load_voice(reference: str, options: VoiceOptions | None = None) -> Voice:
    """Load one model, see `load_voices`."""
    return load_voices(reference, [], options or VoiceOptions())[0]


def load_voices(
    reference: str,
    against: Sequence[Rival],
    options: VoiceOptions,
    check: Callable[[str, Any, int | None], object] = lambda *_: None,
) -> list[Voice]:
    """Load models to talk to.

    Args:
        reference: A mixture or a dense model: a folder, a Hub id, or `BASE+ADAPTER`.
        against: Others to ask the same; `expert:2` is an expert of the first.
        check: Told the name, the tokenizer and the number of experts of each before any is loaded,
            the first one's first.

    Raises:
        UpitError: one cannot be read, or the machine has no room for all of them.
    """
    first = Rival(Path(split_reference(reference)[1] or reference).name or reference, reference)
    if first.name in [rival.name for rival in against]:  # a/out and b/out
        same = first.name
        first, *against = (
            replace(one, name=one.reference) if one.name == same else one
            for one in (first, *against)
        )
    check_rival_names([first, *against])
    numbers = [_expert_number(rival) for rival in against]
    rivals = [r for r, number in zip(against, numbers, strict=True) if number is None]
    device = resolve_chat_device(options.device)
    sources = [_source(rival, options) for rival in (first, *rivals)]
    for source in sources:
        check(source.name, source.tokenizer, source.num_experts)
    for number in filter(lambda number: number is not None, numbers):
        check_expert(first.name, sources[0].num_experts, number)
    device = _with_room(sources, device, options)
    _quieten(options)
    loaded = [_load(source, device, options) for source in sources]
    rest = iter(loaded[1:])
    return [
        loaded[0],
        *(
            next(rest)
            if number is None
            else replace(loaded[0].with_expert(number), name=rival.name)
            for rival, number in zip(against, numbers, strict=True)
        ),
    ]


def _expert_number(rival: Rival) -> int | None:
    """Return which expert of the mixture itself is meant; None if it is another model."""
    head, named, number = rival.reference.partition(":")
    return int(number) if named and head == "expert" and number.isdecimal() else None


def _source(rival: Rival, options: VoiceOptions) -> _Source:
    base, adapter = split_reference(rival.reference)
    for part in (base, adapter):
        if part and looks_like_path(part) and not Path(os.path.expanduser(part)).exists():
            raise UpitError(
                f"The model {one_line(part)} does not exist (looked in {Path.cwd()}); correct the "
                "path."
            )
    folder = resolve(base, options.open, role="model to talk to")
    label = f"the model {rival.name}"
    check_not_half_edited(folder)
    if is_adapter(folder):
        raise UpitError(
            f"The model {one_line(rival.reference)} is an adapter; write BASE+ADAPTER, with the "
            "model that it was trained on."
        )
    check_own_files(rival.name, folder)
    check_not_compiled(rival.name, folder)
    config = read_json(folder / "config.json", label)
    if not has_any(folder, SAFE_WEIGHTS) and has_any(folder, PICKLED_WEIGHTS):
        raise UpitError(
            f"The model {rival.name} has its weights in .bin files, pickles that could run code; "
            "convert it to safetensors first."
        )
    opened: contextlib.AbstractContextManager[Checkpoint]
    form, num_experts = found_format(config), None
    if form is not None:
        num_experts = form.sizes(form.read(config))[0]
        opened = opened_mixture(folder, label)
    else:
        opened = contextlib.closing(Checkpoint(label, folder, options.open))
    with opened as model:
        wide = {} if options.dtype == "auto" else {"dtype": getattr(torch, options.dtype)}
        sizes = (
            spec.numel * wide.get("dtype", spec.dtype).itemsize for spec in model.specs.values()
        )
        num_bytes = sum(sizes)
    adapter_folder = None
    if adapter is not None:
        adapter_folder = resolve(adapter, options.open, role="adapter")
        check_own_files(rival.name, adapter_folder)
    if not has_tokenizer(folder):
        raise UpitError(
            f"The model {rival.name} has no tokenizer in {folder}; put that of the model it was "
            "made from there."
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=options.open.trust_remote_code)
    return _Source(rival.name, folder, adapter_folder, config, tokenizer, num_bytes, num_experts)


def _with_room(
    sources: Sequence[_Source], device: torch.device, options: VoiceOptions
) -> torch.device:
    """Return where the models fit: the device, or the CPU if any may be taken.

    Raises:
        UpitError: naming what is needed and what there is.
    """
    needed = sum(source.num_bytes for source in sources)
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
        if needed <= room:
            return device
        if options.device != "auto":
            raise UpitError(_too_large(sources, needed, room, str(device), "--device cpu"))
        LOG.warning(
            "The weights take %s, %s has %s: they are put into the machine's memory, where "
            "answers come slowly.",
            gib(needed),
            device,
            gib(room),
        )
        device = torch.device("cpu")
    room, where = memory_limit()
    if needed + _MARGIN_BYTES > room:
        raise UpitError(_too_large(sources, needed + _MARGIN_BYTES, room, where, None))
    free = psutil.virtual_memory().available
    if needed > free:
        LOG.warning(
            "About %s of memory are needed and %s are free now; close other programs, or expect "
            "the machine to swap.",
            gib(needed),
            gib(free),
        )
    return device


def _too_large(
    sources: Sequence[_Source], needed: int, room: int, where: str, remedy: str | None
) -> str:
    names = " and ".join(source.name for source in sources)
    remedies = [f"use {remedy}"] if remedy else []
    if len(sources) > 1:
        remedies.append("leave out --against")
    remedies.append("run it quantised with llama.cpp (docs/use-anywhere.md)")
    return (
        f"Talking to {names} takes {gib(needed)} of memory, but {where} has {gib(room)}; "
        f"{', or '.join(remedies)}; `upit-merge evaluate` measures it here, layer by layer."
    )


def _quieten(options: VoiceOptions) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if options.quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _load(source: _Source, device: torch.device, options: VoiceOptions) -> Voice:
    """Load a model, and check that all of its weights were there."""
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if device.type == "cuda":
        settings["device_map"] = {"": device}
    try:
        found = load_alone(source.folder, **settings) or AutoModelForCausalLM.from_pretrained(
            source.folder, trust_remote_code=options.open.trust_remote_code, **settings
        )
        model, told = found
        if source.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, source.adapter).merge_and_unload()
        model = model.to(device).eval()
    except Exception as error:  # whatever a broken or foreign model makes the loader raise
        if "auto_map" in source.config and not options.open.trust_remote_code:
            raise UpitError(
                f"The model {source.name} comes with code of its own, which transformers does not "
                f"run unasked; read the .py files in {source.folder}, and add --trust-remote-code."
            ) from error
        raise UpitError(
            f"The model {source.name} cannot be loaded by transformers "
            f"({one_line(first_line(error))}); check its files in {source.folder}."
        ) from error
    if told["missing_keys"]:
        raise UpitError(
            f"The model {source.name} lacks {one_line(min(told['missing_keys']))}, which its "
            "config.json asks for; copy or download it again."
        )
    form = found_format(source.config)
    routed = RoutedModel(model, form) if form and has_experts(model, form) else None
    _settle(model, source.tokenizer)
    context = language_settings(source.config).get("max_position_embeddings")
    limit = context if isinstance(context, int) and context > 0 else None
    return Voice(source.name, Speaker(model, source.tokenizer, routed), limit)


def _settle(model: Any, tokenizer: Any) -> None:
    """Complete the generation settings of a model with what a conversation needs."""
    settings = model.generation_config
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)  # of a chat format that was trained into a base model
    settings.eos_token_id = ends or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id if ends == [] else ends[0]
    settings.num_beams = settings.num_return_sequences = 1
    settings.use_cache = True
