"""Temperature and experts per token, chosen on seed samples that the gates were not fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from tests.conftest import Family
from tests.support.commands import done
from tests.support.naive import load_model
from upit_merge.config.router import RouterSettings
from upit_merge.report.chosen import chosen_sentences, idle_experts, idle_sentence
from upit_merge.report.tables import show_buckets
from upit_merge.router.buckets import Buckets
from upit_merge.router.held_out import (
    GIVEN,
    OWN,
    TRAINED_FURTHER,
    choosing_sweeps,
    held_out,
    why_nothing_is_chosen,
)
from upit_merge.router.objectives import GateData
from upit_merge.router.sharpness import _Trial

SETTINGS = RouterSettings(data="seed.jsonl")


def buckets(assigned: torch.Tensor) -> Buckets:
    return Buckets(assigned, 3)


def told(out: Path) -> dict:
    return json.loads((out / "upit_report.json").read_text())["router"]["chosen"]


def gates(out: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_model(out).items() if name.endswith("gate.weight")}


def test_a_share_of_every_bucket_is_held_out() -> None:
    assigned = torch.tensor([0] * 60 + [1] * 20 + [2] * 3)
    held = held_out(buckets(assigned), 83, seed=1)
    assert [sum(int(assigned[i]) == b for i in held) for b in range(3)] == [15, 5, 0]
    assert held == held_out(buckets(assigned), 83, seed=1)
    assert held != held_out(buckets(assigned), 83, seed=2)
    assert len(held_out(buckets(torch.zeros(999, dtype=torch.int64)), 999, seed=1)) == 64
    assert held_out(buckets(assigned[:62]), 62, seed=1) == []  # 15 would be


@pytest.mark.parametrize(
    ("settings", "fixed", "reason"),
    [
        ({}, OWN, None),
        ({"temperature": 1.0}, None, None),
        ({"temperature": 1.0}, GIVEN, "temperature and experts per token were given"),
        ({"temperature": 1.0}, OWN, "was given, and the number of experts per token is the mix"),
        ({"temperature": 1.0}, TRAINED_FURTHER, "was given, and for a mixture that is trained"),
        ({"objective": "random"}, None, "random"),
        ({"refine": {"steps": 2}}, None, "refining"),
    ],
)
def test_why_nothing_is_chosen(settings, fixed, reason) -> None:
    words = {"free": True} if fixed is None else {"free": False, "fixed": fixed}
    found = why_nothing_is_chosen(RouterSettings(data="x", **settings), 3, **words)
    assert (found is None) if reason is None else (reason in found)


def test_foretold_sweeps() -> None:
    assert choosing_sweeps(SETTINGS, 3, 40) == 0
    assert 0 < choosing_sweeps(SETTINGS, 3, 1000) < 1


def test_a_fit_without_samples_is_one_to_the_others() -> None:
    inputs = torch.arange(12.0).view(6, 2)
    spans = [slice(0, 2), slice(2, 3), slice(3, 6)]
    data = GateData(inputs, spans, [2, 1, 3], torch.tensor([0, 1, 2]), 3, torch.device("cpu"), 0)
    rest = data.without({1})
    assert rest.inputs.tolist() == inputs[[0, 1, 3, 4, 5]].tolist()
    assert rest.labels.tolist() == [0, 0, 2, 2, 2]
    assert rest.num_tokens == 5


def test_a_given_temperature_is_kept_and_the_chosen_one_given_gives_the_same_gates(
    shared_family: Family, merge
) -> None:
    data = str(shared_family.seed_file(96, "many.jsonl"))
    free = merge(shared_family.recipe(router={"data": data}), "free")
    chosen = told(free)
    assert chosen["held_out"] >= 16
    assert chosen["tried"][0]["temperature"] == 1.0
    assert chosen["tried"][0]["experts_per_token"] == 2
    config = json.loads((free / "config.json").read_text())
    assert config["num_experts_per_tok"] == chosen["experts_per_token"]
    given = shared_family.recipe(
        router={"data": data, "temperature": chosen["temperature"]},
        parameters={"experts_per_token": chosen["experts_per_token"]},
    )
    same = merge(given, "given")
    assert told(same)["reason"] == "temperature and experts per token were given"
    ours = gates(free)
    assert ours
    assert all(torch.equal(ours[name], gate) for name, gate in gates(same).items())
    done("router", str(same), "--data", data, "--temperature", "1")
    own = "the temperature was given, and the number of experts per token is the mixture's own"
    assert told(same)["reason"] == own


def test_what_is_chosen_is_written_and_verified(
    shared_family: Family, tmp_path: Path, monkeypatch
) -> None:
    data = str(shared_family.seed_file(96, "more.jsonl"))
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(shared_family.recipe(router={"data": data})))
    with monkeypatch.context() as patch:
        patch.setattr(_Trial, "_is_better", lambda *_: True)
        done("run", recipe, out)
    assert told(out)["experts_per_token"] == 1
    assert told(out)["temperature"] != 1.0
    config = AutoConfig.from_pretrained(out)
    assert config.num_experts_per_tok == 1
    report = json.loads((out / "upit_report.json").read_text())
    assert report["experts_per_token"] == 1
    done("verify", str(out), "--gates")
    assert "nothing was computed" in done("run", recipe, out).output


def test_too_few_samples_leave_the_defaults(shared_family: Family, merge) -> None:
    out = merge(shared_family.recipe(router={"data": str(shared_family.seed_file())}))
    assert told(out)["temperature"] == 1.0
    assert "too few" in told(out)["reason"]


def setting(temperature: float, count: int, gain: float = 0.0) -> dict:
    found = {"temperature": temperature, "experts_per_token": count}
    return {**found, "gain": gain, "standard_error": 0.002 if gain else 0.0}


@pytest.mark.parametrize(
    ("tried", "was", "best"),
    [
        ([(1, 2), (0.5, 2)], "temperature 1", "temperature 0.5"),
        ([(1, 2), (1, 1)], "2 experts per token", "1 expert per token"),
        (
            [(1, 2), (0.5, 1), (0.5, 2)],
            "2 experts per token at temperature 1",
            "2 experts per token at temperature 0.5",
        ),
    ],
)
def test_sentences_name_what_was_open_and_what_was_gained(tried, was, best) -> None:
    default, *others = (setting(*pair) for pair in tried)
    others[-1] = setting(*tried[-1], 0.01)
    chosen = {**setting(*tried[-1]), "held_out": 20, "tried": [default, *others]}
    assert [*chosen_sentences(chosen)] == [
        f"Chosen on 20 held-out seed samples: {best}; perplexity on them is 1.0% (standard error "
        f"0.2%) lower than with {was}. As they are what it was chosen on, expect a little less "
        "elsewhere."
    ]
    assert [*chosen_sentences({**chosen, **setting(*tried[0])})] == [
        f"Kept on 20 held-out seed samples: {was}; of {len(tried)} settings none was better by "
        "more than noise."
    ]


def test_sentences_of_what_was_not_chosen() -> None:
    chosen = {"temperature": 1.0, "experts_per_token": 2, "held_out": 20}
    (reason,) = chosen_sentences({**chosen, "reason": "there is one expert"})
    assert reason == "2 experts per token at temperature 1, not chosen: there is one expert."
    (one,) = chosen_sentences({**setting(1, 1), "held_out": 20, "tried": [setting(1, 1)]})
    assert one == "With one expert per token the temperature changes nothing, so none was chosen."
    assert [*chosen_sentences({})] == []
    assert [*chosen_sentences({**chosen, "tried": [{"temperature": 1.0}, None]})] == []


def test_experts_hardly_used_are_named_with_what_dropping_them_saves(capsys) -> None:
    chosen = {"shares": [0.6, 0.01, 0.38, 0.01], "expert_bytes": 3_000_000}
    assert idle_experts(chosen) == [1, 3]
    sentence = idle_sentence(chosen, "out", "--data seed.jsonl")
    assert "`upit-merge shrink out --experts 2 --how drop --data seed.jsonl`" in sentence
    assert "experts 1, 3 " in sentence
    assert "save 6 MB" in sentence
    assert idle_sentence({"shares": [0.5, 0.5], "expert_bytes": 1}) == ""
    assert "would save room" in idle_sentence({"shares": chosen["shares"]})
    # The data that the gates were fitted to is known.
    buckets = {"experts": [{"expert": 0, "samples": 1, "loss_own": None, "loss_all": None}]}
    settings = RouterSettings(data="my data.jsonl", sample=20).model_dump(mode="json")
    show_buckets({"buckets": buckets, "chosen": chosen, "settings": settings}, "out")
    told = " ".join(capsys.readouterr().out.split())
    assert 'shrink out --experts 2 --how drop --data "my data.jsonl" --sample 20`' in told
