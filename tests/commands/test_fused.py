"""Mixtures under the names of transformers' memory: read as they are, written as published."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import LLAMA3_ROPE, Family, build_family
from tests.support.commands import done, extend, refused, shrink
from tests.support.crash import contents
from tests.support.loading import load
from tests.support.naive import load_model
from upit_merge.models.formats import FORMATS
from upit_merge.models.mixture import inspect_mixture, opened_mixture
from upit_merge.models.published import complete_config

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IDS = torch.arange(3, 43).view(1, -1)
FUSED = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
W3 = "model.layers.0.block_sparse_moe.experts.2.w3.weight"


def fuse(out: Path, folder: Path, *, parts: int = 1) -> Path:
    """Save a mixture by its state dict, as others do, with the settings that transformers 5 writes."""
    model = AutoModelForCausalLM.from_pretrained(out)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if parts == 1:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    else:
        names = {name: f"part-{index % parts}.safetensors" for index, name in enumerate(tensors)}
        for part in {*names.values()}:
            save_file({n: t for n, t in tensors.items() if names[n] == part}, folder / part)
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoTokenizer.from_pretrained(out).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(IDS).logits


@pytest.fixture(params=["llama", "qwen3", "llama tied, scaled rope"])
def pair(request, tmp_path, merge) -> tuple[Family, Path, Path]:
    """A family, a mixture of it, and the same one under fused names."""
    more: dict[str, Any] = {}
    if "tied" in request.param:
        more = {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}
    family = build_family(tmp_path, kind=request.param.split()[0], count=4, **more)
    models = [str(path) for path in family.checkpoints[:3]]
    out = merge(family.recipe(models=models, parameters={"num_experts": 4}), "plain")
    return family, out, fuse(out, tmp_path / "fused", parts=2 if more else 1)


# ---- reading -----------------------------------------------------------------------------------


def test_every_tensor_is_the_published_one(pair) -> None:
    _family, out, fused = pair
    expected = load_model(out)
    assert FUSED in load_model(fused)
    with opened_mixture(fused) as moe:
        assert not moe.is_published
        inspect_mixture(moe)
        assert moe.specs.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(moe.tensor(name), tensor), name
            half = tensor.shape[0] // 2
            assert torch.equal(moe.rows(name, half, half + 1), tensor[half : half + 1])


def test_evaluation_is_that_of_the_published_one(pair, tmp_path) -> None:
    family, out, fused = pair
    before = contents(fused)
    results = []
    for folder in (out, fused):
        path = tmp_path / "result.json"
        done(
            "evaluate",
            folder,
            "--data",
            family.seed_file(),
            "--json",
            path,
            "--no-rivals",
            "--quiet",
        )
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]
    assert contents(fused) == before


def test_averaged_by_mergekit(family, merge, tmp_path) -> None:
    """`linear` of two of our outputs is the mean of their weights, evaluated as transformers does."""
    models = []
    for seed in (1, 2):
        out = merge(family.recipe(parameters={"num_experts": 4, "seed": seed}), f"moe-{seed}")
        models.append({"model": str(out), "parameters": {"weight": 0.5}})
    recipe = tmp_path / "linear.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    mean = tmp_path / "mean"
    result = CliRunner().invoke(mergekit_yaml, [str(recipe), str(mean), "--quiet"])
    assert result.exit_code == 0, result.output
    parts = [load_model(Path(entry["model"])) for entry in models]
    with opened_mixture(mean) as moe:
        assert not moe.is_published
        for name, tensor in parts[0].items():
            torch.testing.assert_close(moe.tensor(name), (tensor + parts[1][name]) / 2)
    data, path = family.seed_file(), tmp_path / "result.json"
    done("evaluate", mean, "--data", data, "--json", path, "--quiet")
    model, encode = load(mean), AutoTokenizer.from_pretrained(mean)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([encode(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = json.loads(path.read_text())["groups"]["all"]["perplexity"]
    assert found == pytest.approx(math.exp(total / count), rel=1e-3)
    done("router", mean, "--data", data, "--quiet")
    assert load_model(mean).keys() == parts[0].keys()


# ---- writing -----------------------------------------------------------------------------------


def assert_published(folder: Path, like: Path) -> None:
    """Insist on names, files and settings that other readers know."""
    assert load_model(folder).keys() == load_model(like).keys()
    assert not list(folder.glob("part-*"))
    assert not [path for path in folder.glob(".upit*") if path.is_dir()]
    config, expected = (json.loads((f / CONFIG).read_text()) for f in (folder, like))
    for key in ("rope_theta", "rope_scaling", "num_experts", "num_local_experts"):
        if expected.get(key) is not None:
            assert config[key] == expected[key], key
    if config["model_type"] == "qwen3_moe":
        assert config["max_window_layers"] == config["num_hidden_layers"]
    load(folder)


@pytest.mark.parametrize("command", ["router", "tuned router", "extend", "shrink"])
def test_commands_write_what_they_write_of_the_published_one(pair, command: str) -> None:
    family, out, fused = pair
    data = ("--data", family.seed_file())
    words = {
        "router": lambda folder: ("router", folder, *data, "--quiet"),
        "tuned router": lambda folder: (
            *("router", folder, *data, "--quiet"),
            *("--objective", "upit", "--upit-train-experts", "--upit-epochs", 1),
        ),
        "extend": lambda folder: extend(folder, family, *data),
        "shrink": lambda folder: shrink(folder, family, 3),
    }[command]
    for folder in (out, fused):
        done(*words(folder))
    assert_published(fused, out)
    expected, found = load_model(out), load_model(fused)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(logits(fused), logits(out), rtol=0, atol=1e-6)


def test_training_writes_published_names(pair, train) -> None:
    _family, out, fused = pair
    plain, other = train(out, "from-plain"), train(fused, "from-fused")
    assert_published(other, plain)
    expected, found = load_model(plain), load_model(other)
    before = load_model(out)
    for name in expected:  # products depend, in the last bits, on where a file puts the weights
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
        assert torch.equal(before[name], expected[name]) or (
            (expected[name] - before[name]).abs().max() > 1e-2  # 100 times what they may be apart
        )


def test_settings_without_names_that_only_one_reader_knows() -> None:
    form = FORMATS["qwen3_moe"]
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "intermediate_size": 8,
        "num_local_experts": 4,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    assert complete_config(config, form) == {
        **config,
        "num_experts": 4,
        "max_window_layers": 3,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    complete = complete_config(config, form)
    assert complete_config(complete, form) == complete
    assert AutoConfig.for_model(**complete).rope_parameters["factor"] == 2.0


# ---- what is no mixture ------------------------------------------------------------------------


def spoil(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


SAYS = "its config.json says [4, 96, 32]; make the model again."
BROKEN: dict[str, tuple[Any, str]] = {
    "flat": (
        lambda t: t.update({FUSED: t[FUSED].flatten(0, 1)}),
        f"has {FUSED} of shape [384, 32], {SAYS}",
    ),
    "odd": (
        lambda t: t.update({FUSED: t[FUSED][:, 1:]}),
        f"has {FUSED} of shape [4, 95, 32], {SAYS}",
    ),
    "empty": (
        lambda t: t.update({FUSED: t[FUSED][:, :, :0]}),
        f"has {FUSED} of shape [4, 96, 0], {SAYS}",
    ),
    "fewer experts": (
        lambda t: t.update({FUSED: t[FUSED][:3]}),
        f"has {FUSED} of shape [3, 96, 32], {SAYS}",
    ),
    "transposed": (
        lambda t: t.update({FUSED: t[FUSED].transpose(1, 2)}),
        f"has {FUSED} of shape [4, 32, 96], {SAYS}",
    ),
    "half": (
        lambda t: t.pop(FUSED),
        f"has {DOWN}, but no {FUSED}; make the model again.",
    ),
    "no gate": (
        lambda t: t.pop("model.layers.1.mlp.gate.weight"),
        "has …, but no model.layers.1.mlp.gate.weight; make the model again.",
    ),
    "a layer too few": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith("model.layers.1.mlp.")],
        "has no tensor model.layers.1.block_sparse_moe.experts.0.w1.weight; the router needs a "
        "complete Mixtral…",
    ),
    "twice": (
        lambda t: t.update({W3: t["lm_head.weight"].clone()}),
        f"has {W3} twice, as …; make the model again.",
    ),
    "odd number": (
        lambda t: t.update({FUSED.replace(".1.", ".01."): t[FUSED].clone()}),
        f"has the tensor {FUSED.replace('.1.', '.01.')}, which a Mixtral has not; …",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(moe, tmp_path, four, name: str) -> None:
    change, sentence = BROKEN[name]
    fused = fuse(moe, tmp_path / "fused")
    spoil(fused, change)
    before = contents(fused)
    told = refused("router", fused, "--data", four.seed_file(), "--quiet")
    start, _, end = sentence.partition("…")
    assert told.startswith(f"{fused} {start}")
    assert told.endswith(end)
    assert contents(fused) == before


def test_dense_names_below_a_mixtral(moe, tmp_path) -> None:
    """What llm-compressor writes: transformers would draw such experts anew."""
    expected = load_model(moe)
    kinds = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed = {}
    for name, tensor in expected.items():
        *front, kind, weight = name.split(".")
        renamed[".".join([*front, kinds.get(kind, kind), weight])] = tensor
    folder = tmp_path / "dense-names"
    folder.mkdir()
    shutil.copyfile(moe / CONFIG, folder / CONFIG)
    save_file(renamed, folder / WEIGHTS)
    with opened_mixture(folder) as other:
        inspect_mixture(other)
        assert all(torch.equal(other.tensor(name), expected[name]) for name in expected)


def test_names_of_a_compiled_mixture(moe, tmp_path, four) -> None:
    """Read without torch.compile's prefix, and written without it."""
    expected = load_model(moe)
    folder = tmp_path / "compiled"
    fuse(moe, folder)
    save_file({f"_orig_mod.{n}": t for n, t in expected.items()}, folder / WEIGHTS)
    data = ("--data", four.seed_file(), "--quiet")
    done("router", moe, *data)
    done("router", folder, *data)
    found, expected = load_model(folder), load_model(moe)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_small_file_names_no_end_of_experts(moe, tmp_path) -> None:
    """Whose config.json promises them, too: what is made of a file stays in proportion to it."""
    many = 20_000
    folder = fuse(moe, tmp_path / "many")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"num_local_experts": many, "intermediate_size": 1, "hidden_size": 1}
    (folder / CONFIG).write_text(json.dumps(config))
    stacks = {FUSED: torch.zeros(many, 2, 1), DOWN: torch.zeros(many, 1, 1)}
    gate = {"model.layers.1.mlp.gate.weight": torch.zeros(many, 1)}
    save_file(stacks | gate, folder / WEIGHTS)
    told = refused("evaluate", folder, "--data", tmp_path / "none.jsonl")
    assert "which are not the matrices of experts; make the model again." in told
