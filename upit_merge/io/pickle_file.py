"""`.bin` files of `torch.save`, read without running what is in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from upit_merge.errors import UpitError, first_line, one_line
from upit_merge.io.tensor_file import DTYPES, TensorSpec
from upit_merge.io.untrusted import check_tensor_name


class PickleFile:
    """A `.bin` shard: unpickled with `weights_only`, its storages memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not zipfile.is_zipfile(path):
            raise UpitError(
                f"{path} is not a file of torch.save (or of one before torch 1.6), or is truncated;"
                " copy or download it again, or convert the checkpoint to safetensors."
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises whatever the file makes it raise
            reason = one_line(first_line(error))
            if isinstance(error, pickle.UnpicklingError):
                # torch's own words advise to run the code.
                reason = "it is corrupt or holds objects other than tensors, which could run code"
            raise UpitError(
                f"{path} cannot be read with weights_only ({reason}); convert the checkpoint to "
                "safetensors."
            ) from error
        if not isinstance(state, Mapping):
            raise UpitError(
                f"{path} does not hold a state dict but a {type(state).__name__}; convert the "
                "checkpoint to safetensors."
            )
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            check_tensor_name(path, name)
            dense = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
            if not dense or tensor.is_meta or tensor.dtype not in DTYPES.values():
                raise UpitError(
                    f"{path} stores {name} in a form that cannot be merged; convert the "
                    "checkpoint to safetensors in float32, float16 or bfloat16."
                )
            self._tensors[name] = tensor.detach()
        self.specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][start:stop].clone()

    def close(self) -> None:
        self._tensors = {}
