"""Which experts a token goes to and what they weigh: as transformers' whole model has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import build_family
from tests.support.families import FORMAT_KINDS
from tests.support.naive import load_model
from tests.support.seeds import held_out
from upit_merge.commands.options import MixtureOptions
from upit_merge.commands.session import router_session
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.assembled import Handed
from upit_merge.engine.choices import Choices
from upit_merge.router.choices import Excerpt, Observation, observe
from upit_merge.router.evaluation import swept
from upit_merge.router.stage import RouterStage

KINDS = {
    "mixtral": ("llama", "mixtral", {}, {}),
    "qwen3_moe": ("qwen3", "qwen3_moe", {}, {}),
    **FORMAT_KINDS,
}


@pytest.fixture(params=KINDS)
def out(request: pytest.FixtureRequest, tmp_path: Path, merge: Any) -> Path:
    """Of four experts, with random gates, and biases that change who is chosen."""
    kind, architecture, settings, parameters = KINDS[request.param]
    family = build_family(tmp_path / "family", kind=kind, noise=0.2, **settings)
    parameters = {"seed": 5, "num_experts": 4, **parameters}
    out = merge(family.recipe(architecture=architecture, parameters=parameters))
    tensors = load_model(out)
    torch.manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensors[name] = torch.rand_like(tensor) * 0.3
        if "gate.weight" in name or "router" in name:  # far from even
            tensors[name] = tensor * 20 if tensor.ndim == 2 else tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def observed(out: Path, data: Path, scratch: Path) -> tuple[Observation, RouterStage]:
    settings = RouterSettings(data=str(data), batch_tokens=100)
    options = MixtureOptions(quiet=True)
    with router_session(out, "inspect", options, changes=False) as session:
        stage = session.stage(settings, scratch)
        excerpt = Excerpt.of(stage.seeds.samples, [stage.everything], 10**6)
        return observe(stage, excerpt), stage


def whole_model(
    out: Path, stage: RouterStage
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """What transformers hands to the experts of every layer, sample by sample: who, and weights."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    path = stage.model.format.experts_path
    modules = [m for name, m in model.named_modules() if name.endswith(f".{path}")]
    chosen: list[list[torch.Tensor]] = [[] for _ in modules]
    weights: list[list[torch.Tensor]] = [[] for _ in modules]
    for layer, module in enumerate(modules):

        def look(_module: Any, inputs: Any, layer: int = layer) -> None:
            chosen[layer].append(inputs[1])
            weights[layer].append(inputs[2])

        module.register_forward_pre_hook(look)
    for sample in stage.seeds.samples:
        with torch.no_grad():
            model(torch.tensor([sample.input_ids]))
    return chosen, weights


def test_choices_are_those_of_the_whole_model(out: Path, tmp_path: Path) -> None:
    seen, stage = observed(out, held_out(tmp_path), tmp_path)
    chosen, weights = whole_model(out, stage)
    assert len(chosen) == len(stage.model.mixture_layers) > 0
    for layer in range(len(chosen)):
        who, what = torch.cat(chosen[layer]), torch.cat(weights[layer]).float()
        order = what.argsort(dim=1, descending=True)
        what, who = what.gather(1, order), who.gather(1, order)
        same = seen.choices.experts[layer] == who
        # Where two weigh the same to the last bits, their order is nobody's business.
        assert same.float().mean() > 0.995
        torch.testing.assert_close(seen.choices.weights[layer], what, rtol=1e-3, atol=1e-5)
        # What is shown as certainty is made of what the weights are made of.
        rest = what[:, 1] / what[:, 0]
        assert bool((seen.certainty[layer] > 0).all())
        assert bool((seen.certainty[layer] * (1 + rest) <= 1 + 1e-4).all())
        taken = torch.zeros(4).scatter_add_(0, who.flatten(), what.flatten())
        torch.testing.assert_close(
            seen.weights[layer].float(), taken / taken.sum(), rtol=1e-3, atol=1e-4
        )


def test_weights_are_made_of_the_scores(out: Path, tmp_path: Path) -> None:
    """Of every format the chosen share the weight as they share the scores."""
    batches: list[int] = []
    settings = RouterSettings(data=str(held_out(tmp_path)))
    with router_session(out, "inspect", MixtureOptions(quiet=True), changes=False) as session:
        stage = session.stage(settings, tmp_path)

        def look(handed: Handed) -> None:
            logits, chosen, weights = handed.logits, handed.chosen, handed.weights
            scores = stage.model.format.scores(logits).gather(1, chosen)
            batches.append(len(logits))
            torch.testing.assert_close(
                scores / scores.sum(1, keepdim=True),
                weights / weights.sum(1, keepdim=True),
                rtol=1e-3,
                atol=1e-5,
            )

        with swept(stage, lambda *_: None, "", on_handed=look):
            pass
    assert len(batches) >= len(stage.model.mixture_layers)


def test_the_sum_over_layers_is_of_gate_weight() -> None:
    experts = torch.tensor([[[0, 1]], [[2, 1]], [[2, 3]]])
    weights = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.5, 0.5]]])
    choices = Choices((1, 2, 3), experts, weights)
    order, shares = choices.summed(4)
    assert order.tolist() == [[2, 0]]
    assert choices.owners(4).tolist() == [2]
    assert choices.owners(4, 1).tolist() == [0]
    torch.testing.assert_close(shares, torch.tensor([[1.1 / 3, 0.9 / 3]]).double())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (100, {0: 10, 1: 10, 2: 10, 3: 5}),
        (20, {0: 10, 2: 5, 3: 5}),
        (1, {0: 1}),
    ],
)
def test_an_excerpt_has_something_of_every_kind(wanted: int, expected: dict[int, int]) -> None:
    """Samples 0 to 2 are of one kind, 3, a small one, of another."""
    samples = [TokenizedSample([1] * length, 1, "") for length in (10, 10, 10, 5)]
    excerpt = Excerpt.of(samples, [[0, 1, 2], [3]], wanted)
    assert excerpt.lengths == expected
    assert excerpt.num_tokens == min(wanted, 35)


def test_correlation_is_numpy_s(tmp_path: Path, merge: Any) -> None:
    family = build_family(tmp_path / "family")
    out = merge(family.recipe(parameters={"num_experts": 4}))
    seen, stage = observed(out, held_out(tmp_path), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    logits: list[list[torch.Tensor]] = []
    for sample in stage.seeds.samples:
        with torch.no_grad():
            ids = torch.tensor([sample.input_ids])
            logits.append(list(model(ids, output_router_logits=True).router_logits))
    for layer in range(2):
        rows = torch.cat([one[layer] for one in logits]).double().numpy()
        expected = torch.from_numpy(np.corrcoef(rows.T))
        torch.testing.assert_close(seen.correlation[layer], expected, rtol=1e-3, atol=1e-3)
