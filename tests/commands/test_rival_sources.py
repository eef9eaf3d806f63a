"""What `evaluate` takes for the models that a mixture was made from, and what it does without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from tests.support.commands import done
from tests.support.lora import adapters, with_adapters
from tests.support.seeds import held_out
from upit_merge.commands import rivals

OWN = ["the average of its experts", "random gates"]


@pytest.fixture
def out(family: Family, merge: Callable[..., Path]) -> Path:
    router = {"data": str(family.seed_file())}
    return merge(family.recipe(parameters={"num_experts": 4}, router=router))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return held_out(tmp_path)


def compared(out: Path, data: Path, *words: object) -> tuple[list[str], dict[str, Any]]:
    """The names of what a mixture was compared with, and all that is said of it."""
    file = out.parent / "numbers.json"
    done("evaluate", out, "--data", data, "--no-experts", "--json", file, *words)
    worth = json.loads(file.read_text())["worth"]
    return [rival["name"] for rival in worth["rivals"]], worth


def changed(folder: Path) -> None:
    """Put other weights in a model's place, of the same shapes."""
    path = folder / "model.safetensors"
    torch.manual_seed(1)
    tensors = {n: t + 0.3 * torch.randn_like(t) for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def test_nothing_is_downloaded_because_a_recipe_says_so(
    out: Path, family: Family, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = out / "mergekit_config.yml"
    recipe.write_text(recipe.read_text().replace(str(family.base), "stranger/model"))
    asked = []

    def snapshot(repo: str, **words: Any) -> str:
        asked.append((repo, words["local_files_only"]))
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    names, worth = compared(out, data)
    assert set(asked) == {("stranger/model", True)}
    assert names == OWN
    assert worth["left_out"].startswith("The models that it was made from cannot be opened here")


@pytest.mark.parametrize("which", ["base", "checkpoint", "after shrink"])
def test_other_models_in_their_places_are_not_taken_for_them(
    out: Path, family: Family, data: Path, which: str
) -> None:
    if which == "after shrink":
        done("shrink", out, "--experts", 3, "--data", family.seed_file(), "--quiet")
    assert "the average of the checkpoints" in compared(out, data)[0]
    changed(family.base if which == "base" else family.checkpoints[1])
    names, worth = compared(out, data)
    assert names == OWN
    assert "are not those that it was made from" in worth["left_out"]


def test_the_same_models_with_other_times_are_they(out: Path, family: Family, data: Path) -> None:
    """As after a copy: then the likeness of their deltas decides, which is in the report."""
    before = compared(out, data)[0]
    for folder in (family.base, *family.checkpoints):
        (folder / "model.safetensors").touch()
    names, worth = compared(out, data)
    assert names == before
    assert "left_out" not in worth


@pytest.mark.parametrize("gram", [None, "x", [[1.0]], [[None] * 3] * 3, [[1, 2], [3]]])
def test_a_report_may_say_anything_of_them(
    out: Path, family: Family, data: Path, gram: object
) -> None:
    path = out / "upit_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checkpoint_gram": gram, "run": 1}))
    assert compared(out, data)[0] == OWN


