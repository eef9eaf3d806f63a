"""Gates of copies: the k-means against its definition and naive rounds, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.support.commands import done, refused
from tests.support.gate_data import CPU, labelled_inputs, shares, together
from tests.support.naive import load_model
from upit_merge.router.clustering import kmeans
from upit_merge.router.objectives import GateData

fit = partial(kmeans, seed=0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr("upit_merge.router.objectives.CHUNK_BYTES", 4 * 10 * 100)


def separate(experts: int = 4, tokens: int = 50) -> GateData:
    """Tokens of unlike lengths around a few directions, in samples that mix them."""
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(experts, 10, generator=generator), dim=1)
    kinds = torch.randint(0, experts, (experts * tokens,), generator=generator)
    inputs = centres[kinds] + 0.05 * torch.randn(len(kinds), 10, generator=generator)
    inputs = inputs * torch.rand(len(kinds), 1, generator=generator).add(0.1).mul(30)
    spans = [slice(i * 10, (i + 1) * 10) for i in range(len(kinds) // 10)]
    nobodys = torch.zeros(len(spans), dtype=torch.int64)
    data = GateData(inputs, spans, [10] * len(spans), nobodys, experts, CPU)
    object.__setattr__(data, "kinds", kinds)
    return data


def objective(data: GateData, gate: torch.Tensor) -> float:
    """The mean cosine of a token with the centroid it is nearest to."""
    return float((F.normalize(data.inputs, dim=1) @ gate.T).max(1).values.mean())


def test_clusters_that_lie_apart_are_found_whatever_the_tokens_lengths() -> None:
    data = separate()
    gate = fit(data)
    torch.testing.assert_close(gate.norm(dim=1), torch.ones(4))
    found = F.linear(data.inputs, gate).argmax(1)  # as the router chooses
    kinds = data.kinds
    best = max(
        (torch.tensor(order)[found] == kinds).float().mean() for order in permutations(range(4))
    )
    assert best == 1
    for expert in range(4):  # the definition of a centroid
        mean = F.normalize(data.inputs, dim=1)[found == expert].sum(0)
        torch.testing.assert_close(gate[expert], F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)


def naive_rounds(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    for _ in range(100):
        members = (points @ centroids.T).argmax(1)
        centroids = torch.stack([F.normalize(points[members == k].sum(0), dim=0) for k in range(4)])
    return centroids


def test_it_has_converged_and_is_as_good_as_naive_restarts() -> None:
    """On one cloud: another naive round changes nothing, and no naive start ends 1 % better."""
    data = labelled_inputs()
    points, gate = F.normalize(data.inputs, dim=1), fit(data)
    torch.testing.assert_close(naive_rounds(points, gate), gate, rtol=0.05, atol=0.02)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randperm(len(points), generator=generator)[:4] for _ in range(20)]
    naive = [objective(data, naive_rounds(points, points[start])) for start in starts]
    assert objective(data, gate) > 0.99 * max(naive)  # a local optimum, as any run of it finds
    assert objective(data, gate) > objective(data, points[starts[0]])


def test_deterministic_by_seed_and_layer() -> None:
    data = labelled_inputs()
    assert torch.equal(fit(data), fit(data))
    assert not torch.equal(fit(data), kmeans(data, seed=1))
    assert not torch.equal(fit(data), fit(replace(data, layer=1)))


def test_processes_that_share_the_samples_find_the_same_gate() -> None:
    for data in (labelled_inputs(), separate()):
        found = together(fit, shares(data))
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], fit(data), rtol=1e-3, atol=1e-3)


def test_no_expert_is_left_without_tokens() -> None:
    """Most rows are the same one; and more experts than there are rows still give finite ones."""
    data = separate()
    inputs = data.inputs.clone()
    inputs[:-5] = inputs[0]
    gate = fit(replace(data, inputs=inputs))
    chosen = (F.normalize(inputs, dim=1) @ gate.T).argmax(1)
    assert torch.bincount(chosen, minlength=4).min() > 0
    few = replace(data, inputs=inputs[:2], spans=[slice(0, 2)], lengths=[2], num_experts=5)
    gate = fit(replace(few, assigned=torch.zeros(1, dtype=torch.int64)))
    assert gate.isfinite().all()
    assert gate.shape == (5, 10)


COPIES = {"expansion": "copy", "num_experts": 4}


def test_copies_get_gates_without_any_loss(family, merge, monkeypatch) -> None:
    """From the recipe and from the command line the same, and both say what the gates are."""
    for name in ("losses", "exact_losses"):
        monkeypatch.setattr(f"upit_merge.router.stage.RouterStage.{name}", None)
    seeds = str(family.seed_file())
    models, router = [str(family.base)], {"data": seeds, "objective": "kmeans"}
    document = family.recipe(models=models, parameters=COPIES, router=router)
    recipe = merge(document)
    later = merge(family.recipe(models=models, parameters=COPIES), "later")
    done("router", later, "--data", seeds, "--objective", "kmeans", "--quiet")
    expected = load_model(recipe)
    for name, tensor in load_model(later).items():
        assert torch.equal(tensor, expected[name]), name
    for out in (recipe, later):
        report = json.loads((out / "upit_report.json").read_text())["router"]
        assert "buckets" not in report
        assert "spherical k-means" in (out / "README.md").read_text()
        done("verify", out, "--gates", "--quiet")
        done("page", out)
    moe = AutoModelForCausalLM.from_pretrained(recipe).eval()
    ids = torch.arange(3, 60).unsqueeze(0)
    for logits in moe(ids, output_router_logits=True).router_logits:
        assert len(logits.argmax(-1).unique()) > 1
    message = refused("evaluate", recipe, "--data", seeds, "--control", "--quiet")
    assert "objective: kmeans, which has no control" in message


@pytest.mark.parametrize(
    ("option", "value"), [("assign", "balanced"), ("assign", "column:kind"), ("stream", "expert")]
)
def test_what_needs_experts_samples_is_refused(family, merge, option, value) -> None:
    out = merge(family.recipe())
    words = ("--data", family.seed_file(), "--objective", "kmeans", f"--{option}", value)
    assert f"{option} has no meaning with objective: kmeans" in refused("router", out, *words)


@pytest.mark.parametrize(
    ("parameters", "objective", "told"),
    [
        (COPIES, "one_vs_rest", True),
        (COPIES, "kmeans", False),
        (COPIES, "random", False),
        ({**COPIES, "noise": 0.1}, "one_vs_rest", False),
    ],
)
def test_a_note_says_that_no_loss_tells_copies_apart(
    family, merge, caplog, parameters, objective, told
) -> None:
    router = {"data": str(family.seed_file()), "objective": objective}
    with caplog.at_level("INFO"):
        merge(family.recipe(models=[str(family.base)], parameters=parameters, router=router))
    note = "4 experts are copies of 1 model, and no loss tells copies apart; objective: kmeans"
    assert (note in caplog.text) == told
