"""What becomes of too many and too few checkpoints, judged by brute force over explicit vectors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from tests.conftest import Family, build_family
from tests.support.commands import done, invoke
from tests.support.grams import plan, random_gram
from tests.support.naive import PROJECTIONS, load_model, unlike_grown
from upit_merge.config.recipe import Parameters
from upit_merge.merge.growth import needs_gram
from upit_merge.merge.selection import merge_similar

Vectors = np.ndarray


def vectors(count: int, seed: int = 0, width: int = 40) -> Vectors:
    """Directions that share a part, with different lengths, as deltas of one run do."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(count, width)) + 2 * generator.normal(size=width)
    return points * generator.uniform(0.5, 2, size=(count, 1))


def gram_of(points: Vectors) -> torch.Tensor:
    return torch.from_numpy(points @ points.T).unsqueeze(0)


def distance(similarity: str) -> Callable[[Vectors, Vectors], float]:
    if similarity == "l2":
        return lambda a, b: float(np.sum((a - b) ** 2))
    return lambda a, b: float(1 - a @ b / np.sqrt((a @ a) * (b @ b)))


def nearest(child: Vectors, experts: Vectors, similarity: str) -> float:
    return min(distance(similarity)(child, expert) for expert in experts)


# ---- farthest_child ------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.9, 0.1])
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_farthest_child_is_the_best_of_all(count: int, similarity: str, density: float) -> None:
    """Every round against all pairs and shares; DARE's noise has no part in it."""
    points = vectors(count, seed=count)
    lineage = plan(
        gram_of(points), count + 6, density, parents="farthest_child", similarity=similarity
    )
    grown = list(points)
    for expert in lineage.experts[count:]:
        best = max(
            nearest(k / 64 * a + (1 - k / 64) * b, np.array(grown), similarity)
            for a, b in combinations(grown, 2)
            for k in range(1, 64)
        )
        first, second = expert.parents
        grown.append(expert.alpha * grown[first] + (1 - expert.alpha) * grown[second])
        assert nearest(grown[-1], np.array(grown[:-1]), similarity) == pytest.approx(best, rel=1e-6)
        assert np.allclose(np.array(expert.weights) @ points, grown[-1])


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_farthest_child_of_compounding_parents(similarity: str) -> None:
    """From the planned Gram matrix, in which parents have the noise that they pass on."""
    lineage = plan(
        random_gram(4),
        10,
        0.4,
        parents="farthest_child",
        similarity=similarity,
        mutation="compound",
    )
    gram = lineage.gram.numpy()
    for size in range(4, 10):

        def score(a: int, b: int, alpha: float, size: int = size) -> float:
            beta = 1 - alpha
            own = alpha**2 * gram[a, a] + beta**2 * gram[b, b] + 2 * alpha * beta * gram[a, b]
            cross = alpha * gram[a, :size] + beta * gram[b, :size]
            norms = gram.diagonal()[:size]
            if similarity == "cosine":
                return float((1 - cross / np.sqrt(own * norms)).min())
            return float((own + norms - 2 * cross).min())

        best = max(
            score(a, b, k / 64) for a, b in combinations(range(size), 2) for k in range(1, 64)
        )
        expert = lineage.experts[size]
        assert score(*expert.parents, expert.alpha) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_the_farthest_child_of_two_lies_in_the_middle(similarity: str) -> None:
    points = np.eye(2, 6)
    only = plan(gram_of(points), 3, 0.5, parents="farthest_child", similarity=similarity)
    assert (only.experts[2].parents, only.experts[2].alpha) == ((0, 1), 0.5)


def test_farthest_child_s_shares_are_exact() -> None:
    lineage = plan(gram_of(vectors(3)), 8, parents="farthest_child")
    genomes = [[Fraction(w) for w in expert.weights] for expert in lineage.experts]
    for expert, genome in zip(lineage.experts, genomes, strict=True):
        if expert.parents:
            alpha = Fraction(expert.alpha)
            assert (alpha * 64).denominator == 1
            a, b = (genomes[parent] for parent in expert.parents)
            assert genome == [alpha * x + (1 - alpha) * y for x, y in zip(a, b, strict=True)]
        assert sum(genome) == 1


