"""Where arithmetic is done, and by how many threads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from upit_merge.errors import UpitError, shown

# What blocks may take in all, so that memory does not grow with the number of cores.
_BLOCKS_BYTES = 384 << 20


def resolve_device(name: str) -> torch.device:
    """Return the torch device of that name.

    Raises:
        UpitError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UpitError(f"The device {name!r} does not exist; use cpu or cuda.") from None
    if device.type == "mps":
        raise UpitError(
            "Apple's GPU (mps) is for `upit-merge chat`, everything else is computed on the CPU, "
            "which has the same memory; leave out --device."
        )
    if device.type not in ("cpu", "cuda"):
        raise UpitError(f"The device {name!r} is not supported; use cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UpitError(
            "There is no CUDA device here that torch can use; leave out --cuda and --multi-gpu, or "
            "use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UpitError(
            f"The device {name!r} does not exist, there are {torch.cuda.device_count()}; use "
            "--device cuda."
        )
    return device


def resolve_chat_device(name: str) -> torch.device:
    """Return the device of that name for a model that transformers runs, which may be Apple's GPU.

    `auto` is the first that is here of CUDA, Apple's GPU and the CPU.

    Raises:
        UpitError: there is no such device here.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto" and has_mps and not torch.cuda.is_available():
        name = "mps"
    if name.partition(":")[0] != "mps":
        return resolve_device(name)
    if not has_mps:
        raise UpitError(
            "There is no GPU of Apple's here that torch can use (macOS 14 or newer on Apple "
            "silicon has one); use --device cpu."
        )
    if name not in ("mps", "mps:0"):
        raise UpitError(f"The device {shown(name)} does not exist, there is one; use --device mps.")
    return torch.device("mps")


def resolve_devices(name: str, *, multi_gpu: bool = False) -> tuple[torch.device, ...]:
    """Return the devices of this process: with `multi_gpu` all CUDA devices, else the one of that name.

    Of several processes on a machine, each takes a device of its own.

    Raises:
        UpitError: there is no such device here.
    """
    if multi_gpu:
        name = "cuda"
    device = resolve_device(name)
    if device.type == "cpu" or ":" in name:
        return (device,)
    count = torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        return (torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count),)
    return tuple(torch.device("cuda", index) for index in range(count if multi_gpu else 1))


def merge_workers(devices: Sequence[torch.device], block_bytes: int) -> int:
    """Return how many threads read, compute and write blocks of tensors.

    Args:
        block_bytes: RAM that one block takes.
    """
    # On a GPU two threads suffice to read and write while the device computes.
    threads = torch.get_num_threads() if devices[0].type == "cpu" else 2 * len(devices)
    return max(1, min(threads, _BLOCKS_BYTES // block_bytes))
