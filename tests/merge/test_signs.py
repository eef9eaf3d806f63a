"""Signs before any data: angles, lengths, equality, and that `plan` says them."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Family
from tests.support.commands import done
from tests.support.lora import opened_inputs
from upit_merge.io.trainer_state import TRAINER_STATE, TrainerState
from upit_merge.merge.passes import measure_similarity
from upit_merge.merge.signs import (
    PARALLEL,
    base_norm,
    direction_signs,
    equality_signs,
    run_orders,
    shrinking_signs,
    signs_of,
)


def gram_of(*deltas: list[float]) -> torch.Tensor:
    rows = torch.tensor(deltas, dtype=torch.float64)
    return rows @ rows.T


def told(gram: torch.Tensor) -> list[str]:
    norms = gram.diagonal().sqrt().tolist()
    return [sign.kind for sign in direction_signs(gram, norms)]


def test_angles_decide_between_parallel_and_orthogonal() -> None:
    inside, outside = math.acos(PARALLEL) - 0.01, math.acos(PARALLEL) + 0.01
    for angle, kinds in ((inside, ["parallel"]), (outside, []), (math.pi / 2, ["orthogonal"])):
        assert told(gram_of([1, 0], [math.cos(angle), math.sin(angle)])) == kinds
    assert told(gram_of([1, 0, 0], [0, 1, 0], [0.3, 0, 1])) == []


def test_only_some_pairs_are_named() -> None:
    gram = gram_of([1, 0, 0], [1, 0.05, 0], [0, 0, 1])
    (sign,) = direction_signs(gram, gram.diagonal().sqrt().tolist())
    assert sign.checkpoints == (0, 1)
    assert "0 and 1 (0.999)" in sign.text


def test_parallel_deltas_of_other_length_say_so() -> None:
    gram = gram_of([1, 0], [3, 0.01])
    (sign,) = direction_signs(gram, [0.01, 0.03])
    assert "1 % to 3 %" in sign.text


def test_equal_checkpoints_are_named_once() -> None:
    folders = [Path(name) for name in "bxyz"]
    gram = gram_of([1, 0], [1, 0], [0, 0])
    found = {sign.kind: sign.checkpoints for sign in equality_signs(gram, folders)}
    assert found == {"equal to the base": (2,), "equal": (0, 1)}
    same = [folders[0], folders[1], folders[1], folders[0]]
    assert not [*equality_signs(gram, same)]  # listed twice, which is said elsewhere


def test_a_run_that_turns_back_is_told() -> None:
    order = [[(10, 0), (20, 1), (30, 2)]]
    back = gram_of([1, 0], [2, 0.1], [1.5, 0.1])
    (sign,) = shrinking_signs(back, [0.1, 0.2, 0.15], order)
    assert sign.checkpoints == (1, 2)
    assert "from 20 % of the base's FFN weights (checkpoint 1, step 20) to 15 %" in sign.text
    onwards = gram_of([1, 0], [2, 0.1], [2.5, 0.1])
    assert not [*shrinking_signs(onwards, [0.1, 0.2, 0.25], order)]
    unrelated = gram_of([1, 0], [0, 2], [1.5, 0])
    assert not [*shrinking_signs(unrelated, [0.1, 0.2, 0.15], order)]


def test_runs_are_ordered_by_the_trainers_step_or_the_name() -> None:
    folders = [Path(f"a/checkpoint-{n}") for n in (30, 10)] + [Path("b/x"), Path("a/last")]
    notes = {3: TrainerState(20, None, ()), 2: TrainerState(5, None, ())}
    assert run_orders(folders, notes) == [[(10, 1), (20, 3), (30, 0)]]


def test_the_base_norm_is_that_of_its_ffn_weights(family: Family) -> None:
    with opened_inputs(family.recipe()) as inputs:
        names = [name for _, _, name in inputs.architecture.ffn_names()]
        weights = load_file(family.base / "model.safetensors")
        exact = math.sqrt(sum(float(weights[name].double().square().sum()) for name in names))
        assert base_norm(inputs) == pytest.approx(exact, rel=0.1)
        gram = measure_similarity(inputs, [torch.device("cpu")], quiet=True)
        found = signs_of(inputs, gram)
        own = load_file(family.checkpoints[1] / "model.safetensors")
        moved = sum(float((own[name] - weights[name]).double().square().sum()) for name in names)
        assert found.norms[1] == pytest.approx(math.sqrt(moved) / exact, rel=0.1)


def test_plan_says_them_before_any_data(family: Family) -> None:
    for number, folder in enumerate(family.checkpoints, 1):
        rates = [{"step": step, "learning_rate": 1e-4} for step in (1, 10 * number)]
        notes = {"global_step": 10 * number, "max_steps": 100, "log_history": rates}
        (folder / TRAINER_STATE).write_text(json.dumps(notes))
    (family.checkpoints[2] / TRAINER_STATE).write_text("no JSON")
    recipe = family.root / "recipe.yml"
    recipe.write_text(yaml.safe_dump(family.recipe()))
    told = " ".join(done("plan", recipe).output.split())
    assert "Length of the deltas, relative to the base's FFN weights: 0: " in told
    assert "The learning rate was not at zero when the trainer saved checkpoint(s) 0 (" in told
    assert "100% of the run's peak, at step 20 of 100" in told


def test_copies_have_no_signs(family: Family) -> None:
    recipe = family.recipe(models=[str(family.checkpoints[0])], parameters={"expansion": "copy"})
    with opened_inputs(recipe) as inputs:
        assert not [*signs_of(inputs, torch.zeros(1, 1, 1, dtype=torch.float64)).lines()]