def test_rounding_does_not_choose_the_farthest_child() -> None:
    """Symmetric checkpoints: everything ties, and rounding of another machine changes nothing."""
    gram = torch.eye(4, dtype=torch.float64).unsqueeze(0) * 3
    expected = plan(gram, 12, parents="farthest_child").experts
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noise = torch.randn(gram.shape, generator=generator, dtype=torch.float64) * 1e-14
        shaken = gram * (1 + noise + noise.mT)
        assert plan(shaken, 12, parents="farthest_child").experts == expected
    assert expected[4].parents == (0, 1)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_degenerate_checkpoints_still_have_children(similarity: str) -> None:
    """Equal ones, ones that are the base, and opposite ones, whose mixture may be nothing."""
    for points in (np.ones((3, 4)), np.zeros((3, 4)), np.diag([1.0, 0, 0]), [[1.0], [-1.0]]):
        gram = gram_of(np.array(points))
        lineage = plan(gram, 6, parents="farthest_child", similarity=similarity)
        assert len(lineage) == 6
        assert lineage.gram.isfinite().all()


def test_farthest_child_spreads_the_experts_more() -> None:
    """What it is for: genomes farther apart than those of the other rules."""

    def smallest(rule: str, seed: int) -> float:
        points = vectors(4, seed)
        experts = plan(gram_of(points), 10, 1.0, parents=rule, similarity="l2", seed=seed).experts
        grown = np.array([expert.weights for expert in experts]) @ points
        return min(distance("l2")(a, b) for a, b in combinations(grown, 2))

    for rule in ("most_dissimilar", "random"):
        ratios = [smallest("farthest_child", seed) / smallest(rule, seed) for seed in range(8)]
        assert np.exp(np.mean(np.log(ratios))) > 1.5


# ---- more checkpoints than experts ---------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 7, 9])
def test_merge_similar_by_distance_is_centroid_linkage(count: int) -> None:
    for seed in range(10):
        points = vectors(9, seed)
        tree = linkage(points, method="centroid")
        groups = merge_similar(gram_of(points)[0], count, "l2")
        # Centroid linkage need not be monotonic, so its tree is cut by merges, not by height.
        tree[:, 2] = np.arange(len(tree))
        labels = fcluster(tree, len(tree) - 0.5 - (count - 1), criterion="distance")
        expected = {frozenset(np.flatnonzero(labels == label)) for label in labels}
        assert {frozenset(group) for group in groups} == expected
        assert [group[0] for group in groups] == sorted(min(group) for group in groups)


def test_merge_similar_by_cosine_compares_the_means_of_vectors() -> None:
    for seed in range(10):
        points = vectors(8, seed)
        groups = [[i] for i in range(8)]
        while len(groups) > 3:
            means = [points[group].mean(0) for group in groups]
            a, b = min(
                combinations(range(len(groups)), 2),
                key=lambda pair: distance("cosine")(means[pair[0]], means[pair[1]]),
            )
            groups[a] = sorted(groups[a] + groups.pop(b))
        assert merge_similar(gram_of(points)[0], 3, "cosine") == groups


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_averages_are_written_without_masks(tmp_path, merge, dtype: str, mutation: str) -> None:
    family = build_family(tmp_path, count=5, dtype=getattr(torch, dtype))
    parameters = {"num_experts": 2, "select": "merge_similar", "mutation": mutation}
    out = merge(family.recipe(parameters=parameters))
    assert unlike_grown(family, out, 0.9, mutation) == []
    report = json.loads((out / "upit_report.json").read_text())
    experts = report["lineage"]["experts"]
    assert report["lineage"]["summary"].startswith("averaged the most similar of 5 checkpoints")
    models, moe = [load_model(path) for path in family.checkpoints], load_model(out)
    for index, expert in enumerate(experts):
        members = [i for i, weight in enumerate(expert["weights"]) if weight]
        assert set(expert["weights"]) <= {0, 1 / len(members)}
        assert expert["checkpoint"] == (members[0] if len(members) == 1 else None)
        for projection, short in PROJECTIONS.items():
            name = f"model.layers.1.mlp.{projection}.weight"
            found = moe[f"model.layers.1.block_sparse_moe.experts.{index}.{short}.weight"]
            mean = torch.stack([models[i][name].double() for i in members]).mean(0)
            if len(members) == 1:
                assert torch.equal(found, models[members[0]][name])
            precision = 1e-6 if dtype == "float32" else 2e-3
            torch.testing.assert_close(found.double(), mean, rtol=precision, atol=precision)
    assert any(expert["checkpoint"] is None for expert in experts)
    assert "checkpoint-500 " in (out / "README.md").read_text()