def test_no_path_of_anybodys_disk_is_on_the_card(
    out: Path, family: Family, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def section() -> str:
        done("evaluate", out, "--data", data, "--card", "--quiet")
        return (out / "README.md").read_text().partition("## Evaluation")[2].replace("\\", "")

    assert str(tmp_path) not in (with_sources := section().partition("## Recipe")[0])
    assert "(checkpoint-1500)" in with_sources or "(checkpoint-1000)" in with_sources
    shutil.move(family.root / "sft", tmp_path / "gone")
    without = section().partition("## Recipe")[0]
    assert "cannot be opened here" in without
    assert str(tmp_path) not in without


def test_which_model_is_missing_is_told(
    out: Path, family: Family, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.move(family.root / "sft", tmp_path / "gone")
    with caplog.at_level("INFO"):
        compared(out, data)
    told = [record.message for record in caplog.records if "checkpoint-500" in record.message]
    assert len(told) == 1
    assert "does not exist" in told[0]


def test_trained_experts_are_more_than_their_checkpoints(
    family: Family, merge: Callable[..., Path], data: Path
) -> None:
    upit = {"train_experts": True, "epochs": 1}
    router = {"data": str(family.seed_file(6)), "objective": "upit", "upit": upit}
    names, worth = compared(merge(family.recipe(router=router)), data)
    assert names == OWN
    assert worth["left_out"].startswith("Its experts were trained further, so that its checkpoints")
    assert "saw fewer tokens" in worth["left_out"]


def test_an_added_expert_is_of_no_checkpoint(out: Path, family: Family, data: Path) -> None:
    done("extend", out, "--model", family.checkpoints[0], "--quiet")
    names, worth = compared(out, data)
    assert names == OWN
    assert worth["left_out"].startswith("An expert was added to it later")


def test_random_gates_are_not_compared_with_random_gates(
    family: Family, merge: Callable[..., Path], data: Path
) -> None:
    out = merge(family.recipe())
    assert "random gates" not in compared(out, data)[0]
    done("router", out, "--data", family.seed_file(), "--quiet")
    assert "random gates" in compared(out, data)[0]


def test_whether_they_changed_is_asked_once(
    out: Path, family: Family, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are read for it only where times do not tell, and not if all is known."""
    count = []
    original = rivals.measure_similarity

    def counting(*args: Any, **words: Any) -> torch.Tensor:
        count.append(1)
        return original(*args, **words)

    monkeypatch.setattr(rivals, "measure_similarity", counting)
    compared(out, data)
    assert not count
    (family.base / "model.safetensors").touch()
    compared(out, data)
    compared(out, data)
    assert len(count) == 1


def with_other(folder: Path, part: str, by: float = 0.01) -> None:
    """Change some tensors of a model by little."""
    path = folder / "model.safetensors"
    tensors = {n: t + by * (part in n) for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("backbone", "whose", "part", "is_found"),
    [
        ("last", -1, "self_attn.q_proj", True),
        ("last", -1, "embed_tokens", True),
        ("last", 0, "self_attn.q_proj", False),  # it gave nothing to compare with
        ("average", 0, "input_layernorm", True),
        ("base", "base", "lm_head", True),
    ],
)
def test_what_is_no_ffn_is_compared_with_the_mixture(
    family: Family,
    merge: Callable[..., Path],
    data: Path,
    backbone: str,
    whose: int | str,
    part: str,
    is_found: bool,
) -> None:
    """The likeness of the deltas does not depend on it."""
    out = merge(family.recipe(dtype="bfloat16", parameters={"backbone": backbone}))
    folder = family.base if isinstance(whose, str) else family.checkpoints[whose]
    (folder / "model.safetensors").touch()
    assert "the average of the checkpoints" in compared(out, data)[0]
    with_other(folder, part)
    names, worth = compared(out, data)
    assert ("the average of the checkpoints" in names) != is_found
    assert ("are not those that it was made from" in worth.get("left_out", "")) == is_found


def test_a_shared_expert_is_the_donors_too(
    tmp_path: Path, merge: Callable[..., Path], data: Path
) -> None:
    """Only halves of FFNs are experts, and none of those of the first layer, which is changed."""
    family = build_family(tmp_path / "glm", kind="qwen2", count=2)
    parameters = {"shared": "split", "dense_layers": 1, "shared_from": "average"}
    out = merge(family.recipe(architecture="glm4_moe", parameters=parameters))
    for folder in (family.base, *family.checkpoints):
        (folder / "model.safetensors").touch()
    assert "the average of the checkpoints" in compared(out, data)[0]
    with_other(family.checkpoints[1], "layers.0.mlp.up_proj")
    assert "are not those that it was made from" in compared(out, data)[1]["left_out"]


def test_adapters_that_give_the_backbone(
    family: Family, merge: Callable[..., Path], data: Path
) -> None:
    with_adapters(family)
    out = merge(adapters(family, dtype="bfloat16", parameters={"backbone": "average"}))
    weights = family.root / "lora" / "checkpoint-500" / "adapter_model.safetensors"
    weights.touch()
    names, _worth = compared(out, data)
    assert "the average of the checkpoints" in names
    tensors = {n: t * (1.1 if "q_proj" in n else 1) for n, t in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    assert "are not those that it was made from" in compared(out, data)[1]["left_out"]


def test_checkpoints_of_the_same_name_are_told_apart_as_in_the_table_of_experts(
    family: Family, merge: Callable[..., Path], data: Path
) -> None:
    folders = [family.root / "runs" / name / "checkpoint-120" for name in ("arith", "prose")]
    for source, folder in zip(family.checkpoints, folders, strict=False):
        shutil.copytree(source, folder)
    out = merge(family.recipe(models=[*map(str, folders)]))
    file = out.parent / "numbers.json"
    done("evaluate", out, "--data", data, "--json", file, "--card", "--quiet")
    rivals_of = json.loads(file.read_text())["worth"]["rivals"]
    names = [rival["name"] for rival in rivals_of if rival["kind"] == "single"]
    assert names == [
        "checkpoint 0 (arith/checkpoint-120)",
        "checkpoint 1 (prose/checkpoint-120)",
    ]
    sources = json.loads((out / "upit_report.json").read_text())["sources"]["checkpoints"]
    assert [name.split("(")[1].rstrip(")") for name in names] == [s["name"] for s in sources]
    assert names[1] in (out / "README.md").read_text().replace("\\", "")
