"""The notebook for small machines, and the script it is made from, are what they say."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from benchmarks import notebook
from tests.conftest import build_family
from tests.support.commands import done
from tests.support.lora import save_adapter
from upit_merge.config.recipe import parse_recipe_text

DOCS = Path(__file__).parents[2] / "docs"


def cells() -> list[dict[str, Any]]:
    return json.loads((DOCS / "colab.ipynb").read_text(encoding="utf-8"))["cells"]


def written_file(name: str) -> str:
    """What the script writes into a file."""
    script = (DOCS / "colab.sh").read_text(encoding="utf-8")
    found = re.search(rf"^cat > {re.escape(name)} <<'YAML'\n(.*?)^YAML$", script, re.M | re.S)
    assert found
    return found[1]


def test_the_notebook_is_one_without_outputs() -> None:
    """By the schema of nbformat 4.5."""
    notebook = json.loads((DOCS / "colab.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        keys = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            keys |= {"outputs", "execution_count"}
        else:
            assert cell["cell_type"] == "markdown"
        assert cell.keys() == keys
        assert all(isinstance(line, str) for line in cell["source"])


def test_the_notebooks_cells_are_valid_bash_and_python() -> None:
    sources = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert len(sources) > 5
    for source in sources:
        magic, _, script = source.partition("\n")
        assert magic == "%%bash"
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        for program in re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", script, re.MULTILINE | re.DOTALL):
            compile(program, "cell", "exec")


def test_the_notebooks_recipe_is_valid() -> None:
    recipe = parse_recipe_text(written_file("recipe.yml"))
    assert recipe.router is not None
    training = yaml.safe_load(written_file("finetune.yml"))
    assert recipe.base_model == training["model_name_or_path"]
    ratio = training["max_steps"] / training["save_steps"]
    assert len(recipe.models) * ratio < (recipe.parameters.num_experts or 0)


def test_the_notebooks_training_settings_are_known_to_trl() -> None:
    trl = pytest.importorskip("trl")
    blocks = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
    known = {field.name for block in blocks for field in dataclasses.fields(block)} | {"data"}
    assert set(yaml.safe_load(written_file("finetune.yml"))) <= known


def test_what_the_whole_run_makes_smaller_is_in_the_notebook_once(tmp_path: Path) -> None:
    """And its stand-ins are what the datasets library takes the notebook's names for."""
    sources = ["".join(cell["source"]) for cell in cells()]
    for old in notebook.SMALLER:
        assert sum(source.count(old) for source in sources) == 1, old
    text = "".join(sources)
    assert notebook.MODEL in text
    notebook.write_data(tmp_path)
    loaded = re.findall(r'load_dataset\("([^"]+)"(?:, "(\w+)")?, split="train"\)', text)
    assert len(loaded) == 3
    for name, config in loaded:
        rows = load_dataset(
            str(tmp_path / name), config or None, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(rows) == notebook.ROWS


def test_the_notebooks_recipe_and_the_commands_after_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny models laid out as its training leaves them, without a GPU."""
    family = build_family(tmp_path, kind="qwen3", count=1)
    monkeypatch.chdir(tmp_path)
    rows = []
    for seed, domain in enumerate(("code", "math", "chat")):
        for step in (125, 250):
            folder = tmp_path / "lora" / domain / f"checkpoint-{step}"
            save_adapter(family.base, folder, seed=step + seed)
        row = {"prompt": f"{domain}: ", "completion": "abc" * (2 + seed), "domain": domain}
        rows += [row] * 8
    (tmp_path / "sft").rename(tmp_path / "dense")
    (tmp_path / "lora").rename(tmp_path / "sft")
    for name in ("seed.jsonl", "held-out.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(written_file("recipe.yml"))
    # float16 is for the GPU; here the tokenizer is the base's.
    changes = {"base_model": str(family.base), "dtype": "float32"}
    Path("recipe.yml").write_text(yaml.safe_dump(recipe | changes))
    script = (DOCS / "colab.sh").read_text(encoding="utf-8")
    commands = re.findall(r"^upit-merge ((?:plan|run|evaluate) .*)$", script, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done(*command.split(), "--quiet")
    assert json.loads(Path("out/config.json").read_text())["num_experts"] == 8
    assert Path("routing.png").is_file()


def test_the_notebooks_training_runs(tmp_path: Path) -> None:
    """On a tiny model and the CPU, a few steps; its checkpoints are where the recipe looks."""
    pytest.importorskip("trl")
    family = build_family(tmp_path, kind="qwen3", count=1)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(32)]
    (tmp_path / "train-code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "finetune.yml").write_text(written_file("finetune.yml"))
    script = (DOCS / "colab.sh").read_text(encoding="utf-8")
    found = re.search(r"^ +upit-merge (finetune .*)$", script, re.MULTILINE)
    assert found
    arguments = found[1].replace('"', "").replace("$domain", "code").split()
    assert arguments.pop() == "$on_cpu"
    arguments += f"--model_name_or_path {family.base} --fp16 false --use_cpu true".split()
    arguments += ["--max_steps", "4", "--save_steps", "2", "--max_length", "32", "--quiet"]
    command = [sys.executable, "-m", "upit_merge", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    adapters = sorted(tmp_path.glob("sft/code/checkpoint-*/adapter_config.json"))
    assert [path.parent.name for path in adapters] == ["checkpoint-2", "checkpoint-4"]
