"""Where and how commands compute: what their options have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from upit_merge.io.hub import OpenOptions


@dataclass(frozen=True)
class CommandOptions:
    """Where a command computes, and what it may do.

    Args:
        device: `cpu`, `cuda` or `auto`.
        open: How models are opened.
        quiet: No progress bars, no tables.
    """

    device: str = "cpu"
    open: OpenOptions = field(default_factory=OpenOptions)
    quiet: bool = False


@dataclass(frozen=True)
class MixtureOptions(CommandOptions):
    """How a command runs data through a mixture that is there.

    Args:
        seed: Of whatever is random.
    """

    seed: int = 0


@dataclass(frozen=True)
class ResizeOptions(MixtureOptions):
    """How a mixture gets more or fewer experts.

    Args:
        max_shard_bytes: Upper bound of a file that is written.
    """

    max_shard_bytes: int = 5_000_000_000
