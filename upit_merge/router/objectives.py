"""What a gate is fitted to: one pure function per objective.

All take the router's inputs of one layer, with the expert each token belongs to, and return the
gate's weight, one routing vector per expert, float32, (num_experts, hidden_size). Where several
processes have a share of the tokens each, all return the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the inputs, as much is converted to float32 at a time.
CHUNK_BYTES = 32 << 20
# Columns of a covariance computed at a time; the rest of the matrix is its mirror image.
_PANEL_COLUMNS = 512

# Strength of the penalty on the routing vectors, in units of the inputs' mean square.
RIDGE_PENALTY = 1e-2
LOGISTIC_PENALTY = 1e-2
# Converges in far fewer; the tolerance is relative to the gradient at the start.
_LOGISTIC_STEPS = 100
_LOGISTIC_TOLERANCE = 1e-3


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class GateData:
    """The router's inputs of one layer, or this process's share of them.

    Attributes:
        inputs: One row per token, any float dtype, (num_tokens, hidden_size).
        spans: The rows of every sample; empty for those that are another process's.
        lengths: Rows of every sample, whoever has them.
        assigned: The expert of every sample, int64, (num_samples,).
        num_experts: How many routing vectors there are.
        device: Where the arithmetic is done.
        layer: Its number.
        total: Sums a tensor over all processes.
    """

    inputs: Tensor
    spans: Sequence[slice]
    lengths: Sequence[int]
    assigned: Tensor
    num_experts: int
    device: torch.device
    layer: int = 0
    total: Callable[[Tensor], Tensor] = _alone

    def without(self, samples: Collection[int]) -> GateData:
        """Return the same without some samples."""
        kept = [slice(0, 0) if index in samples else span for index, span in enumerate(self.spans)]
        rows = [torch.arange(span.start, span.stop) for span in kept]
        counts = [len(row) for row in rows]
        ends = list(itertools.accumulate(counts))
        spans = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        lengths = [0 if i in samples else length for i, length in enumerate(self.lengths)]
        inputs = self.inputs[torch.cat(rows)]
        return replace(self, inputs=inputs, spans=spans, lengths=lengths)

    @property
    def width(self) -> int:
        return self.inputs.shape[1]

    @cached_property
    def labels(self) -> Tensor:
        """The expert of every token, int64, (num_tokens,)."""
        rows = torch.tensor([span.stop - span.start for span in self.spans])
        return self.assigned.repeat_interleave(rows)

    @property
    def num_tokens(self) -> int:
        """Of all samples, whoever has them."""
        return sum(self.lengths)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels) in float32 and int64 on the device, some thousand rows at a time."""
        rows = max(1, CHUNK_BYTES // (4 * self.width))
        for start in range(0, len(self.inputs), rows):
            part = slice(start, start + rows)
            yield (
                self.inputs[part].to(self.device).float(),
                self.labels[part].to(self.device),
            )


Objective = Callable[[GateData], Tensor]
# (number of the mixture, logits (tokens, experts)) -> logits of that shape.
ToBeat = Callable[[int, Tensor], Tensor]


def covariance(data: GateData) -> Tensor:
    """HᵀH / num_tokens with H the inputs, float64, (hidden_size, hidden_size)."""
    summed = torch.zeros(data.width, data.width, dtype=torch.float64, device=data.device)
    for h, _ in data.chunks():
        for start in range(0, data.width, _PANEL_COLUMNS):
            stop = start + _PANEL_COLUMNS
            summed[:stop, start:stop] += h[:, :stop].T @ h[:, start:stop]
    summed = data.total(summed) / data.num_tokens
    return summed.triu() + summed.triu(1).T


def ridge(data: GateData) -> Tensor:
    """Regularised least squares on one-hot labels, in closed form.

    R = (HᵀH + λI)⁻¹ HᵀY with H the inputs, Y the one-hot labels and λ `RIDGE_PENALTY` times the
    mean of HᵀH's diagonal. The same idea as DUME's router.
    """
    normal = covariance(data)
    normal.diagonal().add_(RIDGE_PENALTY * normal.diagonal().mean().clamp(min=1e-12))
    return torch.cholesky_solve(_class_sums(data).T, torch.linalg.cholesky(normal)).T.float().cpu()


def hidden(data: GateData) -> Tensor:
    """The mean of every expert's inputs, of unit length; what mergekit's `gate_mode: hidden` does.

    mergekit averages the last token's states of a few prompts, as they enter the layer; here it is
    the seed samples' tokens, as the router sees them. Experts without tokens get zeros.
    """
    return F.normalize(_class_sums(data), dim=1).float().cpu()


def _class_sums(data: GateData) -> Tensor:
    """Sums of every expert's inputs (YᵀH / num_tokens), float64, (num_experts, hidden_size)."""
    summed = torch.zeros(data.num_experts, data.width, dtype=torch.float64, device=data.device)
    for h, y in data.chunks():
        summed += F.one_hot(y, data.num_experts).float().T @ h
    return data.total(summed) / data.num_tokens


def one_vs_rest(data: GateData) -> Tensor:
    """Return the paper's sigmoid loss (section 3.3) with the other experts' tokens as negatives.

    Minimises the mean over tokens of Σ_i BCE(sigmoid(h · r_i), [token is expert i's]) plus
    `LOGISTIC_PENALTY` / 2 · Σ_i ‖r_i‖², on inputs of unit mean square.
    """

    def loss(_inputs: Tensor, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.softplus(logits).sum(1, keepdim=True) - logits.gather(1, own)
        return losses, _minus_one(logits.sigmoid(), own)

    return _logistic(data, data.num_experts, loss)


def softmax(data: GateData) -> Tensor:
    """Multinomial logistic regression: the experts' tokens told apart as the MoE's softmax would.

    Minimises the mean over tokens of the cross-entropy of softmax(h · r) plus
    `LOGISTIC_PENALTY` / 2 · Σ_i ‖r_i‖², on inputs of unit mean square.
    """

    def loss(_inputs: Tensor, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        losses = logits.logsumexp(1, keepdim=True) - logits.gather(1, own)
        return losses, _minus_one(logits.softmax(1), own)

    return _logistic(data, data.num_experts, loss)


def added_row(data: GateData, gates: Sequence[Tensor], to_beat: ToBeat | None = None) -> Tensor:
    """Return a gate with one routing vector more, the last expert's; the others stay as they are.

    Minimises what `softmax` does over the new vector alone: it has to win, against what the others
    say already, where a token is its own, and to lose elsewhere.

    Args:
        gates: Of every layer, what is there, float32, (num_experts - 1, hidden_size).
        to_beat: Of the others' logits in a layer, those that it needs to be chosen before each; if
            not given, these.
    """
    there = gates[data.layer]

    def loss(inputs: Tensor, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        said = F.linear(inputs, there.to(inputs.device))
        if to_beat is not None:
            said = to_beat(data.layer, said)
        others = said.logsumexp(1, keepdim=True)
        margin, mine = logits - others, (own == len(there)).float()
        return F.softplus(margin) - mine * margin, margin.sigmoid() - mine

    return torch.cat([there, _logistic(data, 1, loss)])


def _minus_one(slopes: Tensor, own: Tensor) -> Tensor:
    return slopes.scatter_add(1, own, torch.full(own.shape, -1.0, device=slopes.device))


# (inputs, logits, every token's expert) -> (loss of every token, its slopes in the logits);
# (tokens, hidden_size), (tokens, rows), (tokens, 1) -> (tokens, 1), (tokens, rows).
_Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _logistic(data: GateData, num_rows: int, loss: _Loss) -> Tensor:
    """Minimise a convex loss of the logits, by L-BFGS on all tokens, from zero.

    A logistic loss curves at most a quarter as much as the squared one. In coordinates in which
    that bound is the identity, some ten steps are enough.

    Args:
        num_rows: Routing vectors to find, (num_rows, hidden_size).
    """
    moments = covariance(data)
    square = moments.diagonal().mean().clamp(min=1e-12)
    bound = moments / (4 * square)
    bound.diagonal().add_(LOGISTIC_PENALTY)
    # gate = z · back, so that a step in z is a step of the same size in the bound's metric.
    factor = torch.linalg.cholesky(bound)
    identity = torch.eye(data.width, dtype=torch.float64, device=data.device)
    back = torch.linalg.solve_triangular(factor, identity, upper=False).float()
    scale = float(square.rsqrt())
    z = torch.zeros(num_rows, data.width, device=data.device)

    def closure() -> float:
        gate = z @ back
        value = torch.zeros((), dtype=torch.float64, device=data.device)
        slope = torch.zeros_like(gate)
        for h, y in data.chunks():
            logits = F.linear(h, gate * scale)
            losses, slopes = loss(h, logits, y.unsqueeze(1))
            value += losses.sum()
            slope += slopes.T @ h
        value = data.total(value) / data.num_tokens + LOGISTIC_PENALTY / 2 * gate.square().sum()
        slope = data.total(slope) * (scale / data.num_tokens) + LOGISTIC_PENALTY * gate
        z.grad = slope @ back.T
        return float(value)

    closure()
    assert z.grad is not None
    optimizer = torch.optim.LBFGS(
        [z],
        max_iter=_LOGISTIC_STEPS,
        tolerance_grad=_LOGISTIC_TOLERANCE * float(z.grad.abs().max()),
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return (z @ back * scale).cpu()


def upit(
    data: GateData, *, alpha: float, epochs: int, lr: float, batch_size: int, seed: int
) -> Tensor:
    """Return the paper's routing vectors over frozen experts (section 3.3): positives only.

    Every expert's vector is trained on its own samples alone, by AdamW from zero, to minimise
    (1 - alpha) · L_aux, with L_aux = CrossEntropy(sigmoid(h · r_i), 1). The other part, alpha ·
    L_lm, has no gradient for the vectors: with a single frozen expert in the layer its output does
    not depend on them.

    Args:
        alpha: Weight of L_lm.
        epochs: Passes over an expert's samples.
        lr: AdamW's learning rate.
        batch_size: Samples per step.
        seed: Of the samples' order.
    """
    gate = torch.zeros(data.num_experts, data.width)
    for expert in range(data.num_experts):
        own = (data.assigned == expert).nonzero().flatten().tolist()
        members = [index for index in own if data.lengths[index]]  # others were left out
        if not members:
            continue
        generator = torch.Generator().manual_seed(seed + expert)
        vector = torch.zeros(data.width, device=data.device, requires_grad=True)
        optimizer = torch.optim.AdamW([vector], lr=lr, weight_decay=0.0)
        for _ in range(epochs):
            order = torch.randperm(len(members), generator=generator).tolist()
            for start in range(0, len(members), batch_size):
                batch = [members[index] for index in order[start : start + batch_size]]
                rows = torch.cat([data.inputs[data.spans[index]] for index in batch])
                tokens = sum(data.lengths[index] for index in batch)
                vector.grad = data.total(upit_gradient(rows.to(data.device), vector, alpha, tokens))
                optimizer.step()
        gate[expert] = vector.detach().cpu()
    return gate


def upit_gradient(rows: Tensor, vector: Tensor, alpha: float, num_tokens: int) -> Tensor:
    """Gradient of (1 - alpha) · L_aux for one routing vector, (hidden_size,).

    Args:
        rows: Router's inputs of this process's part of the batch, (rows, hidden_size).
        vector: (hidden_size,).
        num_tokens: Of the whole batch, over which L_aux is a mean.
    """
    h = rows.float()
    missing = torch.sigmoid(-(h @ vector.detach()))  # 1 - sigmoid(h · r)
    return -(1 - alpha) / num_tokens * (missing @ h)


def normalise(gate: Tensor, data: GateData, temperature: float) -> Tensor:
    """Scale a gate so that a token's logits differ by 1 / temperature (standard deviation).

    Fits differ in the size of their vectors, which carries no information about the expert; the
    softmax over the chosen experts would still feel it.
    """
    if gate.shape[0] == 1:
        return gate / temperature
    spread = torch.zeros((), dtype=torch.float64, device=data.device)
    for h, _ in data.chunks():
        spread += F.linear(h, gate.to(data.device)).std(dim=1, correction=0).sum()
    mean = float(data.total(spread)) / sum(data.lengths)
    return gate / (max(mean, 1e-12) * temperature)


BY_NAME: dict[str, Objective] = {
    "one_vs_rest": one_vs_rest,
    "softmax": softmax,
    "ridge": ridge,
    "hidden": hidden,
}
