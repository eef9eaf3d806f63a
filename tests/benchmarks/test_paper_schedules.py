"""How benchmarks.paper trains mixtures further: every schedule does what its fields say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.paper import head_start
from benchmarks.paper.arms import UPIT, UPIT_ARM
from benchmarks.paper.head_start import (
    HEAD_START,
    NAME,
    SCHEDULES,
    final_jobs,
    head_start_tables,
    on_the_way,
    tried_jobs,
)
from benchmarks.paper.scales import SCALES
from benchmarks.paper.schedules import (
    SMALLEST_SHARE,
    Schedule,
    adamw_by_part,
    balance_towards,
    natural_shares,
)
from benchmarks.paper.tables import marks, replace_section
from benchmarks.paper.training import train
from upit_merge.demo.training import adamw, learning_rate_cycle
from upit_merge.io.text_file import write_json
from upit_merge.training.routing import load_balancing_loss

STEPS = 8
ROWS = torch.randint(0, 60, (4 * STEPS, 16), generator=torch.Generator().manual_seed(0))


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return MixtralForCausalLM(config)


def part_of(name: str) -> str:
    return "gates" if ".gate." in name else "experts" if ".mlp." in name else "backbone"


def moved(schedule: Schedule, steps: int = STEPS) -> dict[str, float]:
    """By how much training moves each part of the mixture in the first steps of so many."""
    model = mixture()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    seen: dict[str, float] = {}

    def look(step: int, _steps: int) -> None:
        if step == steps:
            for name, weight in model.named_parameters():
                change = (weight - before[name]).abs().max().item()
                seen[part_of(name)] = max(change, seen.get(part_of(name), 0.0))

    train(model, ROWS, 4, schedule.peaks(1e-3), balance=0.01, schedule=schedule, after_step=look)
    return seen


def test_the_default_is_how_arms_were_trained_before_there_were_schedules() -> None:
    trained = []
    for schedule in (None, Schedule()):
        model = mixture()
        peaks = [1e-3] * (2 if schedule is None else 3)
        train(model, ROWS, 4, peaks, balance=0.01, schedule=schedule)
        trained.append(model.state_dict())
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())
    rates = [Schedule().rate(step, 192) for step in range(192)]
    assert rates == [learning_rate_cycle(step, 192) for step in range(192)]


def test_a_warm_up_rises_to_the_peak_and_a_cosine_falls_from_there() -> None:
    rates = [Schedule(warmup=0.25).rate(step, 16) for step in range(16)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[10] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_what_is_frozen_does_not_move_and_moves_later() -> None:
    everything = moved(Schedule(), 2)
    assert min(everything.values()) > 0
    for schedule, still in (
        (Schedule(gates_frozen=0.25), {"gates"}),
        (Schedule(others_frozen=0.25), {"experts", "backbone"}),
    ):
        first = moved(schedule, 2)
        assert {part for part, change in first.items() if change == 0} == still
        assert min(moved(schedule).values()) > 0
    assert moved(Schedule(gates_frozen=1.0))["gates"] == 0


def test_a_part_has_the_rate_that_it_is_given() -> None:
    optimizer = adamw_by_part(mixture())
    names = {id(weight): part_of(name) for name, weight in mixture().named_parameters()}
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert Schedule(gates=0.5, experts=0.25).peaks(4.0) == [2.0, 1.0, 4.0]
    # Adam's first step is as long as the rate, whatever the gradient.
    whole, slower = moved(Schedule(), 1), moved(Schedule(experts=0.25), 1)
    assert slower["experts"] == pytest.approx(whole["experts"] / 4, rel=0.05)
    assert slower["backbone"] == whole["backbone"]


def test_the_balance_weight_grows_over_its_ramp() -> None:
    ramped = Schedule(balance=2.0, balance_ramp=0.5)
    assert [ramped.balance_weight(step, 8) for step in (0, 1, 4, 7)] == [0.0, 0.5, 2.0, 2.0]
    assert Schedule().balance_weight(0, 8) == 1.0
    assert Schedule(balance=0.0).balance_weight(5, 8) == 0.0


def test_balancing_towards_even_shares_is_the_loss_of_finetune() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(40, 4, generator=generator) for _ in range(3)]
    even = [torch.full((4,), 0.25)] * 3
    expected = load_balancing_loss(logits, 2)
    assert balance_towards(even, logits, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_balance_pulls_nowhere_at_the_natural_shares() -> None:
    share = torch.tensor([0.375, 0.125, 0.25, 0.25])
    # Eight tokens, each sent to two experts alike, every expert as often as its share says.
    pairs = [(0, 2), (0, 2), (0, 3), (0, 3), (0, 1), (0, 1), (2, 3), (2, 3)]
    logits = torch.full((8, 4), -30.0)
    for row, pair in zip(logits, pairs, strict=True):
        row[list(pair)] = 0.0
    pulls = {}
    for name, target in (("natural", share), ("uniform", torch.full((4,), 0.25))):
        free = logits.clone().requires_grad_()
        balance_towards([target], [free], 2).backward()
        assert free.grad is not None
        pulls[name] = free.grad.abs().max().item()
    assert pulls["natural"] < 1e-6
    assert pulls["uniform"] > 0.01


def test_natural_shares_are_those_of_the_gates_as_they_are() -> None:
    model = mixture()
    with torch.no_grad():  # nobody is sent to the last expert of the first layer
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[0] *= 50
    shares = natural_shares(model, ROWS, 5)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, outputs: seen.append(outputs[-1]))
    with torch.no_grad():
        model(input_ids=ROWS)
    for share, chosen in zip(shares, seen, strict=True):
        counted = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        counted = counted.clamp_min(SMALLEST_SHARE / 4)
        assert share.tolist() == pytest.approx((counted / counted.sum()).tolist())
    natural = Schedule(balance=100.0, balance_target="natural")
    assert moved(natural)["gates"] != moved(Schedule(balance=100.0))["gates"]


def test_dense_models_have_no_gates_and_are_trained_alike() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=1, num_key_value_heads=1, **shape)
    trained = []
    for schedule in (None, Schedule()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = adamw(model) if schedule is None else adamw_by_part(model)
        peaks = [1e-3] * len(optimizer.param_groups)
        train(model, ROWS, 4, peaks, schedule=schedule, optimizer=optimizer)
        trained.append(model.state_dict())
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


# ---- what is tried, and its tables -------------------------------------------------------------


def test_every_schedule_differs_in_something_and_starts_from_one_mixture() -> None:
    assert len({*SCHEDULES.values(), Schedule()}) == len(SCHEDULES) + 1
    assert {arm.kept for arm in HEAD_START} == {UPIT}
    assert {(arm.checkpoints, arm.start, *arm.parameters.items()) for arm in HEAD_START} == {
        (UPIT_ARM.checkpoints, UPIT_ARM.start, *UPIT_ARM.parameters.items())
    }
    assert {*head_start.CHOSEN} <= SCHEDULES.keys()
    rates = [job.rate for job in tried_jobs(SCALES["cpu"]) if job.name.startswith(f"{UPIT},")]
    assert rates == [1e-3, 2e-3, 4e-3]


def test_the_mean_on_the_way_is_the_area_under_the_curve() -> None:
    curve = [(0.0, [2.0, 8.0]), (0.5, [4.0, 4.0]), (1.0, [1.0, 1.0])]  # 4, 4, 1
    assert on_the_way({"curve": curve}) == pytest.approx(math.exp(0.75 * math.log(4)))


def test_tables_have_what_is_there_and_replace_their_own_section(tmp_path: Path) -> None:
    scale = replace(SCALES["quick"], name="quick")
    curve = [(share, [20.0, 30.0]) for share in (0.0, *head_start.CURVE, 1.0)]
    assert head_start_tables(tmp_path, scale, [0, 1]) == []
    for job in (*tried_jobs(scale)[2:4], *final_jobs([0, 1])):
        path = job.result_file(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lower = 1.0 if job.name == UPIT else 1.1
        result = {"curve": curve, "perplexity": [20 * lower + job.seed], "exact_match": 0.25}
        write_json(path, result)
    tried, final = head_start_tables(tmp_path, scale, [0, 1])
    assert [row[0] for row in tried.rows] == [job.name for job in tried_jobs(scale)[2:4]]
    assert all(len(row) == len(tried.columns) for row in tried.rows)
    assert all(len(row) == len(final.columns) for row in final.rows)
    dense, ours = (
        next(row for row in final.rows if row[0] == arm) for arm in (head_start.DENSE, UPIT)
    )
    gain = 100 * math.log(1.1 * 20 / 20), 100 * math.log((22 + 1) / (20 + 1))
    assert dense[-3].endswith(f", worse (+{gain[0]:.2f} / +{gain[1]:.2f})")
    assert dense[-4].endswith(", no difference seen (+0.00 / +0.00)")  # the curves are the same
    assert dense[-2] == ""
    assert ours[-2].endswith(f", better (-{gain[0]:.2f} / -{gain[1]:.2f})")
    begin, end = marks(NAME)
    page = tmp_path / "README.md"
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    replace_section(page, NAME, [tried, final])
    text = page.read_text()
    assert text.startswith(f"above\n{begin}\n\nSchedules tried")
    assert text.endswith(f"{end}\nbelow\n")
    assert "old" not in text
