"""Which files a model was opened from: results are kept under their state, and under no other."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from upit_merge.errors import UpitError
from upit_merge.io.untrusted import own_file

# A header of safetensors is not longer; nor is a configuration, by far.
_MOST_BYTES_READ = 100_000_000
# Gone again, not readable, links in a circle, or out of the folder.
_UNSEEN = (OSError, RuntimeError, UpitError)


@dataclass(frozen=True)
class ModelFiles:
    """The files of model folders, as they were before a model was opened from them.

    Nobody locks a model that is only read. Another command may replace its files while it is run,
    or between its opening and the first look at their sizes; what was measured of the old ones
    must not be kept as the new ones'.

    Attributes:
        states: What is known of every file, by its name and where it really is.
    """

    states: Mapping[str, str]

    @classmethod
    def before_opening(cls, *folders: Path) -> ModelFiles:
        """Look at all files in some folders; what cannot be looked at is left out."""
        try:
            files = [path for folder in folders for path in folder.iterdir()]
        except OSError:
            return cls({})
        states = {}
        for path in files:
            with contextlib.suppress(*_UNSEEN):
                states[_name(path)] = _state(path)
        return cls(states)

    def and_of(self, *folders: Path) -> ModelFiles:
        """Return these, and the files in some more folders, as they are before a model is opened there."""
        return ModelFiles({**ModelFiles.before_opening(*folders).states, **self.states})

    def identity(self, files: Iterable[Path]) -> dict[str, str] | None:
        """Return the state of the model's own files; None if it is no longer what it was.

        Args:
            files: Those that decide its numbers.
        """
        try:
            now = {_name(path): _state(path) for path in files}
        except _UNSEEN:
            return None
        return now if all(self.states.get(name) == state for name, state in now.items()) else None


def _name(path: Path) -> str:
    # In the Hub's cache two files of the same content are links to one.
    return f"{path.name} {path.resolve()}"


def _state(path: Path) -> str:
    """Return what tells a file from what it was before, short of reading all the weights.

    A configuration is known by its content. Of weights the list of tensors is read; who writes
    others over them with the old size and time of change changes the inode, or its own time.
    """
    state = own_file(path, path.parent).stat()
    content = ""
    if stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
        if path.name in ("config.json", "adapter_config.json"):
            with open(path, "rb") as file:
                return f"sha256 {hashlib.sha256(file.read(_MOST_BYTES_READ)).hexdigest()}"
        if path.suffix == ".safetensors":
            content = _header_digest(path)
    numbers = (state.st_size, state.st_mtime_ns, state.st_ino, state.st_ctime_ns)
    return " ".join([*map(str, numbers), content]).rstrip()


def _header_digest(path: Path) -> str:
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _MOST_BYTES_READ))
    return hashlib.sha256(length + header).hexdigest()
