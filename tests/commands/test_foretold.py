"""`plan` and a run that begins say how long the router will take, and what would be faster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import Family, build_family
from tests.support.commands import done
from upit_merge.commands import foretell
from upit_merge.config.router import RouterSettings
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.effort import (
    Effort,
    LayerTime,
    StageSweeps,
    foretold_seconds,
    stage_sweeps,
    time_layer,
    told_duration,
)
from upit_merge.router.pretrain import computed_mixture, pretrain_router, seed_set_for
from upit_merge.router.stage import RouterStage

TRAINED = {"objective": "upit", "upit": {"train_experts": True, "epochs": 2}}


@pytest.mark.parametrize(
    ("settings", "experts", "sweeps"),
    [
        ({}, 8, StageSweeps(8, 1)),
        ({"assign": "balanced"}, 4, StageSweeps(4, 1)),
        ({"assign": {"column": "domain"}}, 8, StageSweeps(0, 1)),
        ({"assign": "shuffled", "stream": "expert"}, 8, StageSweeps(0, 1)),
        ({"objective": "random"}, 8, StageSweeps(0, 0, fits=False)),
        ({}, 1, StageSweeps(0, 0, fits=False)),
        (TRAINED, 4, StageSweeps(4, 0, tuning=8, fits=False)),
        (TRAINED, 1, StageSweeps(1, 0, tuning=8, fits=False)),
        # 10 steps of 500 of the 1,000 tokens, three times; of all tokens if there are fewer.
        ({"refine": {"steps": 10, "tokens": 500}}, 2, StageSweeps(2, 1, refining=15)),
        ({"refine": {"steps": 10, "tokens": 5000}}, 2, StageSweeps(2, 1, refining=30)),
    ],
)
def test_how_often_a_stage_sweeps(settings, experts, sweeps) -> None:
    assert stage_sweeps(RouterSettings(data="-", **settings), experts, [100] * 10) == sweeps


def test_losses_to_first_order_show_what_the_gates_see() -> None:
    """32 control samples under 8 experts; a sweep of the samples' own experts is one more."""
    open_settings = RouterSettings(data="-")  # four of the mixture over 64 held-out samples, too
    assert stage_sweeps(open_settings, 8, [50] * 1000) == StageSweeps(4.456, 0, refining=0.256)
    settings = RouterSettings(data="-", temperature=1.0)
    assert stage_sweeps(settings, 8, [50] * 1000) == StageSweeps(4.2 + 0.256, 0)
    own = settings.model_copy(update={"stream": "expert"})
    assert stage_sweeps(own, 64, [50] * 1000) == StageSweeps(4.2 + 0.256, 1)
    exact = settings.model_copy(update={"losses": "exact"})
    assert stage_sweeps(exact, 8, [50] * 1000) == StageSweeps(8, 1)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "1 s"), (42, "42 s"), (720, "12 min"), (9000, "2.5 h"), (700_000, "8 days")],
)
def test_durations(seconds, told) -> None:
    assert told_duration(seconds) == told


def plan(family: Family, *words: object, **router: object) -> str:
    document = family.recipe(**({"router": router} if router else {}))
    return " ".join(done("plan", str(family.write_recipe(document)), *words).output.split())


def test_plan_says_how_long(shared_family) -> None:
    told = plan(shared_family, data=str(shared_family.seed_file()))
    assert re.search(r"Router: about \d+ s on this machine \(24 samples, 4 sweeps\)\.", told)
    assert "assign" not in told.split("Router: ")[1]
    told = plan(shared_family, data=str(shared_family.seed_file()), objective="random")
    assert "Router: no time; nothing is fitted." in told


def test_plan_says_what_will_be_chosen(shared_family) -> None:
    data = str(shared_family.seed_file(70))
    told = plan(shared_family, data=data)
    assert (
        "a quarter is held out, at most 64, to choose temperature and experts per token on" in told
    )
    given = plan(shared_family, data=data, temperature=1.0)
    assert "to choose experts per token on" in given
    assert "to choose" not in plan(shared_family, data=data, objective="random")


def test_plan_says_what_a_recipe_without_a_router_gets(shared_family) -> None:
    sentence = "Router: none, as the recipe has no router: block."
    assert sentence in plan(shared_family)
    told = plan(shared_family, "--data", shared_family.seed_file(), "--quiet")
    assert sentence in told
    assert "router: {data:" in told
    assert sentence not in plan(shared_family, data=str(shared_family.seed_file()))


def test_a_slow_stage_is_told_of_the_column(shared_family, monkeypatch) -> None:
    monkeypatch.setattr(foretell, "time_layer", lambda *_: LayerTime(2.0, 0.0, 0.0))
    data = str(shared_family.seed_file())
    told = plan(shared_family, data=data)
    assert re.search(r"Router: about [\d.]+ (min|h) on this machine", told)
    assert "assign: {column: NAME}" in told
    # Nothing to save where none are computed.
    assert "assign: {" not in plan(shared_family, data=data, assign="shuffled")


def test_a_run_says_it_too(shared_family, merge, monkeypatch, capsys) -> None:
    data = str(shared_family.seed_file())
    out = merge(shared_family.recipe())
    words = ("router", str(out), "--data", data)
    assert "Router: about" not in done(*words).output  # it takes a second
    monkeypatch.setattr(foretell, "_WORTH_TELLING", 0.0)
    assert "Router: about" in done(*words, "--seed", "1").output
    assert "Router: about" not in done(*words, "--seed", "2", "--quiet").output
    recipe = shared_family.write_recipe(shared_family.recipe(router={"data": data}))
    assert "Router: about" in done("run", str(recipe), str(out.parent / "run")).output


def test_the_time_foretold_is_the_time_taken(tmp_path: Path, merge) -> None:
    """Of the same order, whatever else the machine does; three tries. By how much: benchmarks."""
    family = build_family(
        tmp_path / "family", hidden_size=256, intermediate_size=768, num_hidden_layers=4
    )
    out = merge(family.recipe())
    data = str(family.seed_file(200))
    found = []
    for trial in range(3):
        settings = RouterSettings(data=data, temperature=1 + trial)
        with opened_mixture(out) as moe:
            model = computed_mixture(moe, torch.device("cpu"), settings)
            seeds = seed_set_for(model, out, settings, 0)
            stage = RouterStage(model, seeds, settings, 0, tmp_path, quiet=True)
            timed = time_layer(model, seeds.samples, settings.batch_tokens)
            sweeps = stage_sweeps(settings, 3, stage.lengths)
            effort = Effort.of_model(model, settings, sum(stage.lengths))
            foretold = foretold_seconds(timed, effort, sweeps, seeds.samples, 4)
            report = pretrain_router(stage).report
        found.append(foretold / (report["seconds"]["losses"] + report["seconds"]["gates"]))
        if 1 / 4 < found[-1] < 4:
            break
    assert 1 / 4 < found[-1] < 4, found
