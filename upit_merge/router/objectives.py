"""What a gate is fitted to: one pure function per objective.

All take the router's inputs of one layer, with the expert each token belongs to, and return the
gate's weight, one routing vector per expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows converted to float32 at a time.
_CHUNK_ROWS = 1 << 14

# Strength of the penalty on the routing vectors, in units of the inputs' mean square.
RIDGE_PENALTY = 1e-2
ONE_VS_REST_PENALTY = 1e-2
# Converges within this many; weaker penalties give the same perplexity in five times the steps.
_ONE_VS_REST_STEPS = 100


def _chunks(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, inputs.shape[0], _CHUNK_ROWS):
        stop = start + _CHUNK_ROWS
        yield inputs[start:stop], labels[start:stop]


def token_weights(labels: Tensor, num_experts: int) -> Tensor:
    """Per expert, the weight of one of its tokens: every expert's tokens count the same in all.

    Args:
        labels: int64, (num_tokens,).

    Returns:
        float32, (num_experts,); sums to 1 over all tokens. Experts without tokens have 0.
    """
    counts = torch.bincount(labels, minlength=num_experts).float()
    present = counts > 0
    return torch.where(present, 1 / (counts.clamp(min=1) * present.sum()), torch.zeros_like(counts))


def random_gate(num_experts: int, norm_weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions, scaled so that logits vary by about 1; needs no data.

    Args:
        norm_weight: The weight of the norm before the gate, (hidden_size,): its root mean square
            is that of the router's inputs.

    Returns:
        float32, (num_experts, hidden_size).
    """
    gate = torch.randn(num_experts, norm_weight.shape[0], generator=generator)
    rms = norm_weight.float().square().mean().sqrt().clamp(min=1e-6)
    return F.normalize(gate, dim=1) / rms.cpu()


def ridge(inputs: Tensor, labels: Tensor, num_experts: int, *, device: torch.device) -> Tensor:
    """Regularised least squares on one-hot labels, in closed form.

    R = (HᵀDH + λI)⁻¹ HᵀDY with H the inputs, Y the one-hot labels, D the token weights and λ
    `RIDGE_PENALTY` times the mean of HᵀDH's diagonal. The same idea as DUME's router.

    Args:
        inputs: (num_tokens, hidden_size).
        labels: int64, (num_tokens,), the expert of every token.

    Returns:
        float32, (num_experts, hidden_size).
    """
    width = inputs.shape[1]
    weights = token_weights(labels, num_experts)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
    correlation = torch.zeros(width, num_experts, dtype=torch.float64, device=device)
    for h, y in _chunks(inputs, labels):
        h = h.to(device).float()
        weighted = h * weights[y].to(device).unsqueeze(1)
        covariance += (weighted.T @ h).double()
        correlation += (weighted.T @ F.one_hot(y, num_experts).to(device).float()).double()
    penalty = RIDGE_PENALTY * covariance.diagonal().mean().clamp(min=1e-12)
    covariance.diagonal().add_(penalty)
    return torch.linalg.solve(covariance, correlation).T.float().cpu()


def one_vs_rest(
    inputs: Tensor, labels: Tensor, num_experts: int, *, device: torch.device
) -> Tensor:
    """The paper's sigmoid loss (section 3.3) with the other experts' tokens as negatives.

    Minimises the token-weighted mean over (token, expert) of BCE(sigmoid(h · r_i), [token is
    expert i's]) plus `ONE_VS_REST_PENALTY` / 2 · ‖r_i‖², on inputs of unit mean square. Convex;
    solved by L-BFGS on all tokens, from zero.

    Args:
        inputs: (num_tokens, hidden_size).
        labels: int64, (num_tokens,), the expert of every token.

    Returns:
        float32, (num_experts, hidden_size).
    """
    weights = token_weights(labels, num_experts)
    square = sum(
        float(h.float().square().sum(dtype=torch.float64)) for h, _ in _chunks(inputs, labels)
    )
    scale = (square / inputs.numel()) ** -0.5 if square > 0 else 1.0
    gate = torch.zeros(num_experts, inputs.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [gate], max_iter=_ONE_VS_REST_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        penalty = ONE_VS_REST_PENALTY / 2 * gate.square().sum()
        penalty.backward()
        total = float(penalty.detach())
        for h, y in _chunks(inputs, labels):
            logits = F.linear(h.to(device).float() * scale, gate)
            targets = F.one_hot(y, num_experts).to(device).float()
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            loss = (losses.sum(1) * weights[y].to(device)).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return (gate.detach() * scale).cpu()


def normalise(gate: Tensor, inputs: Tensor, temperature: float) -> Tensor:
    """Scale a gate so that a token's logits differ by 1 / temperature (standard deviation).

    Fits differ in the size of their vectors, which carries no information about the expert; the
    softmax over the chosen experts would still feel it.

    Args:
        gate: float32, (num_experts, hidden_size).
        inputs: The router's inputs, (num_tokens, hidden_size).
    """
    if gate.shape[0] == 1:
        return gate / temperature
    total = 0.0
    for start in range(0, inputs.shape[0], _CHUNK_ROWS):
        logits = F.linear(inputs[start : start + _CHUNK_ROWS].float(), gate)
        total += float(logits.std(dim=1, correction=0).sum(dtype=torch.float64))
    spread = total / inputs.shape[0]
    return gate / (max(spread, 1e-12) * temperature)
