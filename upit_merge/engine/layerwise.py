"""A mixture on disk, run layer by layer: memory holds one layer, the next, and the hidden states.

The dense stream of expert e is the shared backbone with expert e's FFN in every layer. It is
computed with transformers' own layer of the mixture, in which one FFN stands for the experts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.arithmetic import Arithmetic
from upit_merge.engine.body import Body
from upit_merge.engine.hidden_states import MEAN, Batch, PackedStates, Stream
from upit_merge.errors import UpitError
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
        UpitError: the folder is not a mixture, a tensor is missing or has another shape, or its
            layers cannot be computed one by one.
    """

    def __init__(
        self, moe: TensorSource, device: torch.device, arithmetic: Arithmetic | None = None
    ) -> None:
        self.architecture = inspect_mixture(moe)
        self.format = self.architecture.format
        self.moe = moe
        self.device = device
        config = self.architecture.config
        if reason := self.format.unfit_router(config):
            raise UpitError(
                f"{moe.label} {reason}, so that it cannot be computed layer by layer, as router, "
                "evaluate, extend and shrink do; train its gates with `upit-merge finetune` and "
                "train_modules: router."
            )
        self.mixture_layers = self.architecture.mixture_layers
        self.num_layers = self.architecture.num_layers
        self.num_experts = self.architecture.num_experts
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        self.stored_dtype = moe.specs[self.architecture.gate_names()[0]].dtype
        self.arithmetic = arithmetic or Arithmetic.of("auto", device, self.stored_dtype)
        self.dtype = self.arithmetic.states
        self.body = Body(self.architecture, device)
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
        """Return the FFN weights of an expert, or of the mean of all, by projection.

        Those of a layer that is no mixture are none: they are part of its backbone.
        """
        if layer not in self.mixture_layers:
            return {}
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
        """All of a layer but gate and experts, by its names in a decoder layer."""
        names = self.architecture.backbone_of(layer, self.moe.specs)
        return {own: self.load(name) for own, name in names.items()}

    def dense_layer(self, layer: int, backbone: Weights) -> nn.Module:
        """A decoder layer with this backbone; the FFN in place of its experts is still empty."""
        module = self.body.dense_layer(layer)
        state = dict(backbone)
        if layer in self.mixture_layers:
            # What it says does not matter, but it is asked.
            shape = self.num_experts, self.hidden_size
            gate = torch.zeros(shape, dtype=self.dtype, device=self.device)
            state[f"{self.format.gate_path}.weight"] = gate
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
        # The FFN comes per expert; anything else that is not there would be uninitialised memory.
        path = f"{self.format.experts_path}."
        if unexpected or any(not name.startswith(path) for name in missing):
            raise RuntimeError(f"layer {layer}: missing {missing}, unexpected {unexpected}")
        return module.eval().requires_grad_(False)

    def set_ffn(self, module: nn.Module, weights: Weights) -> None:
        """Put an expert's FFN into a layer from `dense_layer`."""
        path = self.format.experts_path
        state = {f"{path}.{projection}.weight": weight for projection, weight in weights.items()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)

    def embed(self, samples: Sequence[TokenizedSample], states: PackedStates) -> None:
        """Fill `states` with the token embeddings."""
        table = self.moe.tensor("model.embed_tokens.weight")
        scale = self.format.embedding_scale(self.architecture.config)
        for index, sample in enumerate(samples):
            span = states.span(index)
            if span.start < span.stop:
                rows = table[torch.tensor(sample.input_ids)].to(states.rows.dtype)
                states.rows[span] = rows if scale == 1 else rows * scale

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output head: (tokens, hidden_size) -> logits, float32."""
        norm, head = self.final()
        config = self.architecture.config
        return lambda rows: self.format.logits(F.linear(norm(rows), head).float(), config)

    def final(self) -> tuple[nn.Module, Tensor]:
        """Return the final norm and the output head's weight, (vocab_size, hidden_size)."""
        norm = copy.deepcopy(self.body.norm)
        weight = self.load(self.format.final_norm_tensor)
        norm.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
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
            router_inputs: Filled, layer after layer, with what that layer's gate sees: mostly the
                output of `post_attention_layernorm`.
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
                        self._layer_batch(module, layer, batch, states, router_inputs)
                        on_progress(sum(lengths[index] for index in batch))
                if after_layer:
                    after_layer(layer)

    def layer_output(self, module: nn.Module, layer: int, padded: Tensor) -> Tensor:
        """One decoder layer on a right-padded batch, (samples, tokens, hidden_size)."""
        inputs = self.body.call(layer, padded)
        with self.arithmetic.active(self.device):
            output: Tensor = module(padded, **inputs)
        return output

    def _layer_batch(
        self,
        module: nn.Module,
        layer: int,
        batch: Batch,
        states: PackedStates,
        router_inputs: PackedStates | None,
    ) -> None:
        output, seen = self.run(module, layer, states.padded(batch).to(self.device))
        states.put(batch, output)
        if router_inputs is not None:
            router_inputs.put(batch, seen)

    def run(self, module: nn.Module, layer: int, padded: Tensor) -> tuple[Tensor, Tensor]:
        """One layer on one padded batch: what leaves it, and what its gate sees.

        Args:
            padded: (samples, tokens, hidden_size), as are both results; a layer without a gate
                gives what leaves it twice.
        """
        if layer not in self.mixture_layers:
            output = self.layer_output(module, layer, padded)
            return output, output
        seen: list[Tensor] = []
        handle = self.body.watch(module, layer, seen.append)
        try:
            return self.layer_output(module, layer, padded), seen[0].view_as(padded)
        finally:
            handle.remove()


def row_parts(num_rows: int) -> Iterator[slice]:
    """Slices of at most `LOGIT_ROWS` rows."""
    for start in range(0, num_rows, LOGIT_ROWS):
        yield slice(start, start + LOGIT_ROWS)
