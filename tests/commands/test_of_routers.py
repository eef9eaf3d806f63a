"""What a router has of every expert beside its gate, when experts come, go or become one."""

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
from tests.support.commands import done, extend, refused, shrink
from tests.support.families import FORMAT_KINDS
from tests.support.loading import is_gate, load
from tests.support.naive import load_model

PER_EXPERT = ("e_score_correction_bias", "expert_bias", "per_expert_scale")
# All formats that have any, with a dense layer before the mixtures where there can be one.
BIASED = ["glm4_moe, split, dense", "ernie4_5_moe, split, dense", "lfm2_moe"]
KINDS = [*BIASED, "gemma4"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[Family, Path]]:
    """By kind: a family, and its mixture of four; made once, changed by nobody."""
    return {}


@pytest.fixture
def made(originals, tmp_path_factory, tmp_path) -> Callable[[str], tuple[Family, Path]]:
    """What gives, for a kind, a family and a mixture of four with fitted gates, a copy."""

    def copied(kind: str) -> tuple[Family, Path]:
        if kind not in originals:
            dense, architecture, settings, parameters = FORMAT_KINDS[kind]
            family = build_family(tmp_path_factory.mktemp("of"), kind=dense, noise=0.2, **settings)
            router = {"data": str(family.seed_file()), "objective": "ridge"}
            parameters = {"num_experts": 4, **parameters}
            recipe = family.recipe(architecture=architecture, parameters=parameters, router=router)
            out = family.root / "mixture"
            done("run", family.write_recipe(recipe), out, "--quiet")
            originals[kind] = family, out
        family, out = originals[kind]
        return family, shutil.copytree(out, tmp_path / "out")

    return copied


def of_routers(out: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_model(out).items() if n.endswith(PER_EXPERT)}


def set_of_routers(out: Path, values: Any) -> dict[str, torch.Tensor]:
    """Give every expert values of its own, as training does: a function of the name gives them."""
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(PER_EXPERT):
                tensor.copy_(values(name, tensor).reshape(tensor.shape))
        save_file(tensors, path, {"format": "pt"})
    found = of_routers(out)
    assert found
    return found


