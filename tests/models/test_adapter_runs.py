"""Whole runs on LoRA adapters: what PEFT makes of them, without a merged model anywhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralForCausalLM

from tests.conftest import Family
from tests.support.commands import done, invoke
from tests.support.lora import (
    KINDS,
    adapters,
    assert_experts,
    assert_grams,
    dense_grams,
    opened_inputs,
    save_adapter,
    with_adapters,
)
from tests.support.naive import PROJECTIONS, load_model
from upit_merge.merge.passes import measure_similarity
from upit_merge.output import journal as resume
from upit_merge.output.journal import has_progress
from upit_merge.output.staging import STAGING

ROOT = Path(__file__).resolve().parents[2]
CPU = (torch.device("cpu"),)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "rank-stabilised", "replaced modules"])
def test_experts_are_the_merged_adapters(family: Family, merge: Any, kind: str) -> None:
    merged = with_adapters(family, **KINDS[kind])
    out = merge(adapters(family, dtype="float32"))
    assert_experts(out, merged, rtol=0, atol=1e-6)
    moe = load_model(out)
    for name in merged[-1]:  # what the last adapter did to attention and embeddings is kept
        if ".mlp." not in name:
            torch.testing.assert_close(moe[name], merged[-1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["average", "base", "named", "by folder"])
def test_backbone(lora: Any, merge: Any, backbone: str) -> None:
    family, merged = lora
    first, base = family.root / "lora" / "checkpoint-500", load_model(family.base)
    setting = {"named": f"{family.base}+{first}", "by folder": str(first)}.get(backbone, backbone)
    document = family.recipe(
        models=[f"{family.base}+{family.root}/lora/checkpoint-*"], parameters={"backbone": setting}
    )
    moe = load_model(merge(document))
    name = "model.layers.1.self_attn.q_proj.weight"
    average = torch.stack([model[name] for model in merged]).mean(0)
    expected = {"average": average, "base": base[name]}.get(backbone, merged[0][name])
    torch.testing.assert_close(moe[name], expected, rtol=0, atol=1e-6)


def test_adapters_and_checkpoints_in_one_list(lora: Any, merge: Any) -> None:
    family, merged = lora
    first = family.root / "lora" / "checkpoint-500"
    models = [family.checkpoints[0], first, family.checkpoints[1], f"{family.base}+{first}"]
    tensors = [load_model(family.checkpoints[0]), merged[0], load_model(family.checkpoints[1])]
    document = family.recipe(models=list(map(str, models)))
    assert_experts(merge(document), [*tensors, merged[0]], rtol=0, atol=1e-6)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(inputs, CPU, quiet=True)
    assert_grams(gram, dense_grams(load_model(family.base), [*tensors, merged[0]]))


def test_an_adapter_on_another_base(lora: Any, merge: Any) -> None:
    """Deltas are measured against the recipe's base, whatever the adapter was trained on."""
    family, _merged = lora
    other, folder = family.checkpoints[0], family.root / "other-adapter"
    tensors = [save_adapter(other, folder, seed=7), load_model(family.checkpoints[1])]
    document = family.recipe(models=[f"{other}+{folder}", str(family.checkpoints[1])])
    assert_experts(merge(document), tensors, rtol=0, atol=1e-6)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(inputs, CPU, quiet=True)
    assert_grams(gram, dense_grams(load_model(family.base), tensors))


