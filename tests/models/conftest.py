"""A family with adapters, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family, build_family
from tests.support.lora import with_adapters
from tests.support.spoilt import BASE, json_file


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, list[dict[str, Any]]]:
    """A family with three adapters, and PEFT's merged models; do not write into it."""
    family = build_family(tmp_path_factory.mktemp("lora"), count=2)
    return family, with_adapters(family)


@pytest.fixture(scope="session")
def shared_adapters(shared_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("adapters") / "family"
    root.mkdir()
    shutil.copytree(shared_family.base, root / BASE)
    family = Family(root, root / BASE, [])
    with_adapters(family)
    return family


@pytest.fixture
def adapted(shared_adapters: Family, tmp_path: Path) -> Family:
    """A base and three adapters that say they were trained on it."""
    root = tmp_path / "family"
    shutil.copytree(shared_adapters.root, root)
    folders = [root / "lora" / f"checkpoint-{step}" for step in (500, 1000, 1500)]
    family = Family(root, root / BASE, folders)
    for folder in folders:
        path = f"lora/{folder.name}/adapter_config.json"
        json_file(path, base_model_name_or_path=str(family.base))(family)
    return family
