"""What was measured of other models is kept for the next call, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upit_merge import __version__
from upit_merge.errors import UpitError
from upit_merge.io.text_file import write_json
from upit_merge.io.untrusted import read_json

LOG = logging.getLogger(__name__)

_MOST_FILES = 200  # the oldest go


def cache_folder() -> Path:
    """Return where it is kept: $UPIT_MERGE_CACHE, or `upit-merge` beside the Hub's own cache."""
    if own := os.environ.get("UPIT_MERGE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "upit-merge"


def kept_losses(identity: Mapping[str, Any]) -> Tensor | None:
    """Return the samples' summed losses that were kept under this identity, float64, or None."""
    path = _path(identity)
    try:
        sums = read_json(path, "what was measured before").get("sums")
    except UpitError:
        return None
    if not isinstance(sums, list) or not all(
        isinstance(s, float) and math.isfinite(s) for s in sums
    ):
        return None
    return torch.tensor(sums, dtype=torch.float64)


def keep_losses(identity: Mapping[str, Any], sums: Tensor) -> None:
    """Keep the samples' summed losses, (num_samples,); where nothing can be written, nothing is."""
    path = _path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sums": sums.tolist()})
        files = sorted(path.parent.glob("*.json"), key=lambda file: -file.stat().st_mtime_ns)
        for old in files[_MOST_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        LOG.debug("%s is not kept (%s)", path, error)


def _path(identity: Mapping[str, Any]) -> Path:
    text = json.dumps({"upit-merge": __version__, **identity}, sort_keys=True)
    return cache_folder() / "losses" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
