"""Dense models beside a mixture, never written: their losses, what they cost, what is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from tests.conftest import Family, build_family, byte_tokenizer, train_on
from tests.support.commands import done, refused
from tests.support.naive import load_model
from tests.support.seeds import some_samples
from tests.support.spoken import spoken
from upit_merge.commands.outlook import look_ahead
from upit_merge.commands.preview import dense_models, planned_stage
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import SeedSet
from upit_merge.io.hub import OpenOptions
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.router.assignment import sample_losses
from upit_merge.router.blends import BlendedModels, DenseModels
from upit_merge.router.choice import best_choice
from upit_merge.router.control import PairLosses
from upit_merge.router.mergekit_models import MergekitModels, mergekit_recipe
from upit_merge.router.ration import rationed
from upit_merge.router.rivals import (
    dense_rivals,
    exact_part,
    least_of_parabola,
    spread,
)
from upit_merge.router.router_gain import SampleLosses
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival
from upit_merge.runtime.work_bar import WorkBar

CPU = torch.device("cpu")
SETTINGS = RouterSettings(data="seed.jsonl")


def rivals_of(inputs: Inputs, seeds: SeedSet, **more: object) -> list[Rival]:
    with planned_stage(inputs, seeds, SETTINGS, CPU, quiet=True) as stage:
        losses = sample_losses(stage)
        return dense_rivals(dense_models(inputs), stage, losses, **more)  # type: ignore[arg-type]


def _seeds(count: int) -> SeedSet:
    return SeedSet(some_samples(count), max_length=64)


def dense_sums(folder: Path, seeds: SeedSet) -> list[float]:
    """Summed losses of the targets, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for sample in seeds.samples:
        ids = torch.tensor([sample.input_ids])
        labels = ids.clone()
        labels[:, : sample.loss_start] = -100
        with torch.no_grad():
            found.append(float(model(ids, labels=labels).loss) * sample.num_targets)
    return found


def merged(recipe: str, out: Path) -> Path:
    document = yaml.safe_load(recipe)
    run_merge(MergeConfiguration.model_validate(document), str(out), MergeOptions(quiet=True))
    return out


