"""Where arithmetic is done."""

from __future__ import annotations

import torch

from upit_merge.errors import UpitError


def resolve_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        UpitError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UpitError(f"The device {name!r} does not exist; use cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UpitError(f"The device {name!r} is not supported; use cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UpitError(
            "There is no CUDA device here that torch can use; leave out --cuda, or use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UpitError(
            f"The device {name!r} does not exist, there are {torch.cuda.device_count()}; use "
            "--device cuda."
        )
    return device


def merge_workers(device: torch.device) -> int:
    """Threads that read, compute and write blocks of tensors."""
    # On a GPU two threads suffice to read and write while the device computes.
    return torch.get_num_threads() if device.type == "cpu" else 2
