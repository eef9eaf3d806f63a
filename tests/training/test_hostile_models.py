"""Hostile input: models to be trained whose files are links to files of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import Family
from upit_merge.errors import UpitError
from upit_merge.training.finetune import finetune
from upit_merge.training.outcome import files_besides_weights


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_a_dense_model(name: str, family: Family, tmp_path: Path) -> None:
    """The tokenizer is saved with every checkpoint."""
    path, outside = family.base / name, tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    settings = {
        "model_name_or_path": str(family.base),
        "data": str(family.seed_file()),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "settings.yml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UpitError, match=f"{name} is a link to .*, outside its folder"):
        finetune(tmp_path / "settings.yml", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_link_beside_the_weights_of_a_mixture(tmp_path: Path) -> None:
    """Whatever lies there, the trained mixture gets a copy."""
    folder = tmp_path / "mixture"
    folder.mkdir()
    for name in ("notes.pdf", "model.safetensors", ".hidden"):
        (folder / name).touch()
    assert [path.name for path in files_besides_weights(folder)] == ["notes.pdf"]
    (tmp_path / "outside").write_text("precious")
    (folder / "more.pdf").symlink_to(tmp_path / "outside")
    with pytest.raises(UpitError, match=r"more\.pdf is a link to .*, outside its folder"):
        files_besides_weights(folder)
