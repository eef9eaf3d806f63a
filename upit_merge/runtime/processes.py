"""Several processes that share one job, as torchrun or `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from upit_merge.errors import ResumableError, UpitError

Value = TypeVar("Value")

# Waiting for the slowest process is normal: a share of a large merge may take hours.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; alone unless a launcher says otherwise.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1
    _group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and does what is not shared."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in rank order; waits for all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _told_apart():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, the same to the last bit in each of them.

        Args:
            tensor: Of the same shape and dtype everywhere.

        Returns:
            Where `tensor` is; with one process it is the tensor itself.
        """
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        summed = tensor.to("cpu", copy=True).contiguous()
        with _told_apart():
            dist.all_reduce(summed, group=self._group)
        return summed.to(tensor.device)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave this block, or none does: an error of one is everybody's.

        Nothing inside may wait for the others.

        Raises:
            UpitError: another process failed inside; its message, with its rank. Only the first
                process and the one it happened to print theirs.
        """
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
            if self.size == 1:
                raise
        told = None
        if error is not None:
            lasting = isinstance(error, UpitError) and not isinstance(error, ResumableError)
            told = (str(error) or type(error).__name__, UpitError if lasting else ResumableError)
        failures = [(rank, told) for rank, told in enumerate(self.gather(told)) if told is not None]
        if not failures:
            return
        rank, (message, kind) = failures[0]
        if rank == self.rank and error is not None:
            raise error
        failure = kind(f"Process {rank} of this run failed: {message}")
        if not self.is_first:  # told once is enough
            failure.show = lambda file=None: None  # type: ignore[method-assign]
        raise failure from error


ALONE = Processes()


def check_single_process(command: str) -> None:
    """Refuse to be one of several processes.

    Raises:
        UpitError: a launcher started several.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UpitError(
            f"`upit-merge {command}` is the work of one process; start it without torchrun or "
            "accelerate launch."
        )


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """A connection closed by a process that is gone is not this process's failure."""
    try:
        yield
    except RuntimeError as error:
        raise ResumableError(
            "Another process of this run has ended early; see what it said, then run the same "
            "command again, which goes on from there."
        ) from error


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Meet the other processes that the launcher started; they talk through gloo.

    Raises:
        UpitError: the launcher's environment variables are not what torch expects.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    import torch.distributed as dist

    started = False
    try:
        if dist.is_initialized():  # by a program that calls us; its group may speak NCCL only
            group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
            started, group = True, dist.group.WORLD
    except (ValueError, RuntimeError) as error:
        raise UpitError(
            f"The processes of this run cannot find each other ({str(error).splitlines()[0]}); "
            "start them with torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if started:
            dist.destroy_process_group()
