"""Whether experts differ on given data, by numbers made up to be known, and `plan --data`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.commands import done, refused
from tests.support.naive import load_model
from upit_merge.commands.preview import PlannedMixture, checkpoint_losses
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.router import ByColumn, RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.errors import UpitError
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.router.buckets import Buckets, assign_by_loss, by_column, shuffled
from upit_merge.router.pretrain import load_seed_set
from upit_merge.router.router_gain import SampleLosses, measure_router_gain

SAMPLES, EXPERTS, TARGETS = 400, 4, 40


def made_up(skill: float, noise: float = 0.05, seed: int = 0) -> SampleLosses:
    """Expert e is better by `skill` nats on every fourth sample; both halves are noisy."""
    generator = torch.Generator().manual_seed(seed)
    base = 2 + torch.rand(SAMPLES, 1, 1, generator=generator, dtype=torch.float64)
    own = torch.arange(SAMPLES).view(-1, 1) % EXPERTS == torch.arange(EXPERTS)
    halves = base - skill * own.unsqueeze(2).double()
    halves = halves.expand(SAMPLES, EXPERTS, 2) + noise * torch.randn(
        SAMPLES, EXPERTS, 2, generator=generator, dtype=torch.float64
    )
    counts = torch.full((SAMPLES, 2), TARGETS / 2, dtype=torch.float64)
    return SampleLosses(halves * TARGETS / 2, counts)


def test_specialised_experts_differ() -> None:
    worth = measure_router_gain(made_up(skill=0.2))
    # Over the best single expert: the right one, on the three quarters that are not its own.
    assert worth.held_out_gain == pytest.approx(0.15, abs=0.01)
    assert worth.gain > worth.held_out_gain
    assert worth.agreement > 0.9
    assert worth.chance == pytest.approx(0.25, abs=0.03)
    assert worth.verdict().startswith("The experts differ on these samples")
    assert worth.warnings() == []


def test_noise_is_not_sold_as_expertise() -> None:
    worth = measure_router_gain(made_up(skill=0.0))
    assert worth.gain > 0.03  # the best of several noisy numbers always looks better
    assert abs(worth.held_out_gain) < 0.01
    assert worth.agreement == pytest.approx(worth.chance, abs=0.1)
    assert worth.is_noise
    assert worth.verdict().startswith("How the experts differ on these samples is within the noise")
    assert worth.warnings() == [worth.verdict()]


def test_what_is_worse_is_not_called_noise() -> None:
    """Halves that prefer opposite experts, of which one is a little better over all."""
    own = torch.arange(SAMPLES).view(-1, 1) % 2 == torch.arange(2)
    sums = torch.stack([2 - 0.01 * own, 2 - 0.01 * ~own], dim=2).double() * TARGETS / 2
    sums[:, 0] -= 1e-6 * TARGETS
    losses = SampleLosses(sums, torch.full((SAMPLES, 2), TARGETS / 2, dtype=torch.float64))
    worth = measure_router_gain(losses)
    assert worth.is_worse
    assert worth.is_noise
    told = worth.verdict()
    assert told.startswith("Choosing an expert for each sample gains nothing here")
    assert "worse on the other half than expert 0 alone, by 0.0050 ± " in told
    assert "(0.5% of perplexity)" in told
    assert "within the noise" not in told
    assert worth.warnings()[0] == told


def test_small_differences_are_called_small() -> None:
    worth = measure_router_gain(made_up(skill=0.008, noise=0.002))
    assert not worth.is_noise
    assert worth.verdict().startswith("The experts differ little on these samples")


def test_held_out_gain_is_what_a_loop_finds() -> None:
    losses = made_up(skill=0.1, seed=3)
    losses.counts[5, 0] = 0  # a single target: no first half
    gains, same = [], 0
    means = [
        [float(losses.sums[s, e].sum() / losses.counts[s].sum()) for e in range(EXPERTS)]
        for s in range(SAMPLES)
    ]
    best = min(range(EXPERTS), key=lambda e: sum(row[e] for row in means))
    for s in range(SAMPLES):
        if s == 5:
            continue
        a, b = (
            [float(losses.sums[s, e, h] / losses.counts[s, h]) for e in range(4)] for h in (0, 1)
        )
        by_a, by_b = a.index(min(a)), b.index(min(b))
        gains.append((b[best] - b[by_a] + a[best] - a[by_b]) / 2)
        same += by_a == by_b
    worth = measure_router_gain(losses)
    assert worth.best_expert == best
    assert worth.held_out_gain == pytest.approx(sum(gains) / len(gains))
    assert worth.agreement == pytest.approx(same / len(gains))
    deviation = torch.tensor(gains).std().item()
    assert worth.standard_error == pytest.approx(deviation / len(gains) ** 0.5, rel=1e-4)


def test_one_expert_that_takes_nearly_everything_is_told() -> None:
    losses = made_up(skill=0.0)
    losses.sums[: int(0.9 * SAMPLES), 2] -= 20
    (sentence,) = measure_router_gain(losses).warnings()[-1:]
    assert sentence.startswith("Expert 2 is the best one for 9")


@pytest.mark.parametrize(("samples", "experts"), [(1, 3), (5, 1)])
def test_too_little_to_tell(samples: int, experts: int) -> None:
    losses = SampleLosses(torch.rand(samples, experts, 2), torch.ones(samples, 2))
    worth = measure_router_gain(losses)
    assert "too few samples, or experts, to tell how much" in worth.verdict()
    assert json.dumps(worth.to_report(), allow_nan=False)


def test_buckets_say_what_balance_costs() -> None:
    losses = made_up(skill=0.1)
    losses.sums[:, 1] -= 1.0
    lowest, balanced = (assign_by_loss(losses, rule) for rule in ("lowest", "balanced"))
    assert max(balanced.sizes) == SAMPLES // EXPERTS < max(lowest.sizes)
    assert lowest.to_report()["loss_given_up"] == pytest.approx(0)
    given_up = balanced.to_report()["loss_given_up"]
    means = losses.means
    own = means[torch.arange(SAMPLES), balanced.assigned]
    assert given_up == pytest.approx(float((own - means.min(1).values).mean()))
    assert given_up > 0.001


def test_shuffled_buckets_are_equal_and_know_nothing() -> None:
    assigned = shuffled(SAMPLES, EXPERTS, seed=1)
    assert Buckets(assigned, EXPERTS).sizes == [SAMPLES // EXPERTS] * EXPERTS
    own = torch.arange(SAMPLES) % EXPERTS
    assert (assigned == own).double().mean() == pytest.approx(1 / EXPERTS, abs=0.08)
    assert not torch.equal(assigned, shuffled(SAMPLES, EXPERTS, seed=2))


def labelled(*labels: str | int | None) -> list[TokenizedSample]:
    return [TokenizedSample([1, 2], 1, f"line {i}", label) for i, label in enumerate(labels)]


def test_the_data_may_name_the_experts() -> None:
    rule = ByColumn(column="c")
    assert by_column(labelled(2, "0", 1), rule, 3).tolist() == [2, 0, 1]
    rule = ByColumn(column="c", experts={"code": 1, "docs": 0, 7: 2})
    assert by_column(labelled("docs", "code", 7), rule, 3).tolist() == [0, 1, 2]
    read_back = ByColumn.model_validate(json.loads(json.dumps(rule.model_dump(mode="json"))))
    assert by_column(labelled("docs", "code", 7), read_back, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "experts", "sentence"),
    [
        (("code",), None, "line 0 has 'code' in the column `c`, which is no expert's number"),
        ((3,), None, "line 0 belongs to expert 3 by the column `c`, but the experts are numbered"),
        ((0, "x"), {"code": 1}, "line 0 has 0 in the column `c`, which is not among"),
        (("code",), {"code": 9}, "line 0 belongs to expert 9"),
    ],
)
def test_names_of_no_expert_are_refused(labels, experts, sentence: str) -> None:
    with pytest.raises(UpitError, match=sentence.replace("(", r"\(")):
        by_column(labelled(*labels), ByColumn(column="c", experts=experts), 3)


def test_a_wrong_name_is_told_before_the_merge(family, tmp_path) -> None:
    data = tmp_path / "seed.jsonl"
    rows = [{"text": f"sample {i}", "kind": "code" if i < 9 else "cod"} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assign = {"column": "kind", "experts": {"code": 1, 7: 2}}
    recipe = family.write_recipe(family.recipe(router={"data": str(data), "assign": assign}))
    out = tmp_path / "out"
    assert "seed.jsonl line 10 has 'cod' in the column `kind`" in refused(
        "run", recipe, out, "--quiet"
    )
    assert not out.exists()


@pytest.mark.parametrize("backbone", ["last", "average", "base"])
def test_plan_s_losses_are_those_of_dense_models(shared_family, backbone: str) -> None:
    """Every checkpoint's FFN on the recipe's backbone, against transformers in memory."""
    models = [load_model(path) for path in (shared_family.base, *shared_family.checkpoints)]
    wanted = {"last": models[3:], "average": models[1:], "base": models[:1]}[backbone]
    state = {n: sum(m[n] for m in wanted) / len(wanted) for n in wanted[0]}
    recipe = parse_recipe(shared_family.recipe(parameters={"backbone": backbone}))
    settings = RouterSettings(data=str(shared_family.seed_file()))
    with opened(recipe, OpenOptions()) as inputs:
        seeds = load_seed_set(
            settings,
            load_tokenizer(shared_family.base),
            context=64,
            vocab_size=259,
            seed=0,
        )
        losses = checkpoint_losses(inputs, seeds, settings, torch.device("cpu"), quiet=True)
        for name in PlannedMixture(inputs).specs:
            if ".gate." not in name:
                assert PlannedMixture(inputs).tensor(name).isfinite().all()
    dense = AutoModelForCausalLM.from_pretrained(shared_family.base).eval()
    for expert, source in enumerate(models[1:]):
        ffn = {n: t for n, t in source.items() if ".mlp." in n}
        dense.load_state_dict(state | ffn, strict=False)
        for index in (0, 5, 11):
            ids = torch.tensor([seeds.samples[index].input_ids])
            with torch.no_grad():
                expected = dense(ids, labels=ids).loss
            assert losses.means[index, expert].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("router", [None, {"data": "missing.jsonl", "assign": "column: nowhere"}])
def test_plan_tells_whether_it_is_worth_it(family, tmp_path, router) -> None:
    """Checkpoints that are noise around each other; nothing is written."""
    document = family.recipe() if router is None else family.recipe(router=router)
    recipe, seeds = family.write_recipe(document), family.seed_file()
    before = sorted(tmp_path.rglob("*"))
    result = done("plan", recipe, "--data", seeds, "--quiet")
    assert "best for samples" in result.stdout
    assert "average of the checkpoints" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