def test_threads_files_and_blocks_do_not_change_a_byte(lora: Any, merge: Any) -> None:
    family, _merged = lora
    document = adapters(family, dtype="bfloat16", parameters={"num_experts": 6})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = load_model(merge(document, "one"))
        torch.set_num_threads(4)
        four = load_model(merge(document, "four", max_shard_bytes=20_000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("upit_merge.merge.blocks._BLOCK_ELEMENTS", {"cpu": 100})
            small = load_model(merge(document, "small"))
    finally:
        torch.set_num_threads(threads)
    for name, tensor in one.items():
        assert torch.equal(four[name], tensor)
        assert torch.equal(small[name], tensor)


def test_a_run_that_failed_goes_on(lora: Any, merge: Any, tmp_path: Path) -> None:
    family, _merged = lora
    document = adapters(family, parameters={"num_experts": 6})
    whole = merge(document, "whole", max_shard_bytes=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_BYTES", 0)
        write, left = resume.Journal.append, [3]

        def full(self: Any, grams: Any, written: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, grams, written)

        patch.setattr(resume.Journal, "append", full)
        with pytest.raises(Exception, match="is full"):
            merge(document, "out", max_shard_bytes=20_000)
    assert has_progress(tmp_path / "out" / STAGING)
    again = merge(document, "out", max_shard_bytes=20_000)
    for path in whole.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_verify_agrees(family: Family) -> None:
    """And tells an adapter that was trained on since."""
    with_adapters(family)
    document = adapters(
        family,
        parameters={"num_experts": 5},
        router={"data": str(family.seed_file()), "objective": "ridge"},
    )
    recipe, out = family.write_recipe(document), family.root / "out"

    done("plan", recipe, out, "--quiet", "--data", family.seed_file())
    done("run", recipe, out, "--quiet")
    verified = done("verify", out)
    assert "differ" not in verified.stdout
    path = family.root / "lora" / "checkpoint-1000" / "adapter_model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    verified = invoke("verify", out)
    assert verified.exit_code == 1
    assert "experts.1." in verified.stderr


def test_mergekit_yaml(lora: Any, merge: Any, tmp_path: Path) -> None:
    """mergekit writes adapters as `BASE+ADAPTER`, too."""
    family, _merged = lora
    document = family.recipe(models=[f"{family.base}+{family.root}/lora/checkpoint-*"])
    recipe, out = family.write_recipe(document, "mergekit.yml"), tmp_path / "by-mergekit"
    result = CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    ours = merge(document)
    assert (out / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert (merge(adapters(family), "plain") / "model.safetensors").read_bytes() == (
        ours / "model.safetensors"
    ).read_bytes()


def test_the_output_loads_and_generates(lora: Any, merge: Any) -> None:
    family, _merged = lora
    document = adapters(
        family, parameters={"num_experts": 5}, router={"data": str(family.seed_file())}
    )
    out = merge(document)
    model, info = MixtralForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(out)("sample 1", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] > 8


_written: set[str] = set()
_watching = False


def _note_written(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event != "open" or not isinstance(args[0], (str, Path)):
        return
    path, mode, flags = args
    if set("wax+") & set(mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
        _written.add(str(Path(path).absolute()))


def test_nothing_is_written_beside_the_output(lora: Any, merge: Any, tmp_path: Path) -> None:
    """No merged model on the disk: what is opened for writing is in `out/`, and no larger."""
    global _watching
    family, _merged = lora
    sys.addaudithook(_note_written)
    document = adapters(family, parameters={"num_experts": 5})
    before = {path for path in family.root.rglob("*") if path.is_file()}
    _watching = True
    try:
        out = merge(document)
    finally:
        _watching = False
    assert any(path.endswith(".safetensors") for path in _written)
    beside = {path for path in _written if not Path(path).is_relative_to(out)}
    assert {path for path in beside if not path.startswith("/dev/")} == set()
    assert {path for path in family.root.rglob("*") if path.is_file()} == before
    weights = {Path(path).name for path in _written if path.endswith((".safetensors", ".bin"))}
    assert weights == {path.name for path in out.glob("*.safetensors")}


# ---- what an adapter's folder gives and what its base does ---------------------------------


def test_tokenizer_settings_and_card(family: Family, merge: Any) -> None:
    """The tokenizer may be the adapter's; settings and what else it has not are the base's."""
    with_adapters(family, 2)
    (family.base / "generation_config.json").write_text('{"temperature": 0.5}')
    last = family.root / "lora" / "checkpoint-1000"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(family.base / name, last / name)
    (last / "chat_template.jinja").write_text("{{ messages }}")
    out = merge(adapters(family))
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1
    card = (out / "README.md").read_text()
    assert "| 1 | checkpoint-1000 |" in card
    (last / "generation_config.json").write_text('{"temperature": 0.7}')
    out = merge(adapters(family), "other")
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.7}'


def test_hub_ids(family: Family, merge: Any, monkeypatch: Any) -> None:
    """A Hub id may turn out to be an adapter; both parts may have a revision."""
    with_adapters(family, 2)
    folders = {
        ("me/base", None): family.base,
        ("me/base", "v1"): family.base,
        ("me/code", None): family.root / "lora" / "checkpoint-500",
        ("me/maths", "r2"): family.root / "lora" / "checkpoint-1000",
    }
    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: Any, **_: Any) -> str:
        asked.append((repo, revision))
        assert "adapter_model.safetensors" in allow_patterns
        return str(folders[repo, revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    out = merge(
        family.recipe(models=["me/code", "me/base@v1+me/maths@r2"]) | {"base_model": "me/base"}
    )
    assert set(asked) == set(folders)
    metadata = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert metadata["base_model"] == ["me/base", "me/code", "me/maths"]
    assert json.loads((out / "upit_report.json").read_text())["checkpoints"] == [
        "me/code",
        "me/base@v1+me/maths@r2",
    ]


def test_unlike_adapters_are_told_once(family: Family, caplog: Any) -> None:
    with_adapters(family, 3)
    save_adapter(family.base, family.root / "lora" / "checkpoint-1000", r=2)
    with opened_inputs(adapters(family)):
        pass
    warnings = [r.getMessage() for r in caplog.records if "differ in" in r.getMessage()]
    assert len(warnings) == 1
    assert "checkpoint-1000 differ in rank (4 and 2)" in warnings[0]


def test_a_checkpoint_in_a_folder_with_a_plus(family: Family, merge: Any) -> None:
    family.checkpoints[0].rename(family.root / "base+sft")
    out = merge(family.recipe(models=[str(family.root / "base+sft")]))
    assert_experts(out, [load_model(family.root / "base+sft")], rtol=0, atol=0)


# ---- the recipe ----------------------------------------------------------------------------


def test_self_moe(family: Family, merge: Any, monkeypatch: Any) -> None:
    """recipes/self-moe.yml on tiny models: base + scale · B @ A, and the base's everything else."""
    for seed, name in enumerate(("code", "maths", "prose")):
        save_adapter(family.base, family.root / "adapters" / name, seed=seed)
    family.seed_file()
    monkeypatch.chdir(family.root)
    document = yaml.safe_load((ROOT / "recipes" / "self-moe.yml").read_text())
    assert document["parameters"]["backbone"] == "base"
    out = merge(document | {"dtype": "float32"})
    base, moe = load_model(family.base), load_model(out)
    for index, name in enumerate(("code", "maths", "prose")):
        factors = load_file(family.root / "adapters" / name / "adapter_model.safetensors")
        for layer in range(2):
            for projection, short in PROJECTIONS.items():
                module = f"model.layers.{layer}.mlp.{projection}"
                b, a = (factors[f"base_model.model.{module}.lora_{f}.weight"].numpy() for f in "BA")
                expected = base[f"{module}.weight"].numpy() + 6 / 4 * (b @ a)
                ours = moe[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{short}.weight"]
                torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-6)
    for name in base:
        assert ".mlp." in name or torch.equal(moe[name], base[name])
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
