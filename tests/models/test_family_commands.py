"""What is done to mixtures is done to those of every format: routers, more experts or fewer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family, build_family
from tests.support.commands import done
from tests.support.families import KINDS
from upit_merge.io.tensor_file import TensorSpec


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Family, dict[str, Any]]:
    kind, architecture, settings, parameters = KINDS[request.param]
    family = build_family(tmp_path, kind=kind, noise=0.2, **settings)
    return family, {"architecture": architecture, "parameters": {"seed": 5, **parameters}}


def perplexity(out: Path, data: Path) -> float:
    """By transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    encode, total, count = AutoTokenizer.from_pretrained(out), 0.0, 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([encode(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def test_all_commands(family: tuple[Family, dict[str, Any]], tmp_path: Path, merge: Any) -> None:
    """Merged with a router, verified, evaluated as transformers does, extended, shrunk, routed."""
    models, recipe = family
    data, result = models.seed_file(), tmp_path / "result.json"
    router = {"data": str(data), "refine": {"steps": 2}, "losses": "first_order"}
    recipe["parameters"]["num_experts"] = 4
    out = merge(models.recipe(**recipe, router=router))
    done("verify", out, "--quiet")
    for command in (
        (),
        ("extend", out, "--model", models.base, "--data", data),
        ("shrink", out, "--experts", "3", "--data", data),
        ("router", out, "--data", data, "--objective", "upit", "--losses", "exact"),
    ):
        if command:
            done(*command, "--quiet")
        done("evaluate", out, "--data", data, "--json", result, "--quiet")
        told = json.loads(result.read_text())["groups"]["all"]["perplexity"]
        assert told == pytest.approx(perplexity(out, data), rel=1e-3), command


def test_packed_specs_keep_every_element() -> None:
    """A tensor in several parts is as large as these, and they lie one after the other."""
    from upit_merge.io.tensor_file import StoredSpec
    from upit_merge.models.formats import FORMATS
    from upit_merge.models.published import packed_specs

    form = FORMATS["granitemoe"]
    specs = [
        TensorSpec(form.expert_tensor(1, e, p), shape, torch.float16)
        for p, shape in (("up_proj", (3, 5)), ("down_proj", (5, 3)), ("gate_proj", (3, 5)))
        for e in (1, 0)
    ]
    inputs, outputs = packed_specs(form, specs)
    assert isinstance(inputs, StoredSpec)
    assert isinstance(outputs, StoredSpec)
    assert (inputs.shape, outputs.shape) == ((2, 6, 5), (2, 5, 3))
    order = [(e, p) for e in range(2) for p in ("gate_proj", "up_proj")]
    assert [s.name for s in inputs.parts] == [form.expert_tensor(1, e, p) for e, p in order]
