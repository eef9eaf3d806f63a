"""`upit-merge verify`: agrees with what a run made, and finds what was changed since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from tests.support.commands import done, invoke, refused
from upit_merge import __version__
from upit_merge.io.text_file import json_text

CHILD = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def made(family: Family, *options: str, **extra: Any) -> Path:
    """The output of a recipe with children; further keys are the recipe's."""
    document = family.recipe(**({"parameters": {"num_experts": 5}} | extra))
    out = family.root / "out"
    done("run", family.write_recipe(document), out, "--quiet", *options)
    return out


def routed(family: Family) -> Path:
    return made(family, router={"data": str(family.seed_file()), "objective": "ridge"})


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ((), {}),
        (("--random-seed", "7"), {}),
        (("--out-shard-size", "50000"), {}),
        (("--no-copy-tokenizer",), {}),
        ((), {"parameters": {}}),  # one pass
        ((), {"dtype": "float16", "chat_template": "chatml"}),
        ((), {"parameters": {"num_experts": 5, "mutation": "compound", "backbone": "average"}}),
    ],
    ids=str,
)
def test_what_a_run_made_is_right(family: Family, options, extra) -> None:
    result = done("verify", made(family, *options, **extra))
    assert "is what its recipe makes of these models" in result.stdout
    assert "differ" not in result.stdout


def test_gates_are_compared_with_their_digest_or_fitted_again(family: Family) -> None:
    out = routed(family)
    assert "as recorded; --gates fits them again" in invoke("verify", out).stdout
    assert "fitted again: the same bits" in invoke("verify", out, "--gates").stdout
    # Gates trained later are those of the report, too.
    options = ("--data", family.seed_file(), "--objective", "one_vs_rest", "--quiet")
    done("router", out, *options)
    assert "fitted again: the same bits" in invoke("verify", out, "--gates").stdout


def test_trained_experts_are_compared_with_their_digests(family: Family) -> None:
    router = {"data": str(family.seed_file()), "objective": "upit"}
    out = made(family, router={**router, "upit": {"train_experts": True, "epochs": 1}})
    for _ in range(2):
        told = invoke("verify", out, "--gates").stdout
        assert "as recorded when they were trained or added" in told
        assert "is what its recipe makes of these models" in told
        # Other gates in front of the same experts.
        options = ("--data", family.seed_file(), "--objective", "hidden", "--quiet")
        done("router", out, *options)
    flip(CHILD)(family)
    assert "expert 4 is not the one the report speaks of" in invoke("verify", out).stderr


def test_refined_gates_are_fitted_again(family: Family) -> None:
    router = {"data": str(family.seed_file()), "refine": {"steps": 2, "tokens": 100}}
    assert "the same bits" in invoke("verify", made(family, router=router), "--gates").stdout


def flip(name: str, folder: str = "out") -> Callable[[Family], None]:
    """Change one bit of one tensor."""

    def change(family: Family) -> None:
        path = family.root / folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, path, {"format": "pt"})

    return change


def drop(name: str, as_name: str | None = None) -> Callable[[Family], None]:
    """Remove a tensor, or give it another name."""

    def change(family: Family) -> None:
        path = family.root / "out" / "model.safetensors"
        tensors = load_file(path)
        tensor = tensors.pop(name)
        if as_name:
            tensors[as_name] = tensor
        save_file(tensors, path, {"format": "pt"})

    return change


def edit(file: str, **changes: Any) -> Callable[[Family], None]:
    def change(family: Family) -> None:
        path = family.root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rewrite(file: str, old: str, new: str) -> Callable[[Family], None]:
    def change(family: Family) -> None:
        path = family.root / file
        path.write_text(path.read_text().replace(old, new))

    return change


def remove(file: str) -> Callable[[Family], None]:
    return lambda family: (family.root / file).unlink()


NOT_WHAT = "is not what its recipe makes of these models: "


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (flip(CHILD), f"{NOT_WHAT}{CHILD} differs;"),
        (flip("model.embed_tokens.weight"), f"{NOT_WHAT}model.embed_tokens.weight differs;"),
        (flip(GATE), f"{NOT_WHAT}the gates are not those the report speaks of;"),
        (drop(CHILD), f"{NOT_WHAT}{CHILD} is missing;"),
        (drop(CHILD, "x"), f"{NOT_WHAT}{CHILD} is missing, and 1 more;"),
        # A checkpoint that was changed makes other experts, perhaps of other parents.
        (flip("model.layers.1.mlp.down_proj.weight", "sft/checkpoint-500"), NOT_WHAT),
        (edit("out/config.json", rope_theta=7.0), f"{NOT_WHAT}config.json differs;"),
        (remove("out/tokenizer.json"), "There is no tokenizer"),
        (rewrite("out/mergekit_config.yml", "num_experts: 5", "num_experts: 4"), NOT_WHAT),
        (rewrite("out/mergekit_config.yml", "checkpoint-1500", "checkpoint-1000"),
         "but its recipe now finds"),
        (remove("out/mergekit_config.yml"), "There is no mergekit_config.yml in"),
        (remove("out/upit_report.json"), "has no upit_report.json"),
        (rewrite("out/upit_report.json", '"seed"', '"sead"'), "has no seed; it is not the report"),
        (remove("sft/checkpoint-500/model.safetensors"), "has no weights"),
    ],
)  # fmt: skip
def test_what_was_changed_is_found(family: Family, change, sentence: str) -> None:
    out = routed(family)
    change(family)
    result = invoke("verify", out, "--gates" if "tokenizer" in sentence else "--quiet")
    assert result.exit_code == 1, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert sentence in error
    assert "Traceback" not in result.output


def test_another_version_is_told(family: Family) -> None:
    out = made(family)
    flip(CHILD)(family)
    rewrite("out/upit_report.json", f'"upit-merge": "{__version__}"', '"upit-merge": "0.0.1"')(
        family
    )
    result = invoke("verify", out)
    assert "these models (it was made by version 0.0.1 of upit-merge): model." in result.stderr


def test_a_recipe_can_be_given(family: Family) -> None:
    out = made(family, "--no-write-model-card")
    assert invoke("verify", out).exit_code == 1
    done("verify", out, "--recipe", family.root / "recipe.yml")


def test_settings_of_an_earlier_version(tmp_path, merge) -> None:
    """Up to 0.5 a Qwen3-MoE had no max_window_layers, and `use_cache` was carried over."""
    family = build_family(tmp_path, kind="qwen3")
    for folder in family.checkpoints:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": False}))
    out = merge(family.recipe())
    path = out / "config.json"
    settings = json.loads(path.read_text())
    assert settings["use_cache"] is True
    assert settings.pop("max_window_layers") == 2
    path.write_text(json_text(settings | {"use_cache": False}))
    done("verify", out, "--quiet")
    path.write_text(json_text(settings | {"use_cache": False, "norm_topk_prob": False}))
    assert "config.json differs" in refused("verify", out, "--quiet")
