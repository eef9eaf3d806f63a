"""What is done of router pre-training, kept on the disk, so that a killed stage goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from upit_merge.engine.hidden_states import PackedStates
from upit_merge.errors import first_line
from upit_merge.io.disk import free_bytes
from upit_merge.io.tensor_file import tensor_memory
from upit_merge.io.text_file import read_record, write_json
from upit_merge.output.edit import IDENTITY
from upit_merge.output.identity import first_difference
from upit_merge.runtime.processes import ALONE, Processes

LOG = logging.getLogger(__name__)

# Hidden states are kept after a layer if the last time is at least this long ago, and long enough
# for keeping them to take but a small part of the time. Less than that is computed again.
KEEP_SECONDS = 10.0
_KEEP_SHARE = 0.05


class Progress:
    """Finished parts of the stage in a folder of their own; without a folder, nothing is kept.

    The first process keeps what all have in common, each its own hidden states.

    Args:
        folder: Created if needed; emptied if it holds another stage's.
        identity: What decides the result: a stage that differs in any of it starts anew.
        processes: Who takes part.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._folder = folder
        self._processes = processes
        self._kept_at = time.monotonic()
        self._seconds = 0.0
        if folder is None:
            return
        record = folder / IDENTITY
        same = record.is_file() and not first_difference(read_record(record), identity or {})
        if processes.is_first and not same:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(record, identity or {})
        processes.gather(None)  # nobody looks before the first has tidied up

    # ---- small results ---------------------------------------------------------------------

    def keep(
        self, name: str, tensors: Mapping[str, Tensor], *, own: bool = False, **facts: str
    ) -> None:
        """Keep a finished result under a name; an older one is replaced in one step.

        Args:
            own: It is this process's alone; else all processes have it, and the first keeps it.
            facts: Kept with it.
        """
        if self._folder is None or not (own or self._processes.is_first):
            return
        draft = self._folder / f".{name}.draft"
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, draft, facts)
        except SafetensorError as error:  # which is no OSError, whatever the disk said
            full = "No space" in str(error) or "StorageFull" in str(error)
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, first_line(error), str(draft)) from error
        _flush(draft)
        os.replace(draft, self._folder / f"{name}.safetensors")
        self._kept_at = time.monotonic()

    def kept(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what was kept under a name, with its facts."""
        if self._folder is None:
            return None
        path = self._folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        except (OSError, SafetensorError):
            return None

    def keep_layers(self, name: str, tensors: Sequence[Tensor], *, own: bool = False) -> None:
        """Keep a tensor for each layer under a name, in order."""
        self.keep(name, {f"{layer:05}": t for layer, t in enumerate(tensors)}, own=own)

    def kept_layers(self, name: str) -> list[Tensor]:
        """Return the tensors that were kept under a name; none if there are none."""
        kept = self.kept(name)
        return [] if kept is None else [kept[0][layer] for layer in sorted(kept[0])]

    def has(self, prefix: str) -> bool:
        """Return whether any process has kept something under a name that begins so."""
        return self._folder is not None and any(self._folder.glob(f"{prefix}*.safetensors"))

    @property
    def is_due(self) -> bool:
        """Whether it is time to keep something that is not finished yet."""
        return self._folder is not None and time.monotonic() - self._kept_at >= KEEP_SECONDS

    # ---- hidden states ---------------------------------------------------------------------

    def keep_states(
        self,
        name: str,
        layer: int,
        states: PackedStates,
        results: Sequence[Tensor],
        *,
        own: bool = False,
    ) -> None:
        """Keep hidden states of the sweep of that name after `layer` layers, now and then.

        Args:
            results: What came of the layers so far, one tensor each.
            own: They are this process's alone.
        """
        waited = time.monotonic() - self._kept_at
        due = waited >= max(KEEP_SECONDS, self._seconds / _KEEP_SHARE)
        if self._folder is None or not self._processes.gather(due)[0]:
            return
        size = states.rows.numel() * states.rows.element_size()
        rank = self._processes.rank
        record = self._folder / f"sweep-{rank}.json"
        if free_bytes(self._folder) < 2 * size * self._processes.size:
            LOG.info("The disk has no room to keep hidden states; a killed run would start over.")
            self._kept_at = time.monotonic()
            return
        started = time.monotonic()
        old = read_record(record).get("file")
        path = self._folder / f"states-{rank}-{'b' if old == f'states-{rank}-a.bin' else 'a'}.bin"
        with path.open("wb") as file:
            file.write(tensor_memory(states.rows) if size else b"")
        _flush(path)
        if results:
            self.keep_layers(self._results(own), results, own=own)
        write_json(record, self._record(name, states) | {"layer": layer, "file": path.name})
        if old and old != path.name:
            (self._folder / old).unlink(missing_ok=True)
        self._kept_at = time.monotonic()
        self._seconds = self._kept_at - started

    def _record(self, name: str, states: PackedStates) -> dict[str, Any]:
        """Return what hidden states must agree in to be of use."""
        dtype = str(states.rows.dtype)
        size = states.rows.numel() * states.rows.element_size()
        return {"name": name, "processes": self._processes.size, "dtype": dtype, "size": size}

    def _results(self, own: bool) -> str:
        return f"results-{self._processes.rank}" if own else "gates"

    def states(
        self, name: str, into: PackedStates, *, with_results: bool = False, own: bool = False
    ) -> tuple[int, list[Tensor]]:
        """Go on with a sweep: the number of layers that are done, and what came of them.

        0 if there is nothing to go on with; `into` is not touched then.

        Args:
            with_results: The sweep is one that has a result for each layer.
            own: They are this process's alone.
        """
        if self._folder is None:
            return 0, []
        record = read_record(self._folder / f"sweep-{self._processes.rank}.json")
        size = into.rows.numel() * into.rows.element_size()
        path = self._folder / str(record.get("file"))
        wanted = self._record(name, into)
        fits = {key: record.get(key) for key in wanted} == wanted and path.is_file()
        layer = int(record["layer"]) if fits else 0
        results = self.kept_layers(self._results(own))[:layer] if with_results else []
        if with_results and len(results) < layer:
            layer = 0
        # A kill may come between two processes' records: then there is no layer all can go on at.
        if len(set(self._processes.gather(layer))) > 1 or layer == 0:
            return 0, []
        if size:
            with path.open("rb") as file:
                file.readinto(tensor_memory(into.rows))
        LOG.info("Going on with the router's %s at layer %d.", name, layer)
        return layer, results

    def drop_states(self) -> None:
        """Remove the hidden states of a sweep that is done."""
        if self._folder is None:
            return
        rank = self._processes.rank
        (self._folder / f"sweep-{rank}.json").unlink(missing_ok=True)
        for path in self._folder.glob(f"states-{rank}-*.bin"):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
