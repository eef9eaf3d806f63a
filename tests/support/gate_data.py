"""What gates are fitted to: labelled tokens, as one process has them or as several share them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from upit_merge.router.objectives import GateData

CPU = torch.device("cpu")


def labelled_inputs(samples: int = 60, tokens: int = 10, width: int = 10, experts: int = 4):
    """Samples of ten tokens each, of unequal numbers per expert, on axes of unequal scale."""
    generator = torch.Generator().manual_seed(0)
    assigned = torch.randint(0, experts, (samples,), generator=generator)
    assigned[: samples // 3] = 0
    centres = torch.randn(experts, width, generator=generator)
    inputs = centres[assigned].repeat_interleave(tokens, 0)
    inputs = inputs + torch.randn(inputs.shape, generator=generator)
    inputs = inputs * torch.logspace(-1, 1, width)
    spans = [slice(index * tokens, (index + 1) * tokens) for index in range(samples)]
    return GateData(inputs, spans, [tokens] * samples, assigned, experts, CPU)


def shares(data: GateData, count: int = 2) -> list[GateData]:
    """The same samples dealt out to several processes."""
    parts = []
    for rank in range(count):
        rows, spans, start = [], [], 0
        for index, span in enumerate(data.spans):
            mine = index % count == rank
            size = span.stop - span.start if mine else 0
            rows += [data.inputs[span]] if mine else []
            spans.append(slice(start, start + size))
            start += size
        part = replace(data, inputs=torch.cat(rows), spans=spans)
        parts.append(part)
    return parts


def together(fit, parts: list[GateData]) -> list[torch.Tensor]:
    """Run a fit once per process, in threads that meet at every sum."""
    meeting = threading.Barrier(len(parts))
    slots: list[torch.Tensor | None] = [None] * len(parts)

    def run(rank: int) -> torch.Tensor:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor
            meeting.wait()
            result = torch.stack(slots).sum(0)
            meeting.wait()
            return result

        return fit(replace(parts[rank], total=total))

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))