def test_last_keeps_the_last(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=5)
    out = merge(family.recipe(parameters={"num_experts": 3, "select": "last"}))
    report = json.loads((out / "upit_report.json").read_text())
    assert [expert["checkpoint"] for expert in report["lineage"]["experts"]] == [2, 3, 4]
    assert report["lineage"]["summary"] == "kept the last 3 of 5 checkpoints as experts"
    assert unlike_grown(family, out, 0.9, "once") == []


@pytest.mark.parametrize("select", ["diverse", "merge_similar", "last"])
def test_select_says_nothing_without_too_many(select: str) -> None:
    gram = random_gram(4)
    for size in (4, 9):
        assert plan(gram, size, select=select).experts == plan(gram, size).experts


@pytest.mark.parametrize(
    ("counts", "parameters", "expected"),
    [
        ((6, 3), {"select": "diverse"}, True),
        ((6, 3), {"select": "merge_similar"}, True),
        ((6, 3), {}, False),
        ((6, 1), {"select": "merge_similar", "experts_per_token": 1}, False),
        ((3, 6), {"parents": "farthest_child"}, True),
        ((3, 6), {"parents": "random", "granularity": "tensor"}, False),
        ((3, 6), {"granularity": "layer"}, True),
        ((3, 3), {"parents": "farthest_child", "granularity": "layer"}, False),
    ],
    ids=str,
)
def test_one_pass_where_likeness_does_not_matter(counts, parameters, expected: bool) -> None:
    """Where no Gram matrix is needed, the lineage must indeed be the same with any other."""
    m, n = counts
    assert needs_gram(m, n, Parameters(**parameters)) is expected
    found = {plan(random_gram(m, seed), n, **parameters).units[-1].experts for seed in range(4)}
    assert (len(found) > 1) is expected


# ---- granularity ---------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "width"), [("layer", 3), ("tensor", 1)])
@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_a_unit_is_grown_as_if_it_were_a_model(granularity: str, width: int, mutation) -> None:
    gram = random_gram(4, tensors=6)
    settings = {"parents": "farthest_child", "mutation": mutation}
    lineage = plan(gram, 9, granularity=granularity, **settings)
    assert len(lineage.units) == 6 / width
    for index, unit in enumerate(lineage.units):
        tensors = range(index * width, (index + 1) * width)
        alone = plan(gram[list(tensors)], 9, **settings)
        assert (unit.tensors, unit.experts) == (tuple(tensors), alone.experts)
        assert torch.equal(unit.gram, alone.gram)
        assert all(lineage.unit_of(tensor) is unit for tensor in tensors)
    torch.testing.assert_close(lineage.gram, sum(unit.gram for unit in lineage.units))
    weights = np.mean([[e.weights for e in unit.experts] for unit in lineage.units], axis=0)
    assert np.allclose(weights, [expert.weights for expert in lineage.experts])


