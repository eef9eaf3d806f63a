"""`upit-merge finetune`: prepares experts (stage 1), trains the finished mixture (stage 4)."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from upit_merge import __version__
from upit_merge.data.examples import local_data
from upit_merge.data.training_set import tokenized_set, training_set
from upit_merge.errors import UpitError, argument, first_line, one_line
from upit_merge.io.checkpoint import SAFE_WEIGHTS, check_not_compiled, has_any
from upit_merge.io.disk import explained_failures
from upit_merge.io.hub import OpenOptions, resolve
from upit_merge.io.language_part import language_settings
from upit_merge.io.untrusted import check_own_files, read_json
from upit_merge.models.formats import found_format
from upit_merge.output.identity import file_states
from upit_merge.output.lock import exclusive, release
from upit_merge.output.staging import REPORT, check_not_half_edited, remove_if_empty
from upit_merge.report.next_steps import HELD_OUT, tell_next
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.processes import Processes, joined
from upit_merge.training.alone import load_alone
from upit_merge.training.disk import check_training_space
from upit_merge.training.new_tokens import complete_head, model_with_tokens
from upit_merge.training.outcome import (
    files_besides_weights,
    finish_move,
    tensors_of,
    write_mixture,
)
from upit_merge.training.products import choose_products
from upit_merge.training.quantise import quantise_experts
from upit_merge.training.run_state import RunState
from upit_merge.training.settings import FinetuneJob, data_files, load_job
from upit_merge.training.targets import resolve_targets
from upit_merge.training.trainable import freeze_others
from upit_merge.training.trainer import ExpertTrainer, Progress, SaveWatch

LOG = logging.getLogger(__name__)

_SINGLE = (
    "The mixture routes a token to one expert, whose weight is always 1: its gates learn from the "
    "balance loss alone, not from the text; one made with `experts_per_token: 2` learns from both."
)


def finetune(path: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> None:
    """Train a model as a configuration says.

    A dense model leaves `checkpoint-*` in `output_dir`, which become experts; a mixture becomes a
    model there, with the names, `config.json` and tokenizer of the one it was. A call that was cut
    off goes on from its last checkpoint, and on the CPU ends with the same bytes.

    Under `accelerate launch` all processes must call this.

    Args:
        path: YAML, see `settings.load_job`.
        overrides: `--key value` pairs that win over it.

    Raises:
        UpitError: a mistake in the configuration, or in what it names.
    """
    job = load_job(path, overrides)
    out = Path(job.training.output_dir)
    folder = resolve(job.model.model_name_or_path, OpenOptions(), role="model")
    check_not_half_edited(folder)
    check_own_files(str(job.model.model_name_or_path), folder)
    check_not_compiled(str(job.model.model_name_or_path), folder)
    config = read_json(folder / "config.json", "the model")
    form = found_format(config)
    is_mixture = form is not None
    keep = not is_mixture if job.extra.keep_checkpoints is None else job.extra.keep_checkpoints
    if not (is_mixture or keep):
        raise UpitError(
            "keep_checkpoints: false would leave nothing, as a dense model's checkpoints are the "
            "result of its training; remove it (save_total_limit: 1 keeps the last one)."
        )
    kind = tensors_of(folder) if is_mixture else None  # before hours are spent on it
    if is_mixture:
        job.warm_up()
        _check_untied(job, config)
        files_besides_weights(folder)  # what is wrong with them must show now as well
    resolve_targets(job.model, folder)
    _ = job.training.device  # accelerate meets the other processes first: it knows the device
    with joined() as processes, contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first:
                stack.enter_context(_owned(out))
        with processes.together():
            state = RunState(out, _identity(job, folder, processes))
        if state.is_finished:
            if processes.is_first:
                state.tidy(keep_checkpoints=keep)
                print(f"{out} holds the result of this run already.")
            return

        def on_exit() -> str:
            if not processes.is_first:
                return ""
            release(out)
            return "Interrupted; the same command goes on from the last checkpoint."

        stack.enter_context(explained_failures(out))
        stack.enter_context(ends_at_once(on_exit))
        with processes.together():
            if processes.is_first:
                state.begin()
                stack.callback(state.abandon)
        # Ours, see `RunState.saved`.
        limit, job.training.save_total_limit = job.training.save_total_limit, None
        trainer = _trainer(job, folder, state.newest)
        if form is not None:
            _check_new_tokens(job, config, trainer)
            if processes.is_first and form.chosen(trainer.model.config) == 1:
                LOG.warning("%s", _SINGLE)
            names = ("activation_checkpointing", "gradient_checkpointing")  # new, and of old
            again = any(getattr(job.training, name, False) for name in names)
            mixed = bool(job.training.bf16 or job.training.fp16)
            choose_products(trainer.model, mixed=mixed)
            quantise_experts(trainer.model, job.model, checkpointing=again)
        check_training_space(trainer, folder, out, limit, keep_checkpoints=keep)
        seconds = _train(trainer, job, state, limit, quiet=quiet)
        if kind is not None:
            write_mixture(trainer, job, folder, out, kind, seconds)
        processes.gather(None)
        if processes.is_first:
            state.finish(keep_checkpoints=keep)
            _tell(out, seconds, is_mixture=is_mixture)


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Hold the output folder, and finish what an earlier call had all but finished."""
    if out.is_file():
        raise UpitError(f"The output {out} is a file; give a folder.")
    created = [path for path in (out, *out.parents) if not path.exists()]
    with explained_failures(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(out):
            finish_move(out)
            yield
    finally:
        for folder in created:
            remove_if_empty(folder)


def _identity(job: FinetuneJob, folder: Path, processes: Processes) -> dict[str, Any]:
    """Return what decides the result: a call that differs in any of it cannot go on with it."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")]
    # A report changes when a model is measured, and with it nothing that is trained.
    files = [path for path in files if path.name != REPORT]
    files += data_files(job.extra.data, job.data.datasets, job.script.dataset_name)
    return {
        "upit-merge": __version__,
        **job.identity(),
        "number of processes": processes.size,
        "file": file_states(files, ""),
    }


def _check_untied(job: FinetuneJob, config: Mapping[str, Any]) -> None:
    """Refuse what would part a head from the embeddings that it shares its weights with."""
    named = {*(job.model.lora_modules_to_save or [])} & {"lm_head", "embed_tokens"}
    if job.model.use_peft and language_settings(config).get("tie_word_embeddings") and named:
        raise UpitError(
            f"lora_modules_to_save has {sorted(named)[0]}, but the mixture has one tensor for head "
            "and embeddings, which LoRA would make two of; remove it."
        )


def _trainer(job: FinetuneJob, folder: Path, newest: Path | None) -> ExpertTrainer:
    """Return TRL's trainer, as `trl sft` sets it up, with only some weights trainable.

    Args:
        folder: Of the model that is trained.
        newest: The checkpoint from which an earlier call goes on. transformers' trainer takes the
            optimiser from there, but the weights of a mixture only in part: it looks for experts
            under the names they have in memory, which are others in files. So they are read here.
    """
    from transformers import AutoTokenizer, set_seed
    from trl import get_peft_config, get_quantization_config

    training, model = job.training, job.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    training.disable_tqdm = True  # there is a bar of our own
    training.include_num_input_tokens_seen = "non_padding"
    set_seed(training.seed)  # TRL below 1.15 draws an adapter's first weights without
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        complete = newest is not None and has_any(newest, SAFE_WEIGHTS)
        source = str(newest if complete else folder)
        lora, quantization = get_peft_config(model), get_quantization_config(model)
        made = model_with_tokens(job, source, tokenizer, lora, quantization)
        told = ["model_init_kwargs", "chat_template_path"] if made is not None else []
        if made is None:
            settings = {**training.model_init_kwargs, "quantization_config": quantization}
            made = load_alone(Path(source), **settings)
            told = ["model_init_kwargs"] if made is not None else []
        with _told_already(training, told):
            trainer = ExpertTrainer(
                model=source if made is None else made,
                processing_class=tokenizer,
                args=training,
                train_dataset=_dataset(job, tokenizer),
                quantization_config=quantization if made is None else None,
                peft_config=lora,
            )
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise UpitError(
            f"The training cannot be set up: {one_line(first_line(error))}; correct the "
            "configuration or the data."
        ) from error
    if model.use_peft:
        complete_head(trainer.model)
        # The name others know it by, not where it lies on this machine.
        name = str(model.model_name_or_path)
        shown_name = name if Path(os.path.expanduser(name)).is_dir() else name.partition("@")[0]
        for config in trainer.model.peft_config.values():
            config.base_model_name_or_path = shown_name
    if job.extra.train_modules != "all":
        freeze_others(trainer.model, job.extra.train_modules)
    return trainer


@contextlib.contextmanager
def _told_already(training: Any, settings: Sequence[str]) -> Iterator[None]:
    """Hide from TRL what was done for it."""
    kept = {key: getattr(training, key) for key in settings}
    vars(training).update(dict.fromkeys(kept))
    try:
        yield
    finally:
        vars(training).update(kept)


def _dataset(job: FinetuneJob, tokenizer: Any) -> Any:
    from datasets import load_dataset
    from trl import get_dataset

    script = job.script
    try:
        if job.extra.data:
            splits = _own_data(job, tokenizer)
        elif job.data.datasets:
            splits = get_dataset(job.data)
        else:
            splits = load_dataset(script.dataset_name, name=script.dataset_config)
    except UpitError:
        raise
    except Exception as error:  # a reader of files from elsewhere raises whatever comes up
        raise UpitError(
            f"The training data cannot be read ({one_line(first_line(error))}); check the file, or "
            "the name of the dataset."
        ) from error
    if script.dataset_train_split not in splits:
        raise UpitError(
            f"The training data has no split {one_line(script.dataset_train_split)} (it has "
            f"{', '.join(map(one_line, splits))}); correct dataset_train_split."
        )
    return splits[script.dataset_train_split]


def _own_data(job: FinetuneJob, tokenizer: Any) -> Any:
    """Return the splits of `data:`, read as the router reads its samples."""
    data, script = str(job.extra.data), job.script
    table = tokenized_set(data)
    if table is None:
        table = training_set(
            data,
            tokenizer,
            split=script.dataset_train_split,
            config=script.dataset_config,
            text=job.training.dataset_text_field,
            other_template=job.training.chat_template_path is not None,
        )
    if job.data.test_split_size is not None:
        return table.train_test_split(test_size=job.data.test_split_size)
    # A file has one split, whatever it is called; of a dataset id it is the one that was read.
    return {"train" if local_data(data) else script.dataset_train_split: table}


def _check_new_tokens(job: FinetuneJob, config: Mapping[str, Any], trainer: Any) -> None:
    before, after = language_settings(config).get("vocab_size"), trainer.model.config.vocab_size
    if job.model.use_peft and before != after:
        raise UpitError(
            f"The chat template adds tokens (the vocabulary of {before} becomes one of {after}), "
            "which LoRA on a mixture cannot carry; name a .jinja file as chat_template_path, or "
            "train without use_peft."
        )


def _train(
    trainer: ExpertTrainer,
    job: FinetuneJob,
    state: RunState,
    limit: int | None,
    *,
    quiet: bool,
) -> float:
    """Train to the end, from an earlier call's last checkpoint; return seconds over all calls."""
    started, before = time.perf_counter(), state.seconds

    def seconds() -> float:
        return before + time.perf_counter() - started

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(f"train {job.extra.train_modules}", quiet=quiet))

    def saved(step: int) -> None:
        if job.model.use_peft and (job.training.chat_template_path or job.training.eos_token):
            # An adapter's checkpoint has no settings: the token that ends a text is a new one.
            settings = trainer.accelerator.unwrap_model(trainer.model).generation_config
            settings.save_pretrained(state.folder / f"checkpoint-{step}")
        state.saved(step, seconds(), limit)

    trainer.add_callback(SaveWatch(trainer.accelerator.wait_for_everyone, saved))
    newest = state.newest
    if newest is not None:
        LOG.info("Going on from %s.", newest)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    return seconds()


def _tell(out: Path, seconds: float, *, is_mixture: bool) -> None:
    if is_mixture:
        print(f"Trained in {seconds / 60:.1f} minutes; the model is in {out}.")
        measure = f"upit-merge evaluate {argument(out)} --data {HELD_OUT}"
        tell_next(("measure it", measure), ("talk to it", f"upit-merge chat {argument(out)}"))
        return
    count = len(list(out.glob("checkpoint-*")))
    subject = "1 checkpoint is" if count == 1 else f"{count} checkpoints are"
    minutes = seconds / 60
    print(f"Trained in {minutes:.1f} minutes; {subject} in {out}, {out}/checkpoint-* in a recipe.")
    tell_next(("write that recipe", f"upit-merge init {argument(out)}"))
