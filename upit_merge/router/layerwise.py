"""A Mixtral on disk, run layer by layer: memory holds one dense layer and the hidden states.

The dense stream of expert e is the shared backbone with expert e's FFN in every layer. It is
computed with transformers' own Mistral decoder layer, whose attention is Mixtral's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit_merge.checkpoints import Checkpoint
from upit_merge.errors import UpitError
from upit_merge.mixtral import PROJECTIONS, check_moe, expert_tensor, gate_tensor
from upit_merge.router.seed_tokens import TokenizedSample
from upit_merge.staging import require_space, reserve

# Rows of logits computed at a time: 1,024 x a vocabulary of 128 K in float32 is half a gigabyte.
LOGIT_ROWS = 1024

MEAN = -1  # stands for the expert whose FFN is the mean of all


@dataclass(frozen=True)
class Stream:
    """Samples that go through the same expert.

    Attributes:
        expert: Its index, or `MEAN`.
        samples: Indices of the samples.
    """

    expert: int
    samples: tuple[int, ...]


class PackedStates:
    """One row per token of every sample, without padding: (num_tokens, hidden_size).

    Kept in memory, or in a memory-mapped scratch file when larger than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        *,
        scratch: Path,
        budget_bytes: float,
    ) -> None:
        self.offsets = [0]
        for length in lengths:
            self.offsets.append(self.offsets[-1] + length)
        shape = (self.offsets[-1], width)
        self._file: Path | None = None
        if shape[0] * width * dtype.itemsize <= budget_bytes:
            self.rows = torch.empty(shape, dtype=dtype)
        else:
            num_bytes = shape[0] * width * dtype.itemsize
            require_space(scratch, num_bytes, "the router's hidden states")
            self._file = scratch / f"hidden-{id(self):x}.bin"
            # A hole in a mapped file kills the process when the disk is full: fill it first.
            reserve(self._file, num_bytes)
            mapped = torch.from_file(
                str(self._file), shared=True, size=shape[0] * width, dtype=dtype
            )
            self.rows = mapped.view(shape)

    def span(self, sample: int) -> slice:
        """The rows of one sample."""
        return slice(self.offsets[sample], self.offsets[sample + 1])

    def close(self) -> None:
        self.rows = torch.empty(0)
        if self._file:
            self._file.unlink(missing_ok=True)


