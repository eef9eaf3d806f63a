"""The trained mixture, written as the one it was: same names, settings and tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from upit_merge.errors import UpitError
from upit_merge.io.text_file import write_json
from upit_merge.io.untrusted import TEMPLATE_FOLDER, own_file, read_json
from upit_merge.models.chat_template import template_files
from upit_merge.models.dense import is_derived
from upit_merge.models.formats import MixtureFormat, found_format
from upit_merge.models.mixture import inspect_mixture, opened_mixture
from upit_merge.models.published import complete_config, published_tensors
from upit_merge.models.tokenizer_files import make_readable
from upit_merge.output.staging import REPORT, STAGING, Staging, move_into_place, output_files
from upit_merge.report.document import after, read_report
from upit_merge.report.write import card_is_ours, recipe_of, write_card
from upit_merge.training.alone import load_alone, save_alone
from upit_merge.training.settings import FinetuneJob

_WEIGHTS = (".safetensors", ".bin", ".index.json")
# Of TRL's settings, those that say what was done.
_RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "seed",
)
_HISTORY = ("loss", "aux_loss", "routing_entropy", "load_entropy", "dead_experts")


def finish_move(out: Path) -> None:
    """Move what an earlier call had not moved into place when it was killed."""
    staging = Staging(out / STAGING)
    if staging.is_moving:
        move_into_place(staging, out)
    else:
        shutil.rmtree(staging.root, ignore_errors=True)


def write_mixture(
    trainer: Any,
    job: FinetuneJob,
    source: Path,
    out: Path,
    kind: MixtureKind,
    seconds: float,
) -> None:
    """Write the trained model into `out`, complete or not at all.

    All processes must call this: the weights may be spread over them.

    Args:
        source: The mixture that was trained; what training does not change is copied from it.
        kind: Of it, from `tensors_of`.
        seconds: What the training took.

    Raises:
        UpitError: transformers would write other tensors than those that were read.
    """
    staging = Staging(out / STAGING)
    adapter = staging.root / "adapter"
    state = None
    if job.model.use_peft:
        trainer.save_model(str(adapter))
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    staging.begin()
    if state is None:
        model = merged_adapter(source, adapter, torch.float32)
        state = model.state_dict()
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
    cast = {
        name: tensor.to("cpu", kind.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.items()
        # A copy of the embeddings has lost its tie to them.
        if not (model.config.tie_word_embeddings and is_derived(name))
    }
    if kind.form.is_part and kind.is_published:
        save_alone(kind.form, cast, staging.model)
    elif not kind.is_published:
        # transformers gives back the names that it has read.
        cast = {n: t.contiguous() for n, t in published_tensors(kind.form, str(out), cast).items()}
    if not (kind.form.is_part and kind.is_published):
        model.save_pretrained(staging.model, state_dict=cast)
    for path in files_besides_weights(source):
        copy = staging.model / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    _complete_settings(staging.model)
    _adapt_settings(trainer, job, model.config, staging.model)
    make_readable(staging.model)
    written = tensors_of(staging.model)
    if written.names != kind.names or not written.is_published:
        other = next(iter(sorted(written.names ^ kind.names)), "those of its memory")
        raise UpitError(
            f"This version of transformers writes the mixture under other names than it was read "
            f"({other}), which other programs would not find; install the one that "
            "constraints.txt pins, and run the same command again."
        )
    _write_report(trainer, job, source, staging.model, seconds)
    move_into_place(staging, out)


@dataclass(frozen=True)
class MixtureKind:
    """What a mixture is on disk.

    Attributes:
        form: Its format.
        names: Of its tensors, as they are published.
        dtype: Of its weights.
        is_published: Its files have these names.
    """

    form: MixtureFormat
    names: frozenset[str]
    dtype: torch.dtype
    is_published: bool


def tensors_of(folder: Path) -> MixtureKind:
    """Return the names of a mixture's tensors, and the dtype of its weights.

    Raises:
        UpitError: it is no mixture that we write.
    """
    with opened_mixture(folder, str(folder)) as moe:
        architecture = inspect_mixture(moe)
        names = frozenset(name for name in moe.specs if not is_derived(name))
        dtype = moe.specs[architecture.gate_names()[0]].dtype
        return MixtureKind(architecture.format, names, dtype, moe.is_published)


def merged_adapter(
    folder: Path, adapter: str | Path, dtype: torch.dtype | Literal["auto"] = "auto"
) -> Any:
    """Load a model, dense or a mixture, and add to its weights what LoRA learned.

    Args:
        dtype: In which it is loaded and added to; the stored one if `auto`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_alone(folder, dtype=dtype)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def files_besides_weights(folder: Path) -> list[Path]:
    """Return everything of a model but its weights: settings, tokenizer, recipe.

    Raises:
        UpitError: one of them is a link out of the folder, which would be copied from there.
    """
    files = [
        own_file(path, folder)
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS)
    ]
    return [*files, *template_files(folder)]


