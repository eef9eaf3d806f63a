"""Ways to spoil what a command reads, and the judge of what it says then.

A case is what spoils the family or its recipe, and the sentence the user must see. In the
sentences `…` stands for anything, and paths are relative to the family's folder. The tables of
cases, by name, lie with the tests of the reader they are for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from upit_merge.cli.main import main as upit_merge
from upit_merge.errors import UpitError

BASE, FIRST, SECOND, LAST = "base", *(f"sft/checkpoint-{step}" for step in (500, 1000, 1500))
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

# Of a family whose checkpoints are adapters.
ADAPTER = "lora/checkpoint-1500"
ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"

Document = dict[str, Any]
Spoil = Callable[[Family], Document | None]  # None: the recipe stays as it is


@dataclass(frozen=True)
class Case:
    spoil: Spoil
    sentence: str
    options: tuple[str, ...] = ()
    out: str = "new/out"


def each(table: dict[str, Case]) -> pytest.MarkDecorator:
    """Run a test with every `case` of a table."""
    return pytest.mark.parametrize("case", table.values(), ids=[*table])


# ---- what spoils a family ------------------------------------------------------------------


def both(*spoils: Spoil) -> Spoil:
    """One after the other; the last one's recipe counts."""
    return lambda family: [spoil(family) for spoil in spoils][-1]


def recipe(**keys: Any) -> Spoil:
    """Other top-level keys; a string with `@` has it replaced by the family's folder."""
    return lambda family: (
        family.recipe() | yaml.safe_load(json.dumps(keys).replace("@", f"{family.root}/"))
    )


def parameters(**settings: Any) -> Spoil:
    return recipe(parameters=settings)


def seed_data(text: str | None, **settings: Any) -> Spoil:
    """A router block with this seed data."""

    def spoil(family: Family) -> Document:
        path = family.root / "seed.jsonl"
        if text is not None:
            path.write_text(text)
        return family.recipe(router={"data": str(path), **settings})

    return spoil


def content(path: str, new: Callable[[bytes], bytes]) -> Spoil:
    """Change a file's bytes."""

    def spoil(family: Family) -> None:
        file = family.root / path
        file.write_bytes(new(file.read_bytes() if file.exists() else b""))

    return spoil


def json_file(path: str, **changes: Any) -> Spoil:
    """Change keys of a JSON object."""
    return content(path, lambda old: json.dumps(json.loads(old) | changes).encode())


def config(folder: str, **changes: Any) -> Spoil:
    return json_file(f"{folder}/config.json", **changes)


def adapter_settings(**changes: Any) -> Spoil:
    return json_file(ADAPTER_CONFIG, **changes)


def without(*paths: str) -> Spoil:
    """Remove files."""

    def spoil(family: Family) -> None:
        for path in paths:
            (family.root / path).unlink()

    return spoil


def moved_out(path: str, *, absolute: bool = False) -> Spoil:
    """Put a link to a good copy outside its folder in a file's place."""

    def spoil(family: Family) -> None:
        link, target = family.root / path, family.root / "outside" / Path(path).name
        target.parent.mkdir(exist_ok=True)
        if link.exists():
            link.rename(target)
        else:
            target.write_text("{}")
        link.symlink_to(target if absolute else os.path.relpath(target, link.parent))

    return spoil


def tensors(path: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the tensors of a file in place."""

    def spoil(family: Family) -> None:
        file = family.root / path
        stored = load_file(file)
        change(stored)
        save_file({n: t.contiguous() for n, t in stored.items()}, file, {"format": "pt"})

    return spoil


def weights(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return tensors(f"{folder}/model.safetensors", change)


def renamed(folder: str, new: Callable[[str], str]) -> Spoil:
    """Give every weight another name."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        old = dict(stored)
        stored.clear()
        stored.update({new(name): tensor for name, tensor in old.items()})

    return weights(folder, change)


def entry(folder: str, name: str, value: float) -> Spoil:
    """Set one weight."""
    return weights(folder, lambda stored: stored[name].view(-1)[5:6].fill_(value))


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Spoil:
    """Split the last checkpoint into shards, then spoil its folder and weight map."""

    def spoil(family: Family) -> None:
        folder = family.checkpoints[-1]
        stored = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(stored)}
        for part in set(weight_map.values()):
            save_file({n: stored[n] for n in stored if weight_map[n] == part}, folder / part)
        change(folder, weight_map)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def other_family(folder: str, **settings: Any) -> Spoil:
    """Put a model with other settings in a folder's place."""

    def spoil(family: Family) -> None:
        other = build_family(family.root / "other", count=0, **settings)
        shutil.rmtree(family.root / folder)
        other.base.rename(family.root / folder)

    return spoil


class Malicious:
    """Unpickling it would make the file `executed` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def pickled(
    change: Callable[[Document], Any] = lambda state: None,
    path: str = f"{LAST}/model.safetensors",
    name: str = "pytorch_model.bin",
) -> Spoil:
    """Turn a file of tensors into a `.bin`."""

    def spoil(family: Family) -> None:
        file = family.root / path
        state = load_file(file)
        change(state)
        torch.save(state, file.with_name(name))
        file.unlink()

    return spoil


# ---- what the user must see ----------------------------------------------------------------


def assert_sentence(message: str, sentence: str) -> None:
    """Insist on one printable line; `…` in the expected sentence is any text."""
    pattern = ".*".join(map(re.escape, sentence.split("…")))
    assert re.fullmatch(pattern, message), message
    assert message.isprintable()
    assert message.endswith(".")


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the sentence that a function refuses these arguments with."""
    with pytest.raises(UpitError) as caught:
        call(*arguments, **options)
    assert caught.value.message.isprintable()
    assert caught.value.message.endswith(".")
    return caught.value.message


def run(command: str, recipe: Path, out: Path, *options: str) -> Result:
    """What the command prints and returns to the shell."""
    words = [str(recipe), str(out), "--quiet", *options]
    if command == "mergekit-yaml":
        return CliRunner().invoke(mergekit_yaml, words)
    return CliRunner().invoke(upit_merge, ["run", *words])


def assert_stderr(stderr: str, sentence: str, family: Family) -> None:
    """Nothing but the sentence, in which the family's folder is left out."""
    line = stderr.strip().replace(f"{family.root}/", "")
    # mergekit hands us the document, not the name of its file.
    line = line.replace("Error: the recipe: ", "Error: recipe.yml: ")
    assert_sentence(line, f"Error: {sentence}")


def assert_refused(result: Result, sentence: str, family: Family) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert_stderr(result.stderr, sentence, family)
    assert not result.stdout


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file with its content, or its size where that is huge, and every folder."""

    def content(path: Path) -> Any:
        if not path.is_file():
            return None
        return path.read_bytes() if path.stat().st_size < 1 << 30 else path.stat().st_size

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def assert_case_refused(
    case: Case,
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    *,
    command: str = "upit-merge",
    **settings: Any,
) -> None:
    """Spoil a family, run on it, and insist on the sentence and that nothing else is on the disk.

    Args:
        settings: Parameters of the recipe, where the case has none of its own.
    """
    monkeypatch.chdir(family.root)
    document = case.spoil(family) or family.recipe()
    if settings:
        document.setdefault("parameters", settings)
    recipe = family.write_recipe(document)
    before = snapshot(family.root)
    result = run(command, recipe, family.root / case.out, *case.options)
    assert_refused(result, case.sentence, family)
    assert snapshot(family.root) == before