class LayerwiseMoe:
    """A Mixtral folder whose layers are loaded one at a time.

    Args:
        moe: The open folder, with canonical Mixtral names.
        device: Where a layer is computed. On the CPU in float32, else in the stored dtype.

    Raises:
        UpitError: the folder is not a Mixtral, or a tensor is missing or has another shape.
    """

    def __init__(self, moe: Checkpoint, device: torch.device) -> None:
        from transformers import MistralConfig, MixtralConfig

        if moe.config.get("model_type") != "mixtral":
            raise UpitError(
                f"{moe.label} has model_type {moe.config.get('model_type')!r}; the router needs a "
                "Mixtral folder, such as the output of a upit recipe."
            )
        self.moe = moe
        self.device = device
        try:
            config = MixtralConfig.from_dict(dict(moe.config))
        except Exception as error:  # validation errors of transformers and of huggingface_hub
            reason = " ".join(str(error).split())
            raise UpitError(
                f"The config.json of {moe.label} is not a valid Mixtral configuration ({reason}); "
                "make the model again."
            ) from None
        self.num_layers: int = config.num_hidden_layers
        self.num_experts: int = config.num_local_experts
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        check_moe(moe, config)
        self.stored_dtype = moe.specs[gate_tensor(0)].dtype
        self.dtype = torch.float32 if device.type == "cpu" else self.stored_dtype
        fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")}
        self._config = MistralConfig(**fields)
        self._config._attn_implementation = "sdpa"
        self._tied: bool = bool(config.tie_word_embeddings)

    def load(self, name: str) -> Tensor:
        """A tensor of the folder on the device, in the computing dtype."""
        return self.moe.tensor(name).to(device=self.device, dtype=self.dtype)

    def ffn(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The FFN weights of an expert, or of the mean of all, by projection."""
        if expert != MEAN:
            return {p: self.load(expert_tensor(layer, expert, p)) for p in PROJECTIONS}
        means = {}
        for projection in PROJECTIONS:
            total = self.moe.tensor(expert_tensor(layer, 0, projection)).float()
            for other in range(1, self.num_experts):
                total += self.moe.tensor(expert_tensor(layer, other, projection)).float()
            means[projection] = (total / self.num_experts).to(self.device, self.dtype)
        return means

    def decoder_layer(self, layer: int) -> nn.Module:
        """A dense decoder layer with this layer's attention and norms; its FFN is still empty."""
        from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

        with torch.device("meta"):
            module = MistralDecoderLayer(self._config, layer)
        prefix = f"model.layers.{layer}."
        state = {
            name.removeprefix(prefix): self.load(name)
            for name in self.moe.specs
            if name.startswith(prefix) and ".block_sparse_moe." not in name
        }
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
        # The FFN comes per expert; anything else that is not there would be uninitialised memory.
        if unexpected or any(not name.startswith("mlp.") for name in missing):
            raise RuntimeError(f"layer {layer}: missing {missing}, unexpected {unexpected}")
        return module.eval().requires_grad_(False)

    def set_ffn(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        state = {f"mlp.{projection}.weight": weight for projection, weight in weights.items()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)

    def attention_inputs(self, batch: Tensor) -> dict[str, Any]:
        """Mask and positions for a right-padded batch (samples, tokens, hidden_size).

        Padding follows every real token, so the causal mask alone keeps it out of them.
        """
        from transformers.masking_utils import (
            create_causal_mask,
            create_sliding_window_causal_mask,
        )
        from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

        positions = torch.arange(batch.shape[1], device=self.device).unsqueeze(0)
        make_mask = (
            create_causal_mask
            if self._config.sliding_window is None
            else create_sliding_window_causal_mask
        )
        mask = make_mask(
            config=self._config,
            inputs_embeds=batch,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = MistralRotaryEmbedding(config=self._config).to(self.device)
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": rotary(batch, position_ids=positions),
        }

    def embed(self, samples: Sequence[TokenizedSample], states: PackedStates) -> None:
        """Fill `states` with the token embeddings."""
        table = self.moe.tensor("model.embed_tokens.weight")
        for index, sample in enumerate(samples):
            ids = torch.tensor(sample.input_ids)
            states.rows[states.span(index)] = table[ids].to(states.rows.dtype)

    @torch.no_grad()
    def losses(self, samples: Sequence[TokenizedSample], states: PackedStates) -> Tensor:
        """Mean negative log-likelihood of each sample's target tokens, float64, (num_samples,).

        Args:
            states: The hidden states after the last layer.
        """
        from transformers.models.mistral.modeling_mistral import MistralRMSNorm

        norm = MistralRMSNorm(self.hidden_size, eps=self._config.rms_norm_eps)
        norm.weight = nn.Parameter(self.load("model.norm.weight"), requires_grad=False)
        head = self.load("model.embed_tokens.weight" if self._tied else "lm_head.weight")
        means = torch.empty(len(samples), dtype=torch.float64)
        for index, sample in enumerate(samples):
            rows = states.rows[states.span(index)][sample.loss_start - 1 : -1].to(self.device)
            targets = torch.tensor(sample.input_ids[sample.loss_start :], device=self.device)
            total = 0.0
            for start in range(0, len(targets), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                logits = F.linear(norm(rows[part]), head).float()
                total += float(F.cross_entropy(logits, targets[part], reduction="sum"))
            means[index] = total / len(targets)
        return means

    @torch.no_grad()
    def sweep(
        self,
        samples: Sequence[TokenizedSample],
        streams: Sequence[Stream],
        states: PackedStates,
        *,
        batch_tokens: int,
        router_inputs: PackedStates | None = None,
        after_layer: Callable[[int], None] | None = None,
        on_progress: Callable[[float], object],
    ) -> None:
        """Push every stream through all layers; `states` holds what comes out.

        Args:
            samples: All samples.
            streams: Which samples go through which expert; a sample is in one stream.
            states: Hidden states, filled by this method from the embeddings on.
            batch_tokens: Tokens per batch, padding included; a longer sample is its own batch.
            router_inputs: Filled, layer after layer, with what that layer's gate sees: the output
                of `post_attention_layernorm`.
            after_layer: Called after each layer, when `router_inputs` holds that layer's.
            on_progress: Called with the number of tokens done.
        """
        self.embed(samples, states)
        lengths = [len(sample.input_ids) for sample in samples]
        for layer in range(self.num_layers):
            module = self.decoder_layer(layer)
            for stream in streams:
                if not stream.samples:
                    continue
                self.set_ffn(module, self.ffn(layer, stream.expert))
                for batch in token_batches(stream.samples, lengths, batch_tokens):
                    self._layer_batch(module, batch, states, router_inputs)
                    on_progress(sum(lengths[index] for index in batch))
            del module
            if after_layer:
                after_layer(layer)

    def _layer_batch(
        self,
        module: nn.Module,
        batch: Sequence[int],
        states: PackedStates,
        router_inputs: PackedStates | None,
    ) -> None:
        spans = [states.span(index) for index in batch]
        longest = max(span.stop - span.start for span in spans)
        padded = torch.zeros(len(batch), longest, self.hidden_size, dtype=states.rows.dtype)
        for row, span in enumerate(spans):
            padded[row, : span.stop - span.start] = states.rows[span]
        padded = padded.to(self.device)
        seen: list[Tensor] = []
        handle = module.get_submodule("post_attention_layernorm").register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        try:
            output = module(padded, **self.attention_inputs(padded)).cpu()
        finally:
            handle.remove()
        for row, span in enumerate(spans):
            states.rows[span] = output[row, : span.stop - span.start]
        if router_inputs is not None:
            gated = seen[0].cpu()
            for row, span in enumerate(spans):
                router_inputs.rows[span] = gated[row, : span.stop - span.start].to(
                    router_inputs.rows.dtype
                )


def token_batches(
    samples: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Batches of similar length with at most `batch_tokens` tokens, padding included."""
    batch: list[int] = []
    for index in sorted(samples, key=lambda index: (lengths[index], index)):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
