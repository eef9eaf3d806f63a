"""Talking to a mixture of every format: what is shown and said is what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import build_family
from tests.support.families import COHERE2, GEMMA4, LFM2, QWEN35
from upit_merge.commands.dialogue.voices import load_voice
from upit_merge.engine.generation import Answer, Speaker
from upit_merge.models.formats import FORMATS, MixtureFormat, found_format

# What makes one of each.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", {}, {}),
    "qwen3_moe": ("qwen3", {"head_dim": 8}, {}),
    "qwen3_5_moe": ("qwen3_5_text", QWEN35, {"shared": "split"}),
    "gemma4": ("gemma4_text", GEMMA4, {}),
    "glm4_moe": ("qwen2", {"num_hidden_layers": 3}, {"shared": "split", "dense_layers": 1}),
    "granitemoe": ("granite", {"residual_multiplier": 0.4, "logits_scaling": 3.0}, {}),
    "granitemoe_swa": ("smollm3", {"no_rope_layers": [0, 1]}, {}),
    "lfm2_moe": ("lfm2", LFM2, {"dense_layers": 1}),
    "ernie4_5_moe": ("ernie4_5", {"head_dim": 8}, {"shared": "split"}),
    "cohere2_moe": ("cohere2", COHERE2, {}),
    "flex_olmo": ("olmo2", {}, {}),
}
TOKENS = 12


def test_all_formats_are_here() -> None:
    assert set(KINDS) == set(FORMATS)


@pytest.fixture(scope="module", params=KINDS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts that differ, routed at random."""
    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    kind, settings, parameters = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    family = build_family(
        root, kind=kind, noise=0.2, **{"max_position_embeddings": 256, **settings}
    )
    parameters = {"num_experts": 3, "experts_per_token": 2, "seed": 1, **parameters}
    document = family.recipe(architecture=request.param, parameters=parameters)
    run_recipe(parse_recipe(document), "", root / "out", RunOptions(quiet=True))
    return root / "out"


def form_of(folder: Path) -> MixtureFormat:
    form = found_format(json.loads((folder / "config.json").read_text()))
    assert form is not None
    return form


def prompt(length: int = 9) -> list[int]:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(2)).tolist()


def answered(speaker: Speaker, ids: list[int], **settings: Any) -> Answer:
    pieces: list[str] = []
    settings = {"max_new_tokens": TOKENS, "do_sample": False, **settings}
    answer = speaker.answer(ids, lambda piece, _choices: pieces.append(piece), **settings)
    assert "".join(pieces) == answer.text
    return answer


def spoken_by(folder: Path, ids: list[int], change: Callable[[Any], Any] | None = None) -> Any:
    """transformers' own model, and what it generates."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if change:
        with torch.no_grad():
            change(model)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
    )
    return model, out[0, len(ids) :].tolist()


def layers_of(model: Any) -> Any:
    return getattr(model.base_model, "language_model", model.base_model).layers


def gate_logits(model: Any, form: MixtureFormat, ids: list[int]) -> torch.Tensor:
    """What each gate's matrix says of all tokens in one pass, (layers, tokens, experts)."""
    logits: list[torch.Tensor] = []

    def multiply(gate: Any, inputs: tuple[torch.Tensor]) -> None:
        logits.append(inputs[0].reshape(-1, inputs[0].shape[-1]) @ gate.weight.T)

    for layer in layers_of(model):
        if form.gate_path in dict(layer.named_modules()):
            layer.get_submodule(form.gate_path).register_forward_pre_hook(multiply)
    with torch.no_grad():
        model(torch.tensor([ids]))
    return torch.stack(logits)


def test_it_says_and_shows_what_transformers_computes(mixture: Path) -> None:
    """Of two turns, the second of which goes on from the first."""
    voice = load_voice(str(mixture))
    speaker, form = voice.speaker, form_of(mixture)
    assert speaker.routed is not None
    ids = prompt()
    for _turn in range(2):
        model, expected = spoken_by(mixture, ids)
        answer = answered(speaker, ids, recorded=True, eos_token_id=None)
        assert answer.ids == expected
        decoded = AutoTokenizer.from_pretrained(mixture).decode(expected, skip_special_tokens=True)
        assert answer.text == decoded
        # What its gates say of each token, in one pass over all of them.
        logits = gate_logits(model, form, [*ids, *expected])
        tops = logits[:, len(ids) :].topk(2).indices
        assert answer.choices is not None
        assert torch.equal(answer.choices.experts.sort().values, tops.sort().values)
        counts = torch.stack([torch.bincount(top.flatten(), minlength=3) for top in tops])
        assert torch.equal(answer.choices.counts(3), counts)
        ids = [*ids, *expected, *prompt(5)]


def season(model: Any) -> None:
    """Give routers what published mixtures have and new ones have not: biases, scales, sums over 1."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.add_(torch.rand(tensor.shape, generator=generator))
        if name.endswith("per_expert_scale"):  # before a norm, of which the smallest number shows
            tensor.mul_(torch.tensor([0.5, 2.0, 4.0]))
    for module in model.modules():
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 1.7
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = False


@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_alone_is_a_mixture_of_its_copies(mixture: Path, expert: int) -> None:
    speaker, form = load_voice(str(mixture)).speaker, form_of(mixture)
    assert speaker.routed is not None
    with torch.no_grad():
        season(speaker.model)

    def copy(model: Any) -> None:
        season(model)
        for layer in layers_of(model):
            modules = dict(layer.named_modules())
            if form.experts_path in modules:
                for weight in modules[form.experts_path].parameters():
                    weight.copy_(weight[expert].clone().expand_as(weight))
                if form.name == "gemma4":
                    scale = layer.router.per_expert_scale
                    scale.fill_(float(scale[expert]))

    ids = prompt(20)
    model, expected = spoken_by(mixture, ids, copy)
    answer = answered(speaker, ids, expert=expert, eos_token_id=None)
    assert answer.ids == expected
    tensor = torch.tensor([ids])
    with torch.no_grad():
        before, wanted = speaker.model(tensor).logits, model(tensor).logits
        with speaker.routed.alone(expert):
            found = speaker.model(tensor).logits
        close = 2e-5 * float(wanted.abs().max())
        assert float((found - wanted).abs().max()) < close
        # The control: it is not what the mixture says, which is as it was.
        assert float((found - before).abs().max()) > 10 * close
        assert torch.equal(speaker.model(tensor).logits, before)
