"""Writes the reference pages of this folder: `python docs/generate.py` after a setting changes.

Pages of settings are made from the pydantic models, the page of commands from click, so that what
a reader finds is what the program takes. A test compares the pages with the program. What writes
each kind of page is beside this file, in `generate_*.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from generate_commands import commands_page
from generate_families import families_page
from generate_settings import SettingsPage, blocks_of
from upit_merge.config.recipe import Recipe
from upit_merge.pipeline.config import PipelineConfig

FOLDER = Path(__file__).parent

SETTINGS = {
    "recipe.md": SettingsPage(
        Recipe,
        "The recipe",
        "A recipe is one YAML file, of the form that mergekit reads. `upit-merge plan recipe.yml` "
        "checks it and writes nothing. Each block below has its keys, then an example of it at "
        "its place. Whole recipes are in [recipes/](../recipes/README.md), formulas in "
        "[method.md](method.md).",
    ),
    "pipeline.md": SettingsPage(
        PipelineConfig,
        "The pipeline",
        "`upit-merge pipeline pipeline.yml` goes from a dense model to a trained mixture: it "
        "fine-tunes, merges, fits the router, trains the mixture and evaluates it. Stages that are "
        "done are skipped, one that was cut off goes on. `merge` and `router` are blocks of "
        "[a recipe](recipe.md); `prepare` and `post_train` have the keys of `upit-merge finetune`, "
        "which are those of TRL's `trl sft --config` and three more "
        "([use-anywhere.md](use-anywhere.md#train-it-further)); without a GPU, see "
        "[hardware.md](hardware.md#training-without-a-gpu).",
    ),
}


def settings_pages() -> dict[str, str]:
    """Write every page of settings; a model is described on the first one it occurs on."""
    texts: dict[str, str] = {}
    known: dict[type[BaseModel], str] = {}
    for name, page in SETTINGS.items():
        texts[name] = page.text(known)
        known = {block.model: f"{name}{block.link}" for block in blocks_of(page.model)} | known
    return texts


def notebook() -> str:
    """Turn colab.sh into a Jupyter notebook without outputs: its blocks as cells of bash."""
    cells: list[dict[str, Any]] = []
    text = (FOLDER / "colab.sh").read_text(encoding="utf-8")
    for block in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = block.partition("\n")
        cell: dict[str, Any] = {"metadata": {}}
        if kind.strip() == "[markdown]":
            cell["cell_type"] = "markdown"
            body = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            body = f"%%bash\nset -euo pipefail\n{body.strip()}"
        cells.append({**cell, "id": f"cell-{len(cells)}", "source": body.splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[str, str]:
    """Return every generated file of this folder, by name."""
    return {
        **settings_pages(),
        "commands.md": commands_page(),
        "families.md": families_page(),
        "colab.ipynb": notebook(),
    }


if __name__ == "__main__":
    for page_name, page_text in pages().items():
        (FOLDER / page_name).write_text(page_text, encoding="utf-8")
