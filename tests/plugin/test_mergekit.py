"""mergekit as users run it: stock commands in new processes, with this package installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import Family
from tests.support.naive import load_model
from tests.support.warm import ran

BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def python(code: str, **environment: str) -> str:
    result = run(sys.executable, "-c", code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_mergekit_yaml_runs_a_upit_recipe(family: Family, tmp_path: Path, merge) -> None:
    document = family.recipe(
        parameters={"num_experts": 4}, router={"data": str(family.seed_file())}
    )
    recipe = family.write_recipe(document)
    out = tmp_path / "by-mergekit"
    result = run(str(BIN / "mergekit-yaml"), str(recipe), str(out), "-v", "--num-threads", "1")
    assert result.returncode == 0, result.stderr
    assert "writing experts" in result.stderr
    assert (out / "model.safetensors").read_bytes() == (
        merge(document) / "model.safetensors"
    ).read_bytes()
    assert (out / "mergekit_config.yml").read_text() == recipe.read_text()


def test_mergekit_options_are_honoured(shared_family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(yaml.safe_dump(shared_family.recipe(parameters={"num_experts": 5})))
    outputs = {}
    for name, options in {
        "plain": [],
        "options": ["--out-shard-size", "60000", "--no-copy-tokenizer", "--no-write-model-card"],
        "seed": ["--random-seed", "9", "--low-cpu-memory", "--async-write"],
    }.items():
        outputs[name] = tmp_path / name
        result = ran("mergekit.scripts.run_yaml", recipe, outputs[name], "--quiet", *options)
        assert result.returncode == 0, result.stderr
        assert "writing experts" not in result.stderr
        if name == "seed":
            assert "--low-cpu-memory has no effect on upit" in result.stderr
            assert "--async-write has no effect on upit" in result.stderr
        else:
            assert "has no effect" not in result.stderr
    files = {path.name for path in outputs["options"].iterdir()}
    assert "model.safetensors.index.json" in files
    assert not files & {"tokenizer.json", "README.md", "mergekit_config.yml"}
    plain, sharded, seeded = (load_model(folder) for folder in outputs.values())
    assert all(torch.equal(plain[name], sharded[name]) for name in plain)
    child = "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    assert not torch.equal(plain[child], seeded[child])


def test_stock_recipes_run_as_ever(shared_family: Family, tmp_path: Path) -> None:
    """A `linear` recipe with the plug-in on and off: the same bytes, the right numbers."""
    document = {
        "merge_method": "linear",
        "models": [
            {"model": str(path), "parameters": {"weight": 0.5}}
            for path in shared_family.checkpoints[:2]
        ],
        "dtype": "float32",
    }
    recipe = tmp_path / "linear.yml"
    recipe.write_text(yaml.safe_dump(document))
    outputs = []
    for disabled in ("0", "1"):
        out = tmp_path / f"linear-{disabled}"
        result = run(
            str(BIN / "mergekit-yaml"),
            str(recipe),
            str(out),
            "--no-write-model-card",
            UPIT_MERGE_DISABLE_PLUGIN=disabled,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(load_model(out))
    first, second = (load_model(path) for path in shared_family.checkpoints[:2])
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name])
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_mergekit_multi_feeds_a_merge_into_upit(shared_family: Family, tmp_path: Path) -> None:
    """mergekit-multi passes configurations, not text: the router block must survive."""
    averaged = {
        "name": "averaged",
        "merge_method": "linear",
        "models": [
            {"model": str(path), "parameters": {"weight": 1.0}}
            for path in shared_family.checkpoints[:2]
        ],
        "dtype": "float32",
        "tokenizer_source": str(shared_family.base),
    }
    moe = shared_family.recipe(
        models=[str(shared_family.checkpoints[2]), "averaged"],
        parameters={"num_experts": 3},
        router={"data": str(shared_family.seed_file()), "objective": "ridge"},
    )
    config = tmp_path / "multi.yml"
    config.write_text(yaml.safe_dump_all([averaged, moe]))
    out = tmp_path / "out"
    result = run(
        str(BIN / "mergekit-multi"),
        str(config),
        "--out-path",
        str(out),
        "-I",
        str(tmp_path / "intermediate"),
        "--no-write-model-card",
    )
    assert result.returncode == 0, result.stderr
    report = yaml.safe_load((out / "upit_report.json").read_text())
    assert report["router"]["settings"]["objective"] == "ridge"
    assert report["checkpoints"][1].endswith("averaged")


def test_upit_is_registered_by_name() -> None:
    code = "from mergekit import merge_methods as m; print(m.get('upit').spec.pretty_name)"
    assert python(code) == "UpIT"
    missing = run(sys.executable, "-c", code, UPIT_MERGE_DISABLE_PLUGIN="1")
    assert "Unimplemented merge method upit" in missing.stderr


def test_single_tensors_cannot_be_merged_by_upit() -> None:
    code = """
import torch
from mergekit.merge_methods import get, TensorGroup
try:
    get("upit")([TensorGroup.from_tensors([torch.ones(2), torch.ones(2)], base_index=0)])
except Exception as error:
    print(type(error).__name__, error)
"""
    assert "use mergekit-yaml" in python(code)


def test_interpreter_start_imports_nothing_but_the_hook() -> None:
    """Of ours: two empty packages and the hook. Of everybody else's: nothing."""
    code = "import sys; print(sorted(n for n in sys.modules if 'upit' in n or 'mergekit' in n))"
    assert python(code) == "['upit_merge', 'upit_merge.plugin', 'upit_merge.plugin.hook']"
    with_hook = python("import sys; print(len(sys.modules))")
    without = python("import sys; print(len(sys.modules))", UPIT_MERGE_DISABLE_PLUGIN="1")
    assert with_hook == without


def test_hook_never_raises_even_if_the_plugin_is_broken() -> None:
    code = """
import sys
sys.modules["upit_merge.plugin.method"] = None
import mergekit.merge
print("mergekit works:", callable(mergekit.merge.run_merge))
"""
    assert python(code) == "mergekit works: True"


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_plugin_can_be_switched_off(disabled: str) -> None:
    code = "import mergekit.merge as m; print(hasattr(m.run_merge, '__wrapped__'))"
    assert python(code, UPIT_MERGE_DISABLE_PLUGIN=disabled) == str(disabled == "0")


def test_other_methods_get_their_arguments_untouched() -> None:
    """Also those that a later mergekit may add to run_merge."""
    code = """
import types
from upit_merge.plugin import method
seen = []
def run_merge(merge_config, out_path, options, config_source=None, *, added=None):
    seen.append((out_path, options, config_source, added))
module = types.ModuleType("merge")
module.run_merge = run_merge
method.extend_run_merge(module)
config = types.SimpleNamespace(merge_method="linear")
module.run_merge(config, "out", None, added=1)
module.run_merge(merge_config=config, out_path="o", options=2, config_source="s")
print(seen)
"""
    assert python(code) == "[('out', None, None, 1), ('o', 2, 's', None)]"
