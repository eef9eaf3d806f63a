"""Folders as people have them, and the recipe that `upit-merge init` writes for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.commands import done
from tests.support.lora import save_adapter
from upit_merge.config.recipe import load_recipe


def written(*words: object) -> dict[str, Any]:
    """The document that `init` writes, read by PyYAML itself; our loader takes it too."""
    done("init", *words)
    load_recipe(Path("recipe.yml"))
    document = yaml.safe_load(Path("recipe.yml").read_text(encoding="utf-8"))
    Path("recipe.yml").unlink()
    return document


def models(document: dict[str, Any]) -> list[str]:
    return [entry["model"] for entry in document["models"]]


def write_data(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"sample {n}"}) + "\n" for n in range(9)))


def write_adapters(base: Path, *folders: str, named: str | None = None) -> None:
    """Save adapters of a base; `named` is what they call it."""
    for seed, folder in enumerate(folders):
        save_adapter(base, Path(folder), seed=seed)
        config = Path(folder, "adapter_config.json")
        if named is not None:
            content = json.loads(config.read_text()) | {"base_model_name_or_path": named}
            config.write_text(json.dumps(content))
