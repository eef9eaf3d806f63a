"""The losses of all experts to first order: one forward and one backward sweep of their mean.

With θ̄ the mean of the experts' FFNs, L_s(θ_i) ≈ L_s(θ̄) + ⟨∇L_s(θ̄), θ_i - θ̄⟩. The gradient of a
sample in a matrix is a sum over its tokens of (slope of the output) ⊗ (input): it is formed for a
sample and a range of rows at a time, multiplied with the difference of every expert, and forgotten.
So a sample costs about four sweeps and 2 · num_experts operations per parameter, not a sweep per
expert.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.hidden_states import MEAN, Batch, LayersOnDisk, PackedStates
from upit_merge.engine.layerwise import LOGIT_ROWS, LayerwiseMixture, Weights, row_parts
from upit_merge.engine.tape import Tape, Taped
from upit_merge.io.disk import free_bytes
from upit_merge.runtime.parallel import map_in_order

# Tokens that are differentiated at a time: a few times the memory of a forward sweep, each.
SLOPE_TOKENS = 2048
# Elements of a matrix whose gradients are formed at a time.
BLOCK_ELEMENTS = 1 << 16

Look = Callable[[int, Batch, Tensor], object]
Done = Callable[[float], object]


@dataclass(frozen=True)
class MeanSweeps:
    """A forward and a backward sweep of samples through the mean of the experts.

    Args:
        model: The mixture.
        samples: All samples.
        scratch: A folder for the mean FFNs, which are made of all experts once.
    """

    model: LayerwiseMixture
    samples: Sequence[TokenizedSample]
    scratch: Path
    _activation: Any = field(init=False)
    _room: Tensor = field(init=False, default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN

        name = self.model.architecture.dense_settings()["hidden_act"]
        object.__setattr__(self, "_activation", ACT2FN[name])

    # ---- weights ---------------------------------------------------------------------------

    def _mean(self, layer: int) -> Weights:
        """Return the mean FFN of a layer; made once, if the disk has room for it."""
        path = self.scratch / f"mean-{layer}.safetensors"
        if path.exists():
            return {name: t.to(self.model.device) for name, t in load_file(path).items()}
        mean = self.model.ffn(layer, MEAN)
        size = sum(tensor.numel() * tensor.element_size() for tensor in mean.values())
        if size and free_bytes(self.scratch) > 4 * size * self.model.num_layers:
            save_file({name: tensor.cpu().contiguous() for name, tensor in mean.items()}, path)
        return mean

    def _weights(self, layer: int) -> tuple[Weights, Weights]:
        return self.model.backbone(layer), self._mean(layer)

    def close(self) -> None:
        for path in self.scratch.glob("mean-*.safetensors"):
            path.unlink(missing_ok=True)

    @staticmethod
    def parts(samples: Sequence[TokenizedSample], batch: Batch) -> Iterator[Batch]:
        """Parts of a batch with at most `SLOPE_TOKENS` tokens, padding included."""
        part: list[int] = []
        longest = 0
        for index in batch:
            longest = max(longest, len(samples[index].input_ids))
            if part and longest * (len(part) + 1) > SLOPE_TOKENS:
                yield tuple(part)
                part, longest = [], len(samples[index].input_ids)
            part.append(index)
        if part:
            yield tuple(part)

    # ---- sweeps ----------------------------------------------------------------------------

    @torch.no_grad()
    def forwards(
        self,
        batches: Sequence[Batch],
        states: PackedStates,
        entering: LayersOnDisk,
        *,
        look: Look | None = None,
        on_progress: Done,
    ) -> None:
        """Fill what enters every layer, and what leaves the last.

        Args:
            batches: Of this process.
            states: Receives what leaves the last.
            entering: Receives what enters each.
            look: Told, batch by batch, the number of a layer and what its gate sees, padded.
            on_progress: Called with the number of tokens done.
        """
        model = self.model
        model.embed(self.samples, states)
        order = range(model.num_layers if batches else 0)
        with contextlib.closing(map_in_order(self._weights, order, workers=1)) as weights:
            for layer, (backbone, ffn) in zip(order, weights, strict=True):
                module = model.dense_layer(layer, backbone)
                model.set_ffn(module, ffn)
                for batch in batches:
                    padded = states.padded(batch)
                    entering.put(layer, batch, padded)
                    output, seen = model.run(module, layer, padded.to(model.device))
                    states.put(batch, output)
                    if look is not None:
                        look(layer, batch, seen)
                    on_progress(sum(len(self.samples[index].input_ids) for index in batch))

    def head(self, batches: Sequence[Batch], states: PackedStates, slope: PackedStates) -> Tensor:
        """The losses, and their slopes in what leaves the last layer.

        Args:
            states: What leaves it.
            slope: Filled; zero where nothing is predicted.

        Returns:
            Negative log-likelihood summed over a sample's targets, float64, (num_samples,); zero for
            samples that are not in the batches.
        """
        norm, weight = self.model.final()
        sums = torch.zeros(len(self.samples), dtype=torch.float64)
        slope.rows.zero_()
        for members in _row_groups(self.samples, [i for batch in batches for i in batch]):
            spans = []
            for index in members:
                start = states.span(index).start + self.samples[index].loss_start - 1
                spans.append(slice(start, states.span(index).stop - 1))
            ids = [self.samples[i].input_ids[self.samples[i].loss_start :] for i in members]
            labels = torch.tensor([token for part in ids for token in part])
            rows = torch.cat([states.rows[span] for span in spans])
            losses, slopes = [], []
            for part in row_parts(len(rows)):
                loss, gradient = _cross_entropy(
                    self.model,
                    norm,
                    weight,
                    rows[part].to(self.model.device),
                    labels[part].to(self.model.device),
                )
                losses.append(loss.cpu())
                slopes.append(gradient.cpu().float())
            whole, into = torch.cat(losses).double(), torch.cat(slopes)
            start = 0
            for index, span in zip(members, spans, strict=True):
                count = span.stop - span.start
                sums[index] = whole[start : start + count].sum()
                slope.rows[span] = into[start : start + count]
                start += count
        return sums

    def backwards(
        self,
        batches: Sequence[Batch],
        entering: LayersOnDisk,
        states: PackedStates,
        slope: PackedStates,
        *,
        first: int | None = None,
        after_layer: Callable[[Tensor], object],
        on_progress: Done,
    ) -> None:
        """Multiply every layer's gradients with the experts' differences, from the last layer down.

        Args:
            batches: Of this process.
            entering: What enters every layer.
            states: Room for that of one layer.
            slope: The losses' slopes in what leaves layer `first`; in what enters it, later.
            first: The layer to begin with; the last if not given.
            after_layer: Called with a layer's ⟨∇L_s, θ_i - θ̄⟩, float64, (num_samples, num_experts).
            on_progress: Called with the number of tokens done.
        """
        model = self.model
        begin = model.num_layers - 1 if first is None else first
        order = range(begin, -1, -1)
        parts = [part for batch in batches for part in self.parts(self.samples, batch)]
        with contextlib.closing(
            map_in_order(self._weights, order if batches else (), workers=1)
        ) as weights:
            for layer in order:
                products = torch.zeros(len(self.samples), model.num_experts, dtype=torch.float64)
                if batches:
                    backbone, ffn = next(weights)
                    entering.read(layer, states)
                    module = model.dense_layer(layer, backbone)
                    taped = None
                    if layer in model.mixture_layers:
                        taped = Taped(ffn, self._activation, summed=model.format.adds_output)
                        module.set_submodule(model.format.experts_path, taped, strict=True)
                    tapes = []
                    for part in parts:
                        tape = self._differentiate(module, layer, taped, part, states, slope)
                        tapes += [tape] if tape else []
                        on_progress(sum(len(self.samples[index].input_ids) for index in part))
                    if tapes:
                        self._multiply(layer, ffn, parts, tapes, products)
                    del tapes
                after_layer(products)

    def _differentiate(
        self,
        module: nn.Module,
        layer: int,
        taped: Taped | None,
        batch: Batch,
        entering: PackedStates,
        slope: PackedStates,
    ) -> Tape | None:
        """One layer on one batch: the slope passes through it; returns what its experts saw."""
        outer = slope.padded(batch)
        # Where the range is narrow, slopes may leave it; a power of two costs nothing.
        scale = 2.0 ** -math.frexp(float(outer.abs().max()))[1]
        leaf = entering.padded(batch).to(self.model.device).requires_grad_()
        output = self.model.layer_output(module, layer, leaf)
        outer = (outer * scale).to(output.device, output.dtype)
        (inner,) = torch.autograd.grad(output, leaf, outer)
        slope.put(batch, inner.float() / scale)
        if taped is None:
            return None
        assert taped.tape is not None
        tape, taped.tape = taped.tape, None
        tape.scale, tape.samples = scale, len(batch)
        return tape

    @torch.no_grad()
    def _multiply(
        self,
        layer: int,
        mean: Weights,
        parts: Sequence[Batch],
        tapes: Sequence[Tape],
        products: Tensor,
    ) -> None:
        """Form the gradients of all samples in a layer's FFN, block by block, and multiply."""
        model = self.model
        blocks = [
            (projection, start, min(start + height, len(weight)))
            for projection, weight in mean.items()
            for height in [max(1, BLOCK_ELEMENTS // weight.shape[1])]
            for start in range(0, len(weight), height)
        ]

        def read(block: tuple[str, int, int]) -> Tensor:
            """Differences of all experts, (elements, num_experts): products of it are fast."""
            projection, start, stop = block
            names = (
                model.format.expert_tensor(layer, e, projection) for e in range(model.num_experts)
            )
            experts = torch.stack([model.moe.rows(name, start, stop) for name in names])
            experts = experts.to(model.device).flatten(1)
            middle = mean[projection][start:stop].float().view(-1, 1)
            difference = torch.empty(middle.shape[0], model.num_experts, device=model.device)
            return torch.sub(experts.T, middle, out=difference)

        with contextlib.closing(map_in_order(read, blocks, workers=1)) as differences:
            for (projection, start, stop), difference in zip(blocks, differences, strict=True):
                for batch, tape in zip(parts, tapes, strict=True):
                    outer, inputs = tape.pair(projection)
                    outer = outer[:, :, start:stop].transpose(1, 2)
                    rows = torch.tensor(batch)
                    whole = self._gradients(outer, inputs) @ difference
                    products[rows] += whole.double().cpu() / tape.scale

    def _gradients(self, outer: Tensor, inputs: Tensor) -> Tensor:
        """Gradients of samples in some rows of a matrix, float32, (samples, elements)."""
        shape = (len(outer), outer.shape[1], inputs.shape[2])
        # One piece of memory for all of them: fresh pages would cost as much as the product.
        if self._room.numel() < prod(shape) or self._room.dtype != outer.dtype:
            object.__setattr__(self, "_room", outer.new_empty(prod(shape)))
        room = self._room[: prod(shape)].view(shape)
        return torch.bmm(outer, inputs, out=room).flatten(1).float()


@torch.no_grad()
def _cross_entropy(
    model: LayerwiseMixture, norm: nn.Module, weight: Tensor, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of every row, float32, and its slope in the row; (rows,), (rows, hidden_size)."""
    with torch.enable_grad():
        leaf = rows.requires_grad_()
        normed = norm(leaf)
    config = model.architecture.config
    scale, cap = model.format.logits_scale(config), model.format.logits_cap(config)
    logits = model.format.logits(F.linear(normed.detach(), weight).float(), config)
    steepness = None if cap is None else 1 - (logits / cap).square_()
    norms = logits.logsumexp(1, keepdim=True)
    own = labels.unsqueeze(1)
    losses = (norms - logits.gather(1, own)).squeeze(1)
    slopes = logits.sub_(norms).exp_()
    slopes.scatter_add_(1, own, torch.full_like(norms, -1.0))
    if steepness is not None:
        slopes.mul_(steepness)
    if scale != 1:
        slopes.mul_(scale)
    (into,) = torch.autograd.grad(normed, leaf, slopes.to(weight.dtype) @ weight)
    return losses, into


def _row_groups(samples: Sequence[TokenizedSample], members: Sequence[int]) -> Iterator[list[int]]:
    """Samples with together at most `LOGIT_ROWS` targets, or one with more."""
    group: list[int] = []
    rows = 0
    for index in members:
        if group and rows + samples[index].num_targets > LOGIT_ROWS:
            yield group
            group, rows = [], 0
        group.append(index)
        rows += samples[index].num_targets
    if group:
        yield group