@pytest.fixture(scope="module")
def ffn_only(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Specialists that share everything but their FFNs."""
    family = build_family(tmp_path_factory.mktemp("ffn"), count=1)
    train_on(family, {"letters": "abcdefgh" * 6, "digits": "01234567" * 6, "marks": "!?.,;:-+" * 6})
    folders = [family.root / name for name in ("letters", "digits", "marks")]
    return Family(family.root, family.base, folders)


@pytest.mark.parametrize("kind", ["whole", "ffn", "bfloat16"])
def test_blends_are_what_mergekit_writes(
    kind: str, shared_family: Family, ffn_only: Family, tmp_path: Path
) -> None:
    """Losses of the average and of the scaled sum, on the samples that they were judged on."""
    family = ffn_only if kind == "ffn" else shared_family
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    seeds = spoken(family, 24)
    with opened(parse_recipe(family.recipe(dtype=dtype)), OpenOptions()) as inputs:
        assert dense_models(inputs).one_backbone == (kind == "ffn")
        found = {rival.kind: rival for rival in rivals_of(inputs, seeds)}
        assert found["base"].sums.tolist() == pytest.approx(
            dense_sums(family.base, seeds), rel=2e-4
        )
        for rival in found.values():
            assert int(rival.sums.isfinite().sum()) == 24
        facts = found["sum"].facts
        scales = facts["scale_a"], facts["scale_b"]
        assert facts["scale"] == pytest.approx(sum(scales) / 2, rel=0.06)
        assert f"base + {facts['scale']:.2g} times" in found["sum"].name
        told = {"average": found["average"]}
        told |= {scale: replace(found["sum"], facts={"scale": scale}) for scale in scales}
        written_sums = {}
        for name, rival in told.items():
            named = MergekitModels.of(inputs.base, inputs.checkpoints)
            recipe = mergekit_recipe(rival, named, inputs.dtype)
            assert recipe is not None
            out = merged(recipe, tmp_path / str(name))
            written = {tensor.dtype for tensor in load_model(out).values()}
            assert written == {inputs.dtype}
            written_sums[name] = dense_sums(out, seeds)
        assert found["average"].sums.tolist() == pytest.approx(written_sums["average"], rel=2e-4)
        # Each half is judged at the scale that the other chose.
        assert scales[0] != scales[1]
        with planned_stage(inputs, seeds, SETTINGS, CPU, quiet=True) as stage:
            half = set(spread(stage)[-12:])
        for sample, judged in enumerate(found["sum"].sums.tolist()):
            chosen_by = scales[1] if sample in half else scales[0]
            assert judged == pytest.approx(written_sums[chosen_by][sample], rel=1e-5), sample
        single = found["single"]
        own = dense_sums(family.checkpoints[int(single.facts["checkpoint"])], seeds)
        if kind != "bfloat16":  # else the rival is rounded, as the mixture will be
            assert single.sums.tolist() == pytest.approx(own, rel=1e-4)
        assert mergekit_recipe(single, named, inputs.dtype) is None


@pytest.mark.parametrize("samples", [7, 30])
@pytest.mark.parametrize("allowance", [math.inf, 90.0])
@pytest.mark.parametrize("backbone", ["ffn", "all"])
def test_one_bar_for_all_that_is_measured(
    backbone: str,
    allowance: float,
    samples: int,
    shared_family: Family,
    ffn_only: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is right from the start, but for what turns out needless."""
    bars: list[WorkBar] = []
    at_end: list[float] = []

    class Watched(WorkBar):
        def __init__(self, *values: object, **named: object) -> None:
            super().__init__(*values, **named)  # type: ignore[arg-type]
            bars.append(self)

        def finish(self) -> None:
            at_end.append(self._done / self._work)  # unlike `share` more than 1 if it is
            super().finish()

    family = ffn_only if backbone == "ffn" else shared_family
    with (
        opened(parse_recipe(family.recipe()), OpenOptions()) as inputs,
        planned_stage(inputs, spoken(family, samples), SETTINGS, CPU, quiet=True) as stage,
    ):
        losses = sample_losses(stage)
        monkeypatch.setattr("upit_merge.router.stage.WorkBar", Watched)
        rivals = dense_rivals(dense_models(inputs), stage, losses, allowance=allowance, random=True)
    assert {"average", "sum", "random"} <= {rival.kind for rival in rivals} or samples == 7
    assert len(bars) == 1
    assert bars[0].share == 1.0
    (done_at_end,) = at_end
    assert done_at_end == pytest.approx(1.0) or (allowance == 90.0 and 0.6 < done_at_end < 1.05)


def test_what_is_spared_is_spared_of_every_kind(ffn_only: Family) -> None:
    """Where the sum is better than the average, it gets the most samples; both get all kinds."""
    heard = spoken(ffn_only, 60)
    samples = [replace(s, label="abc"[i // 20]) for i, s in enumerate(heard.samples)]
    with opened(parse_recipe(ffn_only.recipe()), OpenOptions()) as inputs:
        found = {
            r.kind: r for r in rivals_of(inputs, replace(heard, samples=samples), allowance=90.0)
        }
    counts = {
        kind: [int(found[kind].sums[i : i + 20].isfinite().sum()) for i in (0, 20, 40)]
        for kind in ("average", "sum")
    }
    assert max(counts["average"]) - min(counts["average"]) <= 2
    assert max(counts["sum"]) - min(counts["sum"]) <= 2
    assert sum(counts["average"]) >= 20


def test_all_tensors_are_blended(shared_family: Family) -> None:
    base, *models = (load_model(path) for path in (shared_family.base, *shared_family.checkpoints))
    with opened(parse_recipe(shared_family.recipe()), OpenOptions()) as inputs:
        dense = dense_models(inputs)
        source = BlendedModels(dense, [dense.summed(0.5)])
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
            wanted = base[name] + 0.5 * sum(model[name] - base[name] for model in models)
            torch.testing.assert_close(source.tensor(name), wanted)


@pytest.mark.parametrize("changed", ["model.norm.weight", "model.embed_tokens.weight", None])
def test_backbones_are_compared_to_the_last_byte(
    changed: str | None, ffn_only: Family, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(ffn_only.checkpoints[1])
    if changed is not None:
        with torch.no_grad():
            model.get_parameter(changed).view(-1)[-1] += 1e-3
    model.save_pretrained(tmp_path / "other")
    models = [str(ffn_only.checkpoints[0]), str(tmp_path / "other")]
    with opened(parse_recipe(ffn_only.recipe(models=models)), OpenOptions()) as inputs:
        assert dense_models(inputs).one_backbone is (changed is None)


def test_models_of_other_formats_are_blended_whole(tmp_path: Path) -> None:
    """What the mixture shares, or leaves dense, is none of the dense model's business."""
    family = build_family(tmp_path, kind="qwen2", count=2)
    parameters = {"shared": "split", "dense_layers": 1}
    seeds = _seeds(8)
    recipe = parse_recipe(family.recipe(architecture="glm4_moe", parameters=parameters))
    with opened(recipe, OpenOptions()) as inputs:
        found = {rival.kind: rival for rival in rivals_of(inputs, seeds)}
        named = MergekitModels.of(inputs.base, inputs.checkpoints)
        text = mergekit_recipe(found["average"], named, inputs.dtype)
        assert text is not None
        sums = dense_sums(merged(text, tmp_path / "average"), seeds)
    assert found["average"].sums.tolist() == pytest.approx(sums, rel=1e-3)


@pytest.mark.parametrize(
    ("means", "least"),
    [
        ([3.395, 3.0436, 2.98], 1.72),
        ([1.0, 2.0, 5.0], 0.0),
        ([3.0, 2.0, 1.0], 2.0),  # a line has no least
        ([3.0, 2.0, math.nan], 1.0),
        ([3.0, 2.0, math.inf], 1.0),
    ],
)
def test_least_of_a_parabola(means: list[float], least: float) -> None:
    assert least_of_parabola(means) == pytest.approx(least, abs=0.02)


@pytest.mark.parametrize("singles", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 8, 24, 40, 96, 600])
@pytest.mark.parametrize("models", [2, 3, 8])
def test_no_more_is_spent_than_may_be(models: int, samples: int, *, singles: bool) -> None:
    order = [*range(samples)]
    allowance = 0.5 * models * samples
    found = rationed(order, order, allowance, blends=2, singles=singles, mixture=1.7)
    spent = 3 * len(found.scale) + 1.7 * len(found.random)
    judged = found.judged(2)
    spent += len(judged) * (2 + found.singles)
    if samples >= 16:
        assert spent <= allowance
    assert not {*found.scale} & {*judged}
    assert len(found.judged(1)) >= len(judged)  # without a sum there is more for the average
    if samples >= 96 and models >= 3:
        assert len(judged) >= 20


class Counted:
    """Counts what goes through a dense model: samples, times sweeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses = self.exact = 0
        whole, some = RouterStage.losses, RouterStage.exact_losses

        def losses(stage: RouterStage) -> SampleLosses:
            self.losses += stage.model.num_experts * len(stage.everything)
            return whole(stage)

        def exact(stage: RouterStage, pairs: list, name: str, **more: bool) -> PairLosses:
            self.exact += len(pairs)
            return some(stage, pairs, name, **more)

        monkeypatch.setattr(RouterStage, "losses", losses)
        monkeypatch.setattr(RouterStage, "exact_losses", exact)


@pytest.mark.parametrize("backbone", ["ffn", "whole"])
def test_cost_is_half_of_the_losses(
    backbone: str, shared_family: Family, ffn_only: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = ffn_only if backbone == "ffn" else shared_family
    with opened(parse_recipe(family.recipe()), OpenOptions()) as inputs:
        counted = Counted(monkeypatch)
        outlook = look_ahead(inputs, _seeds(96), SETTINGS, CPU, bytes_ours=2, quiet=True)
    assert counted.losses == 3 * 96
    random = sum(r.sums.isfinite().sum() for r in outlook.worth.rivals if r.kind == "random")
    # A token of the mixture goes through two FFNs: about 1.6 times as much as of a dense model.
    assert counted.exact + 1.6 * int(random) <= 1.5 * 96
    judged = [outlook.worth.gain(r).samples for r in outlook.worth.rivals if r.kind == "average"]
    assert judged[0] >= 20


def text_of(kinds: dict[str, str], each: int) -> list[dict[str, str]]:
    return [
        {"text": letters[i % 7 :] + letters * (2 + i // 7), "kind": kind}
        for i in range(each)
        for kind, letters in kinds.items()
    ]


KINDS = {"letters": "abcdefgh", "digits": "01234567", "marks": "!?.,;:-+"}


@pytest.mark.parametrize(
    ("each", "copies", "verdict"),
    [
        (32, 1, "Worth it: "),
        (4, 1, "Too few samples to tell"),
        (4, 8, "Too few samples to tell"),
    ],
)
def test_plan_tells_of_specialists(
    ffn_only: Family, tmp_path: Path, each: int, copies: int, verdict: str
) -> None:
    data = tmp_path / "seed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in text_of(KINDS, each)) * copies)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(ffn_only.recipe()))
    told = done("plan", recipe, "--data", data, "--group-by", "kind", "--quiet").output
    assert told.count(verdict) == 1
    assert "average of the checkpoints" in told
    assert "marks" in told
    assert "merge_method" not in told


def test_plan_tells_of_checkpoints_that_are_better_together(tmp_path: Path) -> None:
    """The same model with other noise each: the average is better than any, and plan says how."""
    family = build_family(tmp_path, count=1, noise=0)
    train_on(family, {"all": "".join(letters * 3 for letters in KINDS.values())})
    torch.manual_seed(1)
    folders = []
    for number in range(3):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folders.append(tmp_path / f"noisy-{number}")
        model.save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
    data = tmp_path / "seed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in text_of(KINDS, 32)))
    document = family.recipe(models=[str(folder) for folder in folders])
    recipe = family.write_recipe(document)
    told = done("plan", recipe, "--data", data, "--quiet").output
    assert "Not worth it: " in told
    text = "merge_method" + told.split("merge_method", 1)[1]
    out = merged(text.split("\n\n")[0], tmp_path / "instead")
    assert (out / "model.safetensors").exists()


def test_groups_need_data(shared_family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(shared_family.recipe()))
    assert "--group-by kind names a column of --data" in refused(
        "plan", recipe, "--group-by", "kind"
    )


def test_losses_to_first_order_are_told_apart_from_exact_ones(tmp_path: Path) -> None:
    """With many checkpoints most losses are estimates: what is judged are exact ones."""
    family = build_family(tmp_path, count=7, noise=0.005)
    seeds = _seeds(48)
    settings = RouterSettings(data="seed.jsonl", losses="first_order")
    with (
        opened(parse_recipe(family.recipe()), OpenOptions()) as inputs,
        planned_stage(inputs, seeds, settings, CPU, quiet=True) as stage,
    ):
        losses = sample_losses(stage)
        assert losses.is_estimated
        exact = exact_part(stage, losses, allowance=100.0)
        whole = stage.losses()
    known = exact.sums.isfinite().all(2).all(1)
    assert int(known.sum()) >= 20
    torch.testing.assert_close(exact.sums[known], whole.sums[known], rtol=1e-4, atol=1e-4)
    assert best_choice(exact).isfinite().sum() >= 20


def test_one_checkpoint_has_no_rival_but_itself(shared_family: Family) -> None:
    models = [str(shared_family.checkpoints[0])]
    recipe = parse_recipe(
        shared_family.recipe(models=models, parameters={"expansion": "copy", "num_experts": 2})
    )
    with opened(recipe, OpenOptions()) as inputs:
        assert isinstance(dense_models(inputs), DenseModels)
        found = look_ahead(inputs, _seeds(30), SETTINGS, CPU, bytes_ours=2, quiet=True)
    assert [rival.kind for rival in found.worth.rivals] == ["single"]
    assert found.worth.outcome == "not_worth"
    assert found.recipe is None