def test_units_draw_numbers_of_their_own() -> None:
    gram = random_gram(5, tensors=6)
    lineage = plan(gram, 9, granularity="tensor", parents="random")
    assert len({unit.experts for unit in lineage.units}) == 6
    assert {unit.name for unit in lineage.units} == {
        f"model.layers.{layer}.mlp.{projection}" for layer in (0, 1) for projection in PROJECTIONS
    }


def deltas(family: Family, out: Path, experts: int) -> torch.Tensor:
    """What experts on disk differ by from the base, float64, (num_experts, num_elements)."""
    base, moe = load_model(family.base), load_model(out)
    rows = []
    for expert in range(experts):
        parts = []
        for layer in range(2):
            for projection, short in PROJECTIONS.items():
                prefix = f"model.layers.{layer}"
                found = moe[f"{prefix}.block_sparse_moe.experts.{expert}.{short}.weight"]
                origin = base[f"{prefix}.mlp.{projection}.weight"]
                parts.append((found.double() - origin.double()).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize("parents", ["most_dissimilar", "farthest_child"])
def test_planned_distances_are_those_on_disk(tmp_path, merge, parents: str, granularity) -> None:
    family = build_family(tmp_path, count=3, hidden_size=64, intermediate_size=256)
    parameters = {"num_experts": 6, "density": 0.6, "parents": parents, "granularity": granularity}
    out = merge(family.recipe(parameters=parameters))
    told = json.loads((out / "upit_report.json").read_text())["lineage"]
    pairs = torch.nn.functional.pdist(deltas(family, out, 6))
    assert told["smallest_distance"] == pytest.approx(float(pairs.min()), rel=0.02)
    assert told["mean_distance"] == pytest.approx(float(pairs.mean()), rel=0.02)
    assert ("units" in told) == (granularity != "model")


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
@pytest.mark.parametrize("parents", ["most_dissimilar", "farthest_child", "random"])
@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_experts_of_units_equal_the_naive_ones(
    shared_family, merge, mutation: str, parents: str, granularity: str
) -> None:
    parameters = {
        "num_experts": 7,
        "density": 0.6,
        "mutation": mutation,
        "parents": parents,
        "granularity": granularity,
    }
    out = merge(shared_family.recipe(parameters=parameters))
    assert unlike_grown(shared_family, out, 0.6, mutation) == []


def test_a_kept_checkpoint_is_one_in_every_layer(tmp_path, merge) -> None:
    family = build_family(tmp_path, count=5)
    out = merge(family.recipe(parameters={"num_experts": 3, "granularity": "tensor"}))
    whole = merge(family.recipe(parameters={"num_experts": 3}), "whole")
    told = json.loads((out / "upit_report.json").read_text())["lineage"]
    assert all(expert["checkpoint"] is not None for expert in told["experts"])
    first, second = load_model(out), load_model(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_plan_and_card_sum_up_the_units(family: Family, merge, granularity: str) -> None:
    document = family.recipe(parameters={"num_experts": 5, "granularity": granularity})
    result = done("plan", family.write_recipe(document), "--quiet")
    assert f"parents chosen for every {granularity} by itself" in result.output
    origin = r"(experts \d and \d|\d pairs of experts) +"
    assert len(re.findall(rf"│ {origin}│ +│", result.output)) == 2
    card = (merge(document) / "README.md").read_text()
    assert len(re.findall(rf"\| {origin}\|", card)) == 2


def test_verify_knows_the_units(family: Family) -> None:
    document = family.recipe(
        parameters={"num_experts": 5, "granularity": "layer", "parents": "farthest_child"}
    )
    recipe, out = family.write_recipe(document), family.root / "out"
    done("run", recipe, out, "--quiet")
    done("verify", out)
    report = json.loads((out / "upit_report.json").read_text())
    report["lineage"]["units"][1]["experts"][4]["alpha"] = 0.99
    (out / "upit_report.json").write_text(json.dumps(report))
    wrong = invoke("verify", out)
    assert wrong.exit_code == 1
    assert "model.layers.1.mlp is grown from other parents than the report says" in wrong.output