def _complete_settings(folder: Path) -> None:
    """Give a mixture from elsewhere the settings that other readers look for."""
    path = folder / "config.json"
    config = read_json(path, "the mixture")
    form = found_format(config)
    assert form is not None  # it is read already
    complete = complete_config(config, form)
    if complete != config:
        write_json(path, complete)


def _adapt_settings(trainer: Any, job: FinetuneJob, config: Any, folder: Path) -> None:
    """Write what a new chat template or end token changes, if one was given."""
    if not (job.training.chat_template_path or job.training.eos_token):
        return
    shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)  # saved again as far as they stay
    trainer.processing_class.save_pretrained(folder)
    settings = read_json(folder / "config.json", "the mixture")
    form = found_format(settings)
    assert form is not None
    own = {"vocab_size": config.vocab_size, "eos_token_id": config.eos_token_id}
    settings = form.with_language_part(settings, {**form.language_part(settings), **own})
    write_json(folder / "config.json", settings)
    generation = folder / "generation_config.json"
    if generation.is_file():
        settings = read_json(generation, "the mixture")
        settings["eos_token_id"] = trainer.model.generation_config.eos_token_id
        write_json(generation, settings)


def _write_report(
    trainer: Any, job: FinetuneJob, source: Path, folder: Path, seconds: float
) -> None:
    before = read_report(source)
    if not before.document:
        return  # a mixture from elsewhere
    report = after(before, "finetune", {"post_training": _record(trainer, job, seconds)})
    document = dict(report.document)
    if card_is_ours(source, report):
        document = write_card(folder, report, recipe_of(source))
    document["files"] = sorted({*output_files(folder), REPORT})
    write_json(folder / REPORT, document)


def _record(trainer: Any, job: FinetuneJob, seconds: float) -> dict[str, Any]:
    """Return what was done, for the report."""
    training, state = job.training, trainer.state
    settings = {name: getattr(training, name) for name in _RECORDED}
    settings["lr_scheduler_type"] = str(getattr(training.lr_scheduler_type, "value", ""))
    settings["train_modules"] = "lora" if job.model.use_peft else job.extra.train_modules
    settings["router_aux_loss_coef"] = float(trainer.router_aux_loss_coef)
    history = [
        {"step": entry["step"], **{key: entry[key] for key in _HISTORY if key in entry}}
        for entry in state.log_history
        if "loss" in entry
    ]
    return {
        "settings": settings,
        "data": _data_name(job),
        "samples": len(trainer.train_dataset),
        "tokens": int(state.num_input_tokens_seen),
        "steps": int(state.global_step),
        "seconds": round(seconds, 1),
        "history": history,
    }


def _data_name(job: FinetuneJob) -> str:
    """Return files by their last part: where they are on this machine is nobody's business."""
    if job.extra.data:
        return Path(job.extra.data).name
    named = ", ".join(source.path for source in job.data.datasets or [])
    return named or str(job.script.dataset_name)
