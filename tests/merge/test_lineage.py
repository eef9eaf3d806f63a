"""Similarity and lineage, against brute force and against what merged models really measure."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest
import torch

from tests.conftest import Family, build_family
from tests.support.grams import plan, random_gram
from tests.support.naive import load_model
from upit_merge.config.recipe import parse_recipe
from upit_merge.errors import UpitError
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import opened
from upit_merge.merge.passes import measure_similarity
from upit_merge.merge.selection import keep_diverse
from upit_merge.merge.similarity import cosine, squared_distance


def brute_deltas(family: Family) -> torch.Tensor:
    """All FFN deltas of all checkpoints, float64, (num_checkpoints, num_elements)."""
    base = load_model(family.base)
    names = sorted(name for name in base if ".mlp." in name)
    rows = []
    for folder in family.checkpoints:
        model = load_model(folder)
        rows.append(torch.cat([(model[n].double() - base[n].double()).flatten() for n in names]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_equals_brute_force(tmp_path, dtype) -> None:
    family = build_family(tmp_path, count=4, dtype=dtype)
    with opened(parse_recipe(family.recipe()), OpenOptions()) as inputs:
        gram = measure_similarity(inputs, (torch.device("cpu"),), quiet=True)
    deltas = brute_deltas(family)
    torch.testing.assert_close(gram.sum(0), deltas @ deltas.T, rtol=1e-12, atol=0)


def test_cosine_and_distance_against_vectors() -> None:
    points = torch.randn(5, 20, dtype=torch.float64)
    points[3] = 0
    gram = points @ points.T
    for i, j in combinations(range(5), 2):
        expected = torch.nn.functional.cosine_similarity(points[i], points[j], dim=0)
        assert cosine(gram)[i, j] == pytest.approx(expected.item(), abs=1e-12)
        distance = (points[i] - points[j]).square().sum()
        assert squared_distance(gram)[i, j] == pytest.approx(distance.item())
    assert cosine(torch.zeros(2, 2))[0, 1] == 1


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_first_parents_are_the_least_alike_pair(similarity: str) -> None:
    gram = random_gram(5)
    lineage = plan(gram, 6, similarity=similarity)
    total = gram.sum(0)
    measure = 1 - cosine(total) if similarity == "cosine" else squared_distance(total)
    expected = max(combinations(range(5), 2), key=lambda pair: measure[pair].item())
    assert lineage.experts[5].parents == expected


def test_most_dissimilar_uses_a_pair_once_while_others_are_left() -> None:
    pairs = Counter(e.parents for e in plan(random_gram(4), 20).experts if e.parents)
    assert max(pairs.values()) == 1


def test_repeat_pairs_is_the_rule_of_the_paper() -> None:
    """Expected likeness of two checkpoints does not change, so the least alike pair wins again."""
    pairs = Counter(
        e.parents for e in plan(random_gram(4), 20, repeat_pairs=True).experts if e.parents
    )
    assert max(pairs.values()) > 1


def test_random_parents_depend_on_the_seed_alone() -> None:
    gram = random_gram(6)
    first, again = (plan(gram, 12, parents="random", seed=1).experts for _ in range(2))
    assert first == again
    assert first != plan(gram, 12, parents="random", seed=2).experts


def test_genomes_are_convex_and_follow_the_parents() -> None:
    lineage = plan(random_gram(4), 12)
    for expert in lineage.experts:
        assert sum(expert.weights) == pytest.approx(1)
        assert min(expert.weights) >= 0
        if expert.parents:
            first, second = (lineage.experts[p].weights for p in expert.parents)
            mixed = [
                expert.alpha * a + (1 - expert.alpha) * b
                for a, b in zip(first, second, strict=True)
            ]
            assert expert.weights == pytest.approx(mixed)


@pytest.mark.parametrize("mutation", ["once", "compound"])
def test_expected_gram_is_what_the_experts_measure(tmp_path, merge, mutation: str) -> None:
    """The closed form against the Gram matrix of the experts that were written."""
    family = build_family(tmp_path, count=3, hidden_size=64, intermediate_size=256)
    document = family.recipe(
        parameters={"num_experts": 6, "density": 0.5, "mutation": mutation, "seed": 3}
    )
    out = merge(document)
    report = json.loads((out / "upit_report.json").read_text())
    expected = torch.tensor(report["lineage"]["expected_gram"], dtype=torch.float64)
    base, moe = load_model(family.base), load_model(out)
    shorts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    rows = []
    for expert in range(6):
        parts = []
        for layer in range(2):
            for projection, short in shorts.items():
                tensor = moe[
                    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{short}.weight"
                ]
                origin = base[f"model.layers.{layer}.mlp.{projection}.weight"]
                parts.append((tensor.double() - origin.double()).flatten())
        rows.append(torch.cat(parts))
    measured = torch.stack(rows) @ torch.stack(rows).T
    norms = measured.diagonal().sqrt()
    error = (measured - expected).abs() / (norms.unsqueeze(0) * norms.unsqueeze(1))
    assert error.max() < 0.03
    assert report["checkpoint_gram"][0][0] == pytest.approx(measured[0, 0].item(), rel=1e-5)


def test_compound_mutation_inflates_norms_and_once_does_not() -> None:
    """Why `once` is the default: dropping again and again rescales noise by 1 / density each time."""
    gram = random_gram(4)
    largest = gram.sum(0).diagonal().max()
    once = plan(gram, 16, density=0.1).gram.diagonal().max()
    compound = plan(gram, 16, density=0.1, mutation="compound").gram.diagonal().max()
    assert once <= largest / 0.1
    assert compound > 10 * largest / 0.1


def test_more_checkpoints_than_experts_keeps_a_diverse_set() -> None:
    angles = torch.tensor([0.0, 0.01, 0.02, 1.5, 3.0], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    kept = keep_diverse(points @ points.T, 3, "cosine")
    assert kept == [0, 3, 4]
    lineage = plan((points @ points.T).unsqueeze(0), 3, select="diverse")
    assert [expert.checkpoint for expert in lineage.experts] == [0, 3, 4]
    lineage = plan((points @ points.T).unsqueeze(0), 3)
    assert [expert.checkpoint for expert in lineage.experts] == [2, 3, 4]
    assert plan((points @ points.T).unsqueeze(0), 1).experts[0].checkpoint == 4


def test_as_many_checkpoints_as_experts_needs_no_expansion() -> None:
    lineage = plan(random_gram(4), 4)
    assert [expert.checkpoint for expert in lineage.experts] == [0, 1, 2, 3]
    assert "no expansion" in lineage.summary


def test_one_checkpoint_has_no_partner() -> None:
    with pytest.raises(UpitError, match="One checkpoint cannot be the parents of 4 experts"):
        plan(random_gram(1), 4)
    assert len(plan(random_gram(1), 1)) == 1


def test_two_checkpoints_grow_to_any_number() -> None:
    lineage = plan(random_gram(2), 16)
    assert len(lineage) == 16
    assert lineage.smallest_distance() > 0
