"""The gates of a mixture: drawn at random, named, digested."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upit_merge.io.sources import TensorSource
from upit_merge.io.tensor_file import raw_bytes
from upit_merge.models.formats import MixtureFormat

# Size of what sets equal routing vectors apart, beside the spread of all vectors of the gate.
TIE_BREAKER = 1 / 32
# Vectors nearer than this beside the same spread are one, but for the rounding of a fit: its columns
# are computed in different lanes, and with bfloat16 products that leaves up to 3e-4.
_SAME = TIE_BREAKER / 8
_MOST_TRIES = 64


def training_free_gates(
    backbone: TensorSource,
    form: MixtureFormat,
    layers: Iterable[int],
    num_experts: int,
    seed: int,
) -> list[Tensor]:
    """Return a random gate per mixture, for an MoE without seed data.

    Args:
        backbone: Has the norms before the gates, whose size sets the gates' scale: dense or the
            mixture, in which they are called alike.
        layers: Which are mixtures.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = (form.norm_factors(backbone, layer) for layer in layers)
    return [random_gate(num_experts, norm, generator) for norm in norms]


def random_gate(num_experts: int, norm_weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions, scaled so that logits vary by about 1; needs no data.

    Args:
        norm_weight: By what the norm before the gate multiplies, (hidden_size,): its root mean
            square is that of the router's inputs.
    """
    gate = torch.randn(num_experts, norm_weight.shape[0], generator=generator)
    return F.normalize(gate, dim=1) / root_mean_square(norm_weight)


def distinct_gates(
    gates: Sequence[torch.Tensor],
    dtype: torch.dtype,
    seed: int,
    rows: Collection[int] | None = None,
) -> list[torch.Tensor]:
    """Return gates in which no routing vector is another's double once they are stored.

    Experts without a sample all get the same vector from a fit, up to rounding: every token's
    logits for them would tie, or nearly, and runtimes break ties differently. Each of them is given
    a random direction of its own besides, small beside what tells the vectors apart
    (`TIE_BREAKER`).

    Args:
        gates: float32, (num_experts, hidden_size) per layer. Vectors without a double are returned
            as they are.
        dtype: What they are stored in.
        seed: Of the directions; an expert's do not depend on which others have doubles.
        rows: Change only these experts' vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_distinct_gate(gate, dtype, generator, rows) for gate in gates]


def _distinct_gate(
    gate: torch.Tensor,
    dtype: torch.dtype,
    generator: torch.Generator,
    rows: Collection[int] | None,
) -> torch.Tensor:
    directions = F.normalize(torch.randn(gate.shape, generator=generator), dim=1)
    spread = (gate - gate.mean(0)).square().sum(1).mean().sqrt()
    scale = float(spread) or float(gate.norm(dim=1).max()) or 1.0
    size = TIE_BREAKER * scale
    doubles = _doubles(gate, dtype, _SAME * scale, rows)
    found = gate
    for _ in range(_MOST_TRIES):
        if not (doubles and _doubles(found, dtype, _SAME * scale, rows)):
            break
        found = gate.clone()
        found[doubles] += size * directions[doubles]
        size *= 2  # in case this one is lost in the rounding
    return found


def _doubles(
    gate: Tensor, dtype: torch.dtype, near: float, rows: Collection[int] | None
) -> list[int]:
    """Return the rows, of those in `rows`, that are another's: stored as it is, or as near to it."""
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(gate, gate, compute_mode=exact)
    stored = gate.to(dtype).to(gate.dtype)
    same = (apart <= near) | (torch.cdist(stored, stored, compute_mode=exact) == 0)
    counts = same.sum(1).tolist()
    return [row for row, count in enumerate(counts) if count > 1 and (rows is None or row in rows)]


def root_mean_square(norm_weight: Tensor) -> Tensor:
    """Of the outputs of an RMS norm with this weight, (hidden_size,), to be expected."""
    return norm_weight.float().square().mean().sqrt().clamp(min=1e-6).cpu()


def named_gates(names: Sequence[str], gates: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gates by their names, in layer order."""
    return dict(zip(names, gates, strict=True))


def gates_digest(gates: Sequence[torch.Tensor], dtype: torch.dtype) -> str:
    """Return SHA-256 of all gates as they are stored, layer after layer."""
    return tensors_digest(gate.to(dtype) for gate in gates)


def tensors_digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return SHA-256 of the bytes of some tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor, tensor.dtype))
    return digest.hexdigest()
