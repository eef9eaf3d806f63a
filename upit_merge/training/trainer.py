"""TRL's trainer, with what a run of ours needs besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer

from upit_merge.models.formats import found_format
from upit_merge.models.tokenizer_files import make_readable
from upit_merge.runtime.parallel import progress_bar
from upit_merge.training.routing import RoutingMonitor, balance_each_layer, routing_metrics
from upit_merge.training.trainable import routers

_SHOWN = {
    "loss": "loss {:.3f}",
    "routing_entropy": "routing entropy {:.2f}",
    "dead_experts": "dead experts {:.0f}",
}


class ExpertTrainer(SFTTrainer):
    """Balances and logs what the routers of a mixture do; writes no model cards of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        gates = routers(self.model)
        self.monitor = RoutingMonitor(gates) if gates else None
        if gates:
            mixture = (
                self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            )
            balance_each_layer(mixture, gates, _spell_counts(mixture.config))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.monitor is not None:
            self.monitor.mask = inputs.get("attention_mask")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log routing too; all processes call this together, and the sums are those of all."""
        sums = self.monitor.take() if self.monitor is not None and "loss" in logs else None
        if sums is not None:
            total = self.accelerator.reduce(sums.float(), "sum")
            logs.update(routing_metrics(total.double()))
        super().log(logs, start_time)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save, with a tokenizer that transformers 4 and what is built on it can read."""
        super()._save(output_dir, state_dict)
        make_readable(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Go on in the dtypes that training began in: PEFT reads factors as float32."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a mixture has a card, rendered from its report, and checkpoints need none."""


def _spell_counts(config: Any) -> int:
    """Let a mixture's configuration tell TRL how many experts there are; returns how many chosen.

    TRL 1.16 asks every one for `num_experts` and `num_experts_per_tok`, which Mixtral's has and
    Granite's has not. What is added here is not a field, and is not saved.
    """
    form = found_format(config.to_dict())
    assert form is not None
    counts = {"num_experts": form.sizes(config)[0], "num_experts_per_tok": form.chosen(config)}

    def telling(count: int) -> property:
        return property(lambda _config: count)

    missing = {name: telling(count) for name, count in counts.items() if not hasattr(config, name)}
    if missing:
        config.__class__ = type(type(config).__name__, (type(config),), missing)
    return counts["num_experts_per_tok"]


class SaveWatch(TrainerCallback):
    """Tells when a checkpoint is complete, of all processes."""

    def __init__(self, wait: Callable[[], None], saved: Callable[[int], None]) -> None:
        self._wait = wait
        self._saved = saved

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._wait()
        if state.is_world_process_zero:
            self._saved(state.global_step)


class Progress(TrainerCallback):
    """One bar with the time left, the loss and what the routers do."""

    def __init__(self, description: str, *, quiet: bool) -> None:
        self._description = description
        self._quiet = quiet
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        quiet = self._quiet or not state.is_world_process_zero
        self._bar = progress_bar(state.max_steps, self._description, quiet=quiet, unit="step")
        self._bar.initial = state.global_step  # steps of an earlier call took no time of this one
        self._bar.update(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        parts = [text.format(logs[key]) for key, text in _SHOWN.items() if logs and key in logs]
        if parts and self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.close()
