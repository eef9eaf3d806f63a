"""One expert and its routing vectors trained together (arXiv 2410.01610, section 3.3).

Expert i as a dense model, the shared backbone with expert i's FFN in every layer, learns from the
samples it is best at. A routing vector per layer learns to say yes to all tokens of those samples.
All else is frozen. A whole dense model is in memory (never the mixture), with gradients and two
moments for what is trained: 4 bytes per parameter on the CPU and 12 more per trained one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upit_merge.config.router import UpitObjective
from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.body import compute_tables, one_expert
from upit_merge.engine.layerwise import LOGIT_ROWS
from upit_merge.errors import UpitError
from upit_merge.io.sources import TensorSource
from upit_merge.models.formats import PROJECTIONS
from upit_merge.models.mixture import MixtureArchitecture, read_mixture
from upit_merge.runtime.parallel import progress_bar

# How torchrun, `accelerate launch` and MPI tell a process that it is one of several.
_LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "ACCELERATE_", "OMPI_", "PMI_", "MV2_")


@dataclass(frozen=True)
class TunedExpert:
    """What the training of one expert gives, on the CPU.

    `ffn` has its FFN weights by their names in the folder, in the folder's dtypes. `vectors` are its
    routing vectors, float32, (num_layers, hidden_size). `loss`, in nats, is the mean over the
    steps of the last epoch; NaN where nothing was trained.
    """

    ffn: dict[str, Tensor]
    vectors: Tensor
    loss: float


def positive_loss(logits: Tensor) -> Tensor:
    """Mean of -log sigmoid over logits of any shape, in nats: the cross-entropy with all yes."""
    return F.softplus(-logits).mean()


def padded_batch(samples: Sequence[TokenizedSample]) -> dict[str, Tensor]:
    """Samples as one batch, padded on the right: `input_ids` (int64), `real` (bool, not padding)
    and `targets` (bool, counts in the language-modelling loss), each (num_samples, longest).
    """
    rows = [torch.tensor(sample.input_ids) for sample in samples]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    position = torch.arange(input_ids.shape[1])
    real = position < torch.tensor([[len(row)] for row in rows])
    targets = real & (position >= torch.tensor([[sample.loss_start] for sample in samples]))
    return {"input_ids": input_ids, "real": real, "targets": targets}


class ExpertModel(nn.Module):
    """A dense model with a routing vector per layer, zero at first, and the loss of both.

    Args:
        dense: The mixture as a causal language model of transformers, with one expert per layer.
        architecture: The mixture's.
        alpha: Weight of the language-modelling loss; the routing loss has 1 - alpha.
    """

    # The Trainer must not pass a number of tokens to divide by: the losses below are means.
    accepts_loss_kwargs = False

    def __init__(self, dense: Any, architecture: MixtureArchitecture, alpha: float) -> None:
        super().__init__()
        self.dense, self.architecture, self.alpha = dense, architecture, alpha
        layers, form = architecture.mixture_layers, architecture.format
        shape = (len(layers), dense.config.hidden_size)
        self.vectors = nn.Parameter(torch.zeros(shape, device=dense.device))
        self._logits: list[Tensor] | None = None
        for index, layer in enumerate(layers):
            gate = dense.base_model.layers[layer].get_submodule(form.gate_path)
            gate.register_forward_pre_hook(partial(self._route, index))

    def _route(self, layer: int, _gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Where activations are recomputed, this runs again in the backward pass. It must then
        # repeat the arithmetic of the forward pass, but not collect the result a second time.
        router_input = inputs[0]
        with torch.autocast(router_input.device.type, enabled=False):
            logits = router_input.float() @ self.vectors[layer]
        if self._logits is not None:
            self._logits.append(logits)

    def _summed_loss(self, states: Tensor, wanted: Tensor) -> Tensor:
        outputs = self.dense.lm_head(states).float()
        logits = self.architecture.format.logits(outputs, self.architecture.config)
        return F.cross_entropy(logits, wanted, reduction="sum")

    def forward(self, input_ids: Tensor, real: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`loss` of a batch from `padded_batch`, a float32 scalar in nats.

        It is alpha times the mean over all target tokens of the language-modelling loss, plus
        1 - alpha times the mean over layers and all real tokens of the routing loss.
        """
        self._logits = []
        # No attention mask: padding comes last, where causal attention keeps it from every real
        # token, and what is computed at the padding itself enters neither loss.
        states = self.dense.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        routing = positive_loss(torch.stack(self._logits, dim=-1)[real.flatten()])
        self._logits = None
        rows, wanted = states[:, :-1][targets[:, 1:]], input_ids[:, 1:][targets[:, 1:]]
        # Logits are the largest tensor of all: a few rows at a time, computed again for gradients.
        language = torch.zeros((), device=rows.device)
        for part, ids in zip(rows.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
            language = language + checkpoint(self._summed_loss, part, ids, use_reentrant=False)
        return {"loss": self.alpha * language / len(wanted) + (1 - self.alpha) * routing}


def _ffn_names(architecture: MixtureArchitecture, expert: int) -> dict[str, str]:
    """Return the name of each FFN tensor of an expert, by its name in `load_expert`'s model."""
    form = architecture.format
    return {
        f"{form.layer_prefix(n)}{form.experts_path}.{p}.weight": form.expert_tensor(n, expert, p)
        for n in architecture.mixture_layers
        for p in PROJECTIONS
    }


def _backbone_names(moe: TensorSource, architecture: MixtureArchitecture) -> dict[str, str]:
    """Return the name of each other tensor but the gates, by its name in that model."""
    names = {
        architecture.format.layer_prefix(layer) + own: name
        for layer in range(architecture.num_layers)
        for own, name in architecture.backbone_of(layer, moe.specs).items()
    }
    names["model.embed_tokens.weight"] = "model.embed_tokens.weight"
    return names


def load_expert(
    moe: TensorSource, expert: int, settings: UpitObjective, device: torch.device
) -> ExpertModel:
    """Load one expert of a MoE folder as a dense model with routing vectors of zero.

    On a GPU, frozen weights and all matrix products of a half-precision folder are bfloat16;
    float16 would need its loss scaled. All else, and whatever is trained, is float32.

    Args:
        moe: A folder that `LayerwiseMixture` accepts.
        settings: `lora_rank` adds factors whose first values torch's global generator draws.
    """
    from peft import LoraConfig, inject_adapter_in_model

    architecture = read_mixture(moe)
    form = architecture.format
    config = copy.deepcopy(architecture.config)
    # Without the padding id, which need not be in the embedding table and is of no use here, and
    # without dropout, which did not act on the losses that chose the samples either.
    config.pad_token_id, config.attention_dropout = None, 0.0
    # Makes no (tokens, tokens) matrix for a causal mask, and takes float32 as well as bfloat16.
    config._attn_implementation = form.attention
    dense = form.model(config)
    for layer in architecture.mixture_layers:
        one_expert(dense.base_model.layers[layer], architecture)
    stored = moe.specs[architecture.gate_names()[0]].dtype
    half = device.type == "cuda" and stored != torch.float32
    frozen = torch.bfloat16 if half and torch.cuda.is_bf16_supported() else torch.float32
    ffn = _ffn_names(architecture, expert)
    names = ffn | _backbone_names(moe, architecture)
    trained = torch.float32 if settings.lora_rank is None else frozen
    state = {
        own: moe.tensor(name).to(device, trained if own in ffn else frozen)
        for own, name in names.items()
    }
    gate = torch.zeros(architecture.num_experts, config.hidden_size, device=device, dtype=frozen)
    for layer in architecture.mixture_layers:  # what they say does not matter
        state[f"{form.layer_prefix(layer)}{form.gate_path}.weight"] = gate
    norm = form.final_norm(dense.base_model)
    (final,) = (name for name, module in dense.named_modules() if module is norm)
    state[f"{final}.weight"] = moe.tensor(form.final_norm_tensor).to(device, frozen)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = moe.tensor("lm_head.weight").to(device, frozen)
    dense.load_state_dict(state, assign=True)
    compute_tables(dense.base_model, config, device)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in ffn)
    if rank := settings.lora_rank:
        modules = [name.removesuffix(".weight") for name in ffn]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
        inject_adapter_in_model(lora, dense)  # freezes the rest
        for parameter in filter(lambda p: p.requires_grad, dense.parameters()):
            parameter.data = parameter.data.float()  # the factors come in the frozen dtype
    # Of each layer the input is kept, the rest computed again for the gradients. The older of the
    # two names is deprecated, the newer one is not in every transformers 5.
    enable = getattr(dense, "activation_checkpointing_enable", None)
    (enable or dense.gradient_checkpointing_enable)({"use_reentrant": False})
    return ExpertModel(dense, architecture, float(settings.alpha))


