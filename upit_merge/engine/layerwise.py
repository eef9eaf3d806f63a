"""A mixture on disk, run layer by layer: memory holds one layer, the next, and the hidden states.

The dense stream of expert e is the shared backbone with expert e's FFN in every layer. It is
computed with transformers' own layer of the dense model whose attention is the mixture's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.arithmetic import Arithmetic
from upit_merge.engine.hidden_states import MEAN, Batch, PackedStates, Stream
from upit_merge.io.sources import TensorSource
from upit_merge.models.formats import PROJECTIONS
from upit_merge.models.mixture import inspect_mixture
from upit_merge.runtime.parallel import map_in_order

# Rows of logits computed at a time: 1,024 x a vocabulary of 128 K in float32 is half a gigabyte.
LOGIT_ROWS = 1024

Weights = dict[str, Tensor]


class LayerwiseMixture:
    """A MoE folder whose layers are loaded one at a time.

    Args:
        moe: An open folder in one of the formats, or what will be one.
        device: Where a layer is computed.
        arithmetic: In which dtypes; if not given, on the CPU in float32, else in the stored one.

    Raises:
        UpitError: the folder is not a mixture, or a tensor is missing or has another shape.
    """

    def __init__(
        self, moe: TensorSource, device: torch.device, arithmetic: Arithmetic | None = None
    ) -> None:
        self.architecture = inspect_mixture(moe)
        self.format = self.architecture.format
        self.moe = moe
        self.device = device
        config = self.architecture.config
        self.num_layers = self.architecture.num_layers
        self.num_experts = self.architecture.num_experts
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        self.stored_dtype = moe.specs[self.format.gate_tensor(0)].dtype
        self.arithmetic = arithmetic or Arithmetic.of("auto", device, self.stored_dtype)
        self.dtype = self.arithmetic.states
        self._modules = self.format.modules()
        self._config = self.architecture.dense_config()
        self._config._attn_implementation = "sdpa"
        self._tied: bool = bool(config.tie_word_embeddings)

    def load(self, name: str, *, product: bool = True) -> Tensor:
        """Return a tensor of the folder on the device, in the computing dtype.

        Args:
            product: A matrix is one that a layer's products need, see `Arithmetic`.
        """
        rounded = product and len(self.moe.specs[name].shape) > 1
        dtype = self.arithmetic.products if rounded else self.dtype
        return self.moe.tensor(name).to(device=self.device, dtype=dtype)

    def ffn(self, layer: int, expert: int) -> Weights:
        """Return the FFN weights of an expert, or of the mean of all, by projection."""
        name_of = self.format.expert_tensor
        if expert != MEAN:
            return {p: self.load(name_of(layer, expert, p)) for p in PROJECTIONS}
        means = {}
        for projection in PROJECTIONS:
            total = self.moe.tensor(name_of(layer, 0, projection)).float()
            for other in range(1, self.num_experts):
                total += self.moe.tensor(name_of(layer, other, projection)).float()
            means[projection] = (total / self.num_experts).to(self.device, self.arithmetic.products)
        return means

    def backbone(self, layer: int) -> Weights:
        """Attention and norms of a layer, by their names in a decoder layer."""
        prefix = f"model.layers.{layer}."
        return {
            name.removeprefix(prefix): self.load(name)
            for name in self.moe.specs
            # Old folders hold tables that are computed.
            if name.startswith(prefix)
            and self.format.is_backbone(name)
            and not name.endswith("rotary_emb.inv_freq")
        }

    def dense_layer(self, layer: int, backbone: Weights) -> nn.Module:
        """A dense decoder layer with this attention and these norms; its FFN is still empty."""
        with torch.device("meta"):
            module = self._modules.dense_layer(self._config, layer)
        missing, unexpected = module.load_state_dict(backbone, strict=False, assign=True)
        # The FFN comes per expert; anything else that is not there would be uninitialised memory.
        if unexpected or any(not name.startswith("mlp.") for name in missing):
            raise RuntimeError(f"layer {layer}: missing {missing}, unexpected {unexpected}")
        return module.eval().requires_grad_(False)

    def set_ffn(self, module: nn.Module, weights: Weights) -> None:
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
            position_ids=positions,
            **{_cache_argument(make_mask): None},
        )
        rotary = self._modules.rotary(config=self._config).to(self.device)
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": rotary(batch, position_ids=positions),
        }

    def embed(self, samples: Sequence[TokenizedSample], states: PackedStates) -> None:
        """Fill `states` with the token embeddings."""
        table = self.moe.tensor("model.embed_tokens.weight")
        for index, sample in enumerate(samples):
            span = states.span(index)
            if span.start < span.stop:
                states.rows[span] = table[torch.tensor(sample.input_ids)].to(states.rows.dtype)

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output head: (tokens, hidden_size) -> logits, float32."""
        norm, head = self.final()
        return lambda rows: F.linear(norm(rows), head).float()

    def final(self) -> tuple[nn.Module, Tensor]:
        """Return the final norm and the output head's weight, (vocab_size, hidden_size)."""
        norm = self._modules.norm(self.hidden_size, eps=self._config.rms_norm_eps)
        norm.weight = nn.Parameter(self.load("model.norm.weight"), requires_grad=False)
        name = "model.embed_tokens.weight" if self._tied else "lm_head.weight"
        return norm, self.load(name, product=False)

    @torch.no_grad()
    def losses(
        self,
        samples: Sequence[TokenizedSample],
        states: PackedStates,
        *,
        on_progress: Callable[[float], object] | None = None,
    ) -> Tensor:
        """Negative log-likelihood of each sample's target tokens, summed over either half of them.

        Args:
            states: The hidden states after the last layer.
            on_progress: Called with the number of target tokens done.

        Returns:
            float64, (num_samples, 2); zero for samples that are another process's.
        """
        head = self.head()
        sums = torch.zeros(len(samples), 2, dtype=torch.float64)
        for index, sample in enumerate(samples):
            span = states.span(index)
            if span.start == span.stop:
                continue
            rows = states.rows[span][sample.loss_start - 1 : -1].to(self.device)
            targets = torch.tensor(sample.input_ids[sample.loss_start :], device=self.device)
            parts = [
                F.cross_entropy(head(rows[part]), targets[part], reduction="none").double()
                for part in row_parts(len(targets))
            ]
            first, second = sample.halves
            losses = torch.cat(parts)
            sums[index, 0] = float(losses[:first].sum())
            sums[index, 1] = float(losses[first : first + second].sum())
            if on_progress:
                on_progress(len(targets))
        return sums

    @torch.no_grad()
    def sweep(
        self,
        samples: Sequence[TokenizedSample],
        streams: Sequence[Stream],
        states: PackedStates,
        *,
        router_inputs: PackedStates | None = None,
        first_layer: int = 0,
        after_layer: Callable[[int], None] | None = None,
        on_progress: Callable[[float], object],
    ) -> None:
        """Push every stream through all layers; `states` holds what comes out.

        While a layer is computed, a thread reads the next one.

        Args:
            samples: All samples.
            streams: Which samples go through which expert; a sample is in one stream.
            states: Hidden states, filled by this method from the embeddings on.
            router_inputs: Filled, layer after layer, with what that layer's gate sees: the output
                of `post_attention_layernorm`.
            first_layer: Where to go on: `states` holds what enters this layer.
            after_layer: Called after each layer, when `router_inputs` holds that layer's.
            on_progress: Called with the number of tokens done.
        """
        if first_layer == 0:
            self.embed(samples, states)
        layers = range(first_layer, self.num_layers)
        busy = [stream for stream in streams if stream.batches]
        lengths = [len(sample.input_ids) for sample in samples]

        def read(step: tuple[int, Stream]) -> tuple[Weights, Weights]:
            layer, stream = step
            backbone = self.backbone(layer) if stream is busy[0] else {}
            return backbone, self.ffn(layer, stream.expert)

        order = [(layer, stream) for layer in layers for stream in busy]
        with contextlib.closing(map_in_order(read, order, workers=1)) as weights:
            for layer in layers:
                for stream in busy:
                    backbone, ffn = next(weights)
                    if backbone:
                        module = self.dense_layer(layer, backbone)
                    self.set_ffn(module, ffn)
                    for batch in stream.batches:
                        self._layer_batch(module, batch, states, router_inputs)
                        on_progress(sum(lengths[index] for index in batch))
                if after_layer:
                    after_layer(layer)

    def layer_output(self, module: nn.Module, padded: Tensor) -> Tensor:
        """One decoder layer on a right-padded batch, (samples, tokens, hidden_size)."""
        inputs = self.attention_inputs(padded)
        with self.arithmetic.active(self.device):
            output: Tensor = module(padded, **inputs)
        return output

    def _layer_batch(
        self,
        module: nn.Module,
        batch: Batch,
        states: PackedStates,
        router_inputs: PackedStates | None,
    ) -> None:
        output, seen = self.run(module, states.padded(batch).to(self.device))
        states.put(batch, output)
        if router_inputs is not None:
            router_inputs.put(batch, seen)

    def run(self, module: nn.Module, padded: Tensor) -> tuple[Tensor, Tensor]:
        """One layer on one padded batch: what leaves it, and what its gate sees.

        Args:
            padded: (samples, tokens, hidden_size), as are both results.
        """
        seen: list[Tensor] = []
        handle = module.get_submodule("post_attention_layernorm").register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        try:
            return self.layer_output(module, padded), seen[0]
        finally:
            handle.remove()


def _cache_argument(make_mask: Callable[..., Any]) -> str:
    """Return what transformers calls the cache, which it wants to be given: renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(make_mask).parameters else "past_key_values"


def row_parts(num_rows: int) -> Iterator[slice]:
    """Slices of at most `LOGIT_ROWS` rows."""
    for start in range(0, num_rows, LOGIT_ROWS):
        yield slice(start, start + LOGIT_ROWS)
