"""`upit-merge extract`: a dense model that computes what one expert of a mixture does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_family
from tests.support.commands import done, invoke, refused, shrink
from tests.support.families import CASES, GEMMA4, MERGED, QWEN35, Case, logits, made
from tests.support.naive import PROJECTIONS, load_model

COUNT = MERGED["num_experts"]
Tensors = dict[str, torch.Tensor]


def rewritten(out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The same folder, its tensors changed one by one."""
    path = out / "model.safetensors"
    save_file(
        {name: change(name, tensor.clone()) for name, tensor in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    return out


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 3 and len(tensor) == COUNT


def expert_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Every expert by another way, and by much."""
    if is_packed(name, tensor) or ".experts." in name:
        tensor += 0.05 * torch.randn(
            tensor.shape, generator=torch.manual_seed(len(name) + sum(map(ord, name)))
        )
    return tensor


def with_one_for_all(out: Path, folder: Path, experts: list[int]) -> Path:
    """A mixture whose experts are all the mean of these."""
    shutil.copytree(out, folder)
    stored = load_file(out / "model.safetensors")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if is_packed(name, tensor):
            return tensor[experts].mean(0).expand(tensor.shape).clone()
        number = expert_of(name)
        if number is None:
            return tensor
        same = [stored[name.replace(f".experts.{number}.", f".experts.{e}.")] for e in experts]
        return torch.stack(same).mean(0)

    return rewritten(folder, change)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_expert_s_stream_does(case: Case, tmp_path, merge) -> None:
    """As transformers does from both folders; the other one has this expert n times."""
    _, out = made(case, tmp_path / "family", merge)
    rewritten(out, moved)
    done("extract", out, tmp_path / "dense", "--expert", 2, "--quiet")
    expected = logits(with_one_for_all(out, tmp_path / "all", [2]))
    found = logits(tmp_path / "dense")
    assert float((found - expected).abs().max() / expected.abs().max()) < case.tolerance
    # The control: another expert is not it.
    done("extract", out, tmp_path / "other", "--expert", 1, "--quiet")
    other = logits(tmp_path / "other")
    assert float((other - expected).abs().max() / expected.abs().max()) > 10 * case.tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_what_was_never_trained_it_is_the_checkpoint(case: Case, tmp_path, merge) -> None:
    """All tensors, bit by bit, where the family is the same; and `extend` gives the expert back."""
    checkpoint, out = made(case, tmp_path / "family", merge)
    dense = tmp_path / "dense"
    done("extract", out, dense, "--expert", 3, "--quiet")
    old, new = (json.loads((f / "config.json").read_text()) for f in (checkpoint, dense))
    models = [AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (checkpoint, dense)]
    ours, theirs = (model.state_dict() for model in reversed(models))
    if old["model_type"] == new["model_type"] and not case.settings.get("use_double_wide_mlp"):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.allclose(logits(dense), logits(checkpoint), atol=1e-5, rtol=1e-5)
    text = "some <s> text"
    assert AutoTokenizer.from_pretrained(dense)(text) == AutoTokenizer.from_pretrained(out)(text)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.kind in ("llama", "qwen3", "granite", "lfm2", "gemma4_text")],
    ids=str,
)
def test_extended_by_it_a_mixture_has_the_expert_again(case: Case, tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", count=1, kind=case.kind, **case.settings)
    if case.settings.get("hidden_size_per_layer_input"):
        pytest.skip("cannot be computed layer by layer")
    recipe = family.recipe(
        architecture=case.architecture, parameters=MERGED | dict(case.parameters)
    )
    out = rewritten(merge(recipe), moved)
    done("extract", out, tmp_path / "dense", "--expert", 1, "--quiet")
    words = ["--data", family.seed_file(6, "few.jsonl"), "--quiet"]
    done("extend", out, "--model", tmp_path / "dense", *words)
    count = 0
    for name, tensor in load_model(out).items():
        if tensor.ndim == 3 and len(tensor) == COUNT + 1:
            assert torch.equal(tensor[COUNT], tensor[1])
            count += 1
        elif expert_of(name) == COUNT:
            twin = name.replace(f".experts.{COUNT}.", ".experts.1.")
            assert torch.equal(tensor, load_model(out)[twin])
            count += 1
    assert count


@pytest.mark.parametrize("experts", [[], [0, 3]])
def test_the_mean(tmp_path, merge, experts: list[int]) -> None:
    case = Case("qwen2", "glm4_moe", parameters={"shared": "split"})
    _, out = made(case, tmp_path / "family", merge)
    rewritten(out, moved)
    words = [word for expert in experts for word in ("--expert", expert)]
    done("extract", out, tmp_path / "dense", "--average", *words, "--quiet")
    mean = with_one_for_all(out, tmp_path / "all", experts or [0, 1, 2, 3])
    expected = logits(mean)
    assert float((logits(tmp_path / "dense") - expected).abs().max() / expected.abs().max()) < 1e-5
    told = (tmp_path / "dense" / "README.md").read_text()
    assert ("mean of experts 0 and 3" if experts else "mean of all 4 experts") in told


# ---- what has changed since --------------------------------------------------------------------


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("kind", ["qwen2", "ernie4_5"])
def test_a_shared_expert_that_has_learned_comes_along(
    tmp_path, merge, kind: str, dense_layers: int
) -> None:
    """It was nothing; now its neurons count, and dense layers are filled up with zeros."""
    architecture = {"qwen2": "glm4_moe", "ernie4_5": "ernie4_5_moe"}[kind]
    parameters = {"shared": "zero", "dense_layers": dense_layers}
    _, out = made(Case(kind, architecture, {}, parameters), tmp_path / "family", merge)

    def learned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".shared_experts." in name:
            return torch.randn(tensor.shape, generator=torch.manual_seed(len(name))) * 0.1
        return moved(name, tensor)

    rewritten(out, learned)
    done("extract", out, tmp_path / "dense", "--expert", 0, "--quiet")
    expected = logits(with_one_for_all(out, tmp_path / "all", [0]))
    found = logits(tmp_path / "dense")
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert json.loads((tmp_path / "dense/config.json").read_text())["intermediate_size"] == 96


REFUSED = {
    "a gate of the shared expert": (
        Case("qwen3_5_text", "qwen3_5_moe", QWEN35),
        "shared_expert_gate.weight",
        "has model.layers.0.mlp.shared_expert_gate.weight of other values than 0, which no dense "
        "Qwen3.5 can express; its experts cannot be extracted.",
    ),
    "an FFN beside the experts": (
        Case("gemma4_text", "gemma4", GEMMA4),
        "mlp.down_proj.weight",
        "has model.layers.0.mlp.down_proj.weight of other values than 0, which no dense Gemma 4 "
        "can express; its experts cannot be extracted.",
    ),
    "sinks": (
        Case("smollm3", "granitemoe_swa", {"no_rope_layers": [0, 1]}),
        "sinks",
        "has model.layers.0.self_attn.sinks of other values than -10000, which no dense SmolLM3 can "
        "express; its experts cannot be extracted.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_dense_model_computes(tmp_path, merge, name: str) -> None:
    case, changed, told = REFUSED[name]
    _, out = made(case, tmp_path / "family", merge)
    rewritten(out, lambda name, tensor: tensor + 0.5 if name.endswith(changed) else tensor)
    assert refused("extract", out, tmp_path / "dense", "--expert", 0) == f"{out} {told}"
    assert not (tmp_path / "dense").exists()


SETTINGS = {
    "embedding_multiplier": (2.0, "has embedding_multiplier 2, as no dense SmolLM3"),
    "attention_multiplier": (0.5, "has attention_multiplier 0.5, as no dense SmolLM3"),
    "logits_scaling": (3.0, "has logits_scaling 3, as no dense SmolLM3"),
    "sliding_window": (16, "has a window in some layers (sliding_window), as no dense SmolLM3"),
    "layer_rope_theta": ([0, 5.0], "has several rotary bases (layer_rope_theta), as no dense"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_no_dense_model_has(tmp_path, merge, key: str) -> None:
    value, told = SETTINGS[key]
    case = Case("smollm3", "granitemoe_swa", {"no_rope_layers": [0, 1]})
    _, out = made(case, tmp_path / "family", merge)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, key: value}))
    assert told in refused("extract", out, tmp_path / "dense", "--expert", 0)
    assert not (tmp_path / "dense").exists()


def test_biases_and_a_partial_rotary_embedding(tmp_path, merge) -> None:
    """As the published GLM-4.5."""
    _, out = made(Case("qwen2", "glm4_moe"), tmp_path / "family", merge)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "partial_rotary_factor": 0.5}))
    told = refused("extract", out, tmp_path / "dense", "--expert", 0)
    assert "has both attention_bias and partial_rotary_factor, as no dense model; its exp" in told


# ---- the folder --------------------------------------------------------------------------------


def test_what_lies_beside_the_weights(four, moe, tmp_path) -> None:
    """Tokenizer, template, generation settings, a card; several files if they are to be small."""
    (moe / "chat_template.jinja").write_text("{{ messages }}")
    dense = tmp_path / "new" / "dense"
    told = done("extract", moe, dense, "--expert", 1, "--out-shard-size", "50000").stdout
    assert f"Expert 1 of {moe} is in {dense}, a dense Llama.\nNext:\n" in told
    # Other tests may have put such data beside the seed data.
    data = r"(HELD-OUT-DATA|\S+/held-out\.jsonl)"
    assert re.search(f"  upit-merge evaluate {moe} --data {data} --against {dense}\n", told)
    assert len([*dense.glob("model-*.safetensors")]) > 1
    assert (dense / "chat_template.jinja").read_text() == "{{ messages }}"
    for name in ("tokenizer.json", "generation_config.json"):
        assert json.loads((dense / name).read_text()) == json.loads((moe / name).read_text())
    card = (dense / "README.md").read_text()
    assert card.startswith("---\n")
    assert "Expert 1 of the mixture of experts `out`, as a dense Llama model" in card
    assert "Its FFN is that of checkpoint-1000." in card
    assert str(tmp_path) not in card
    found, checkpoint = load_model(dense), load_model(four.checkpoints[1])
    assert found.keys() == checkpoint.keys()
    assert all(torch.equal(found[n], t) for n, t in checkpoint.items() if ".mlp." in n)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert model.generate(torch.tensor([[0, 70, 71]]), max_new_tokens=4).shape[1] > 3
    assert not [path for path in dense.iterdir() if path.name.startswith(".")]
    # What was read is as it was.
    done("verify", moe)


def test_a_mixture_from_elsewhere(tmp_path) -> None:
    """Saved by transformers, without a report, a tokenizer or a card."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.conftest import TINY

    torch.manual_seed(0)
    config = MixtralConfig(**TINY, num_local_experts=3, sliding_window=16)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    done("extract", tmp_path / "moe", tmp_path / "dense", "--expert", 2, "--quiet")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert (dense.config.model_type, dense.config.sliding_window) == ("mistral", 16)
    assert dense.dtype == torch.bfloat16
    for layer, own in zip(moe.model.layers, dense.model.layers, strict=True):
        gate, up = layer.mlp.experts.gate_up_proj[2].chunk(2)
        assert torch.equal(own.mlp.gate_proj.weight, gate)
        assert torch.equal(own.mlp.up_proj.weight, up)
        assert torch.equal(own.mlp.down_proj.weight, layer.mlp.experts.down_proj[2])
    assert "Expert 2 of the mixture" in (tmp_path / "dense" / "README.md").read_text()


def test_bad_words(four, moe, tmp_path) -> None:
    dense = tmp_path / "dense"
    cases: list[tuple[list[object], str]] = [
        ([], "Give --expert N, which one to extract, or --average for the mean of all."),
        (["--expert", 4], f"{moe} has 4 experts, numbered from 0 to 3, so that --expert 4 names"),
        (["--expert", 1, "--expert", 2], "--expert is given 2 times; add --average to extract"),
        (["--average", "--expert", 1, "--expert", 1], "--expert 1 is given twice; name every"),
    ]
    for words, told in cases:
        assert refused("extract", moe, dense, *words).startswith(told)
        assert not dense.exists()
    assert invoke("extract", moe, dense, "--expert", -1).exit_code == 2
    told = refused("extract", moe, moe / "inside", "--expert", 0)
    assert told == f"{moe / 'inside'} is inside the mixture {moe}; choose a folder elsewhere."
    (moe / "used").mkdir()
    (moe / "used" / "notes.txt").touch()
    told = refused("extract", moe, moe / "used", "--expert", 0)
    assert told == f"{moe / 'used'} is inside the mixture {moe}; choose a folder elsewhere."
    # One sentence for whatever is there; no command replaces a dense model.
    for folder, holds in ((four.base, "config.json"), (moe, "README.md")):
        told = refused("extract", moe, folder, "--expert", 0)
        start = f"The output folder {folder} is not empty (it holds {holds}); "
        assert told == f"{start}choose a new folder."
    told = refused("extract", moe, four.base / "config.json", "--expert", 0)
    assert told == f"The output {four.base / 'config.json'} is a file; give a folder."
    told = refused("extract", four.base, dense, "--expert", 0)
    assert "has model_type 'llama'; the router needs a" in told
    told = refused("extract", tmp_path / "none", dense, "--expert", 0)
    assert told.startswith(f"The folder {tmp_path / 'none'} does not exist")
    assert not dense.exists()


def test_what_a_run_that_was_killed_has_left_is_no_obstacle(moe, tmp_path) -> None:
    dense = tmp_path / "dense"
    (dense / ".upit-staging" / "model").mkdir(parents=True)
    (dense / ".upit-lock").touch()
    done("extract", moe, dense, "--expert", 0, "--quiet")
    assert not list(dense.glob(".upit-*"))
    (tmp_path / "other" / ".upit-notes").mkdir(parents=True)
    told = refused("extract", moe, tmp_path / "other", "--expert", 0)
    assert "is not empty (it holds .upit-notes); choose a new folder." in told


def test_weights_that_diverged(tmp_path, merge) -> None:
    _, out = made(Case("llama", "mixtral"), tmp_path / "family", merge)
    rewritten(out, lambda name, tensor: tensor * float("nan") if "w2" in name else tensor)
    told = refused("extract", out, tmp_path / "dense", "--expert", 0, "--quiet")
    assert "has NaN or infinite weights in what becomes model.layers.0.mlp.down_proj" in told
    assert not (tmp_path / "dense").exists()


def test_cut_off_while_files_move(moe, tmp_path, monkeypatch) -> None:
    """What is half there does not load, and the same command ends with all of it."""
    done("extract", moe, tmp_path / "whole", "--expert", 0, "--quiet")
    dense = tmp_path / "dense"

    class CutOff(BaseException):
        pass

    def replace_but_settings(source: Path, target: Path) -> None:
        if Path(target) == dense / "config.json":
            raise CutOff
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", replace_but_settings)
    with pytest.raises(CutOff):
        invoke("extract", moe, dense, "--expert", 0, "--quiet")
    monkeypatch.undo()
    assert not (dense / "config.json").exists()
    done("extract", moe, dense, "--expert", 0, "--quiet")
    found = {path.name: path.read_bytes() for path in dense.iterdir()}
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert found.pop("README.md") == expected.pop("README.md").replace(b"# whole", b"# dense")
    assert found == expected


def test_of_what_was_shrunk(four, moe, tmp_path) -> None:
    done(*shrink(moe, four, 2, "--how", "drop"))
    done("extract", moe, tmp_path / "dense", "--expert", 1, "--quiet")
    record = json.loads((moe / "upit_report.json").read_text())["shrunk"][0]
    checkpoints = [load_model(path) for path in four.checkpoints[:3]]
    dense, moved_on = load_model(tmp_path / "dense"), load_model(moe)
    for layer, row in enumerate(record["groups"]):
        ((old,),) = (row[1],)
        for projection, short in PROJECTIONS.items():
            found = dense[f"model.layers.{layer}.mlp.{projection}.weight"]
            name = f"model.layers.{layer}.block_sparse_moe.experts.1.{short}.weight"
            assert torch.equal(found, moved_on[name])
            if old < 3:
                own = checkpoints[old][f"model.layers.{layer}.mlp.{projection}.weight"]
                assert torch.equal(found, own)
    assert "Its FFN is that of" not in (tmp_path / "dense" / "README.md").read_text()