def tune_expert(
    moe: TensorSource,
    expert: int,
    samples: Sequence[TokenizedSample],
    settings: UpitObjective,
    *,
    seed: int,
    device: torch.device,
    scratch: Path,
    quiet: bool,
    on_progress: Callable[[float], object] | None = None,
) -> TunedExpert:
    """Train one expert's FFN and its routing vectors on its own samples (paper, section 3.3).

    AdamW without weight decay at a constant learning rate, gradients clipped to a norm of 1. The
    rate is constant because buckets differ in size: a step means the same for every expert, and
    does not depend on how many follow. The same call gives the same bits on the same CPU.

    Args:
        moe: A folder that `LayerwiseMixture` accepts.
        samples: The expert's bucket. Where it is empty, the FFN is returned as it is stored.
        seed: Of the order of the samples and of LoRA's factors.
        scratch: A folder for the Trainer, which is told to write nothing.
        on_progress: Called with the number of samples of each step.

    Raises:
        UpitError: the loss, a weight or a routing vector is NaN or infinite after the training.
    """
    architecture = read_mixture(moe)
    names = _ffn_names(architecture, expert)
    if not samples:
        size = int(architecture.config.hidden_size)
        vectors = torch.zeros(len(names) // len(PROJECTIONS), size)
        return TunedExpert({name: moe.tensor(name) for name in names.values()}, vectors, math.nan)
    steps = math.ceil(len(samples) / settings.batch_size)
    ffn: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    total, title = steps * settings.epochs, f"training of expert {expert}"
    with _alone(device, seed), progress_bar(total, title, quiet=quiet, unit="step") as bar:

        def after_step(_model: Any, _args: Any, batch: Any, output: dict[str, Tensor]) -> None:
            losses.append(output["loss"].detach())
            bar.update()
            if on_progress:
                on_progress(len(batch["input_ids"]))

        model = load_expert(moe, expert, settings, device)
        model.register_forward_hook(after_step, with_kwargs=True)
        _train(model, samples, settings, output_dir=str(scratch), seed=seed % 2**32)  # for numpy
    for dense_name, name in names.items():
        module: Any = model.dense.get_submodule(dense_name.removesuffix(".weight"))
        weight = module.weight
        if settings.lora_rank is not None:  # added to what is stored, so that it is rounded once
            weight = moe.tensor(name).float() + module.get_delta_weight("default").cpu()
        ffn[name] = weight.detach().to("cpu", moe.specs[name].dtype)
    vectors = model.vectors.detach().cpu()
    loss = float(torch.stack(losses[-steps:]).mean())
    del model, module
    gc.collect()  # the model is part of cycles, and the next expert needs its memory
    if not (math.isfinite(loss) and all(t.isfinite().all() for t in (vectors, *ffn.values()))):
        raise UpitError(
            f"Expert {expert} is NaN or infinite after training with a learning rate of "
            f"{settings.learning_rate:g}; give a lower `router.upit.lr`."
        )
    return TunedExpert(ffn, vectors, loss)


def _train(
    model: ExpertModel, samples: Sequence[TokenizedSample], settings: UpitObjective, **options: Any
) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    device = model.vectors.device
    on_gpu = device.type != "cpu"

    class OneDevice(TrainingArguments):  # by itself it takes the first GPU, or all of them
        n_gpu = int(on_gpu)

        @property
        def device(self) -> torch.device:
            _ = self._setup_devices  # tells accelerate
            return device

    arguments = OneDevice(
        **options,
        use_cpu=not on_gpu,
        bf16=model.dense.lm_head.weight.dtype == torch.bfloat16,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    trainer = Trainer(model, arguments, padded_batch, list(samples))
    trainer.remove_callback(PrinterCallback)  # standard output is not for this
    trainer.train()


@contextlib.contextmanager
def _alone(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded generators, and no launcher whose other processes the Trainer would wait for.

    On leaving, the launcher's variables and Python's, numpy's and torch's generators are back.
    """

    def hide() -> dict[str, str]:
        return {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(_LAUNCHER)}

    on_gpu = device.type == "cuda"
    gpus = range(torch.cuda.device_count()) if on_gpu or torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.cuda.device(device if on_gpu else -1))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(os.environ.update, hide())
        stack.callback(hide)  # first of all, what accelerate has set meanwhile
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        torch.manual_seed(seed)
        yield