def trained(name: str, tensor: torch.Tensor) -> torch.Tensor:
    seed = torch.manual_seed(sum(name.encode()))
    return tensor + 0.3 * torch.rand(tensor.shape, generator=seed)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 200, (2, 40), generator=torch.manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def in_memory(out: Path, reference: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of transformers' model of a folder's configuration, with tensors written by hand."""
    shutil.copytree(out, reference)
    for path in reference.glob("model*"):
        path.unlink()
    save_file(tensors, reference / "model.safetensors", {"format": "pt"})
    return logits(load(reference, dtype=torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_experts_keep_theirs_and_the_new_one_has_the_mean(made, tmp_path, kind) -> None:
    family, out = made(kind)
    before = set_of_routers(out, trained)
    done(*extend(out, family))
    after = of_routers(out)
    assert after.keys() == before.keys()
    for name, values in before.items():
        expected = torch.cat([values.flatten(), values.double().mean().float().view(1)])
        assert torch.equal(after[name].flatten()[:4], values.flatten()), name
        torch.testing.assert_close(after[name].flatten(), expected, rtol=1e-6, atol=0)
    written = load_model(out)
    by_hand = {n: t.clone() for n, t in written.items()}
    for name, values in before.items():
        whole = torch.cat([values.flatten(), values.mean().view(1)])
        by_hand[name] = whole.view_as(written[name])
    expected = in_memory(out, tmp_path / "reference", by_hand)
    torch.testing.assert_close(logits(load(out, dtype=torch.float32)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_of_experts_that_become_one_the_mean_is_as_theirs(made, kind) -> None:
    """Weighed by the same shares; and who stays alone keeps every bit."""
    family, out = made(kind)
    before = set_of_routers(out, trained)
    done(*shrink(out, family, 2))
    record = json.loads((out / "upit_report.json").read_text())["shrunk"][-1]
    after = of_routers(out)
    for row, (name, values), shares in zip(
        record["groups"], sorted(before.items()), record["shares"], strict=True
    ):
        values, found = values.flatten().double(), after[name].flatten()
        for members, value in zip(row, found.tolist(), strict=True):
            weights = torch.tensor([shares[member] for member in members], dtype=torch.float64)
            if not weights.sum():
                weights = torch.ones(len(members), dtype=torch.float64)
            expected = float((weights / weights.sum() * values[members]).sum())
            if len(members) == 1:
                assert value == float(values[members[0]])
            # Shares are told with six digits.
            assert value == pytest.approx(expected, abs=1e-5)
    assert any(len(members) > 1 for row in record["groups"] for members in row)


@pytest.mark.parametrize("change", ["extend", "merge"])
@pytest.mark.parametrize("kind", KINDS)
def test_constants_stay_constants(made, kind, change) -> None:
    """To the bit, whatever the shares are."""
    family, out = made(kind)
    before = of_routers(out)
    done(*(extend(out, family) if change == "extend" else shrink(out, family, 3)))
    for name, values in of_routers(out).items():
        assert values.numel() == (5 if change == "extend" else 3)
        assert torch.equal(values, values.flatten()[:1].expand(values.shape))
        assert torch.equal(values.flatten()[0], before[name].flatten()[0]), name


@pytest.mark.parametrize("kind", ["ernie4_5_moe, split, dense", "gemma4"])
def test_of_what_diverged_there_is_no_mean(made, kind) -> None:
    family, out = made(kind)
    set_of_routers(out, lambda _name, tensor: tensor * float("nan"))
    files = sorted(out.iterdir())
    told = refused(*extend(out, family))
    name = next(iter(of_routers(out))).replace("language_model.", "")
    assert told == (
        f"{out} has NaN or infinite values in {name}, of which there is no mean; use a mixture from "
        "before its training diverged."
    )
    assert sorted(out.iterdir()) == files


def to_the_second(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scores are below 1: this bias decides alone."""
    return torch.tensor([0.0, 3.0, 0.0, 0.0]).view_as(tensor)


@pytest.mark.parametrize("change", ["extend", "merge"])
@pytest.mark.parametrize("kind", BIASED)
def test_who_is_chosen_by_a_bias_alone_is_chosen_still(made, kind, change) -> None:
    """With one expert for a token: the logits are those of before, in transformers' own model."""
    family, out = made(kind)
    set_of_routers(out, to_the_second)
    config = json.loads((out / "config.json").read_text())
    config |= {key: 1 for key in ("num_experts_per_tok", "moe_k") if key in config}
    (out / "config.json").write_text(json.dumps(config))
    before = logits(load(out, dtype=torch.float32))
    done(*(extend(out, family) if change == "extend" else shrink(out, family, 3)))
    after = logits(load(out, dtype=torch.float32))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def gates(out: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in sorted(load_model(out).items()) if is_gate(name)]


@pytest.mark.parametrize("kind", BIASED)
def test_a_new_row_is_fitted_to_what_the_biases_leave_it(made, tmp_path, caplog, kind) -> None:
    """They count by their differences alone, and are no constant shift."""
    family, out = made(kind)

    def fitted(name: str, values: Any) -> list[torch.Tensor]:
        copy = shutil.copytree(out, tmp_path / name)
        set_of_routers(copy, values)
        done(*extend(copy, family))
        return gates(copy)

    plain = fitted("plain", lambda _name, tensor: tensor)
    alike = fitted("alike", lambda _name, tensor: tensor + 0.5)
    assert all(torch.equal(one, two) for one, two in zip(plain, alike, strict=True))
    biased = fitted("biased", trained)
    shifted = fitted("shifted", lambda name, tensor: trained(name, tensor) - 0.2)
    for one, two, three in zip(plain, biased, shifted, strict=True):
        assert torch.equal(one[:4], two[:4])
        assert not torch.allclose(one[4], two[4], rtol=1e-3)
        torch.testing.assert_close(two, three, rtol=1e-3, atol=1e-3)
    assert "adds a bias" not in caplog.text


def test_gates_that_are_fitted_anew_beside_biases_are_told_of(made, tmp_path, caplog) -> None:
    family, out = made("lfm2_moe")
    data = ("--data", family.seed_file(), "--quiet")
    told = "adds a bias to what its gates say of each expert (expert_bias, which differ by up to"
    done("router", out, *data, "--objective", "ridge")
    assert "adds a bias" not in caplog.text
    set_of_routers(out, trained)
    commands = {
        "router": ("router", "OUT", *data),
        "extend": ("extend", "OUT", "--model", family.base, "--all-gates", *data),
        "shrink": ("shrink", "OUT", "--experts", 3, "--refit", *data),
    }
    for name, words in commands.items():
        copy = shutil.copytree(out, tmp_path / name)
        caplog.clear()
        done(*(copy if word == "OUT" else word for word in words))
        assert caplog.text.count(told) == 1, name
        assert f"The router of {copy} " in caplog.text
        assert "add --refine-steps to `upit-merge router`" in caplog.text
    caplog.clear()
    done("router", out, *data, "--refine-steps", 2)  # whose loss they are part of
    assert "adds a bias" not in caplog.text
