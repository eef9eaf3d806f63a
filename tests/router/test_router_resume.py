"""`upit-merge router` cut off anywhere: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.conftest import Family
from tests.support.commands import done, refused
from tests.support.crash import contents
from tests.support.naive import load_model
from upit_merge.engine.first_order import MeanSweeps
from upit_merge.engine.hidden_states import PackedStates
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.output.staging import EDIT_STAGING
from upit_merge.router import memory, progress
from upit_merge.router.progress import Progress
from upit_merge.router.refine import GateTrainer
from upit_merge.router.stage import RouterStage

TRAIN_EXPERTS = [
    "--objective",
    "upit",
    "--upit-train-experts",
    "--upit-epochs",
    "1",
    "--upit-lr",
    "1e-3",
]


class CutOff(BaseException):
    """Stands for a kill: nothing catches it, and what it interrupts is not tidied up."""


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch) -> None:
    monkeypatch.setattr(progress, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_KEEP_SHARE", float("inf"))


@pytest.fixture
def out(shared_family: Family, merge) -> Path:
    """Four experts in two layers; the gates in a file of their own."""
    return merge(shared_family.recipe(parameters={"num_experts": 4}), max_shard_bytes=50_000)


def copied(out: Path, parent: Path) -> Path:
    """A copy of the same name, which the card has as its title."""
    return shutil.copytree(out, parent / out.name)


def command(out: Path, data: Path, *arguments: str) -> list[str]:
    return ["router", str(out), "--data", str(data), "--quiet", *arguments]


def cut_off(monkeypatch, owner: type, name: str, count: int, words: list[str]) -> bool:
    """Run until a method is called for that many times; False if it is not."""
    original: Callable = getattr(owner, name)
    left = [count]

    def counted(*args, **kwargs):
        if left[0] == 0:
            raise CutOff
        left[0] -= 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        try:
            done(*words)
        except CutOff:
            return True
    return False


def layers_computed(monkeypatch, words: list[str]) -> int:
    calls = []
    original = LayerwiseMixture._layer_batch

    def counted(self, *args) -> None:
        calls.append(1)
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LayerwiseMixture, "_layer_batch", counted)
        done(*words)
    return len(calls)


def test_it_goes_on_at_the_layer_where_it_stopped(
    out, shared_family, tmp_path, monkeypatch
) -> None:
    """4 experts in 2 layers for the losses, then 2 layers for the gates."""
    data = shared_family.seed_file()
    whole = copied(out, tmp_path / "whole")
    batches, rest = divmod(layers_computed(monkeypatch, command(whole, data)), 10)
    assert rest == 0
    expected = contents(whole)
    before = contents(out)
    for cuts in range(10):
        copy = copied(out, tmp_path / f"cut-{cuts}")
        words = command(copy, data)
        assert cut_off(monkeypatch, LayerwiseMixture, "_layer_batch", cuts * batches, words)
        assert contents(copy) == before
        assert layers_computed(monkeypatch, words) == (10 - cuts) * batches
        assert contents(copy) == expected
        assert not (copy / EDIT_STAGING["router"]).exists()


@pytest.mark.parametrize("share", [("--objective", "ridge"), ("--seed", "1"), ("--sample", "20")])
def test_another_command_starts_over(out, shared_family, tmp_path, monkeypatch, share) -> None:
    data = shared_family.seed_file()
    whole = copied(out, tmp_path / "whole")
    everything = layers_computed(monkeypatch, command(whole, data, *share))
    half = everything // 2
    assert cut_off(monkeypatch, LayerwiseMixture, "_layer_batch", half, command(out, data))
    assert layers_computed(monkeypatch, command(out, data, *share)) == everything
    assert contents(out) == contents(whole)


def test_a_run_goes_on_in_its_router_stage(shared_family, merge, monkeypatch) -> None:
    document = shared_family.recipe(router={"data": str(shared_family.seed_file())})
    whole = merge(document, "whole")
    heads = []
    head = LayerwiseMixture.head

    def head_or_cut(self: LayerwiseMixture):
        heads.append(1)
        if len(heads) == 3:
            raise CutOff
        return head(self)

    monkeypatch.setattr(LayerwiseMixture, "head", head_or_cut)
    with pytest.raises(CutOff):
        merge(document, "out")
    assert contents(merge(document, "out")) == contents(whole)
    assert len(heads) == 4  # the losses of two of the three experts were kept


def test_less_may_be_computed_at_a_time_than_before(shared_family, merge, monkeypatch) -> None:
    """Whoever ran out of memory lowers it, and need not start over."""
    router = {"data": str(shared_family.seed_file()), "objective": "ridge"}
    recipe = shared_family.recipe(router=router)
    original = LayerwiseMixture.head
    calls = []

    def head(self: LayerwiseMixture):
        calls.append(1)
        if len(calls) == 3:
            raise CutOff
        return original(self)

    monkeypatch.setattr(LayerwiseMixture, "head", head)
    with pytest.raises(CutOff):
        merge(recipe)
    out = merge(shared_family.recipe(router={**router, "batch_tokens": 100, "memory_gb": 1}))
    assert len(calls) == 4
    assert (
        json.loads((out / "upit_report.json").read_text())["router"]["settings"]["memory_gb"] == 1
    )


def test_another_tokenizer_starts_over(out, shared_family, tmp_path, monkeypatch) -> None:
    """The samples' losses depend on it, and are not mixed."""
    data = shared_family.seed_file()
    template = '{"type": "TemplateProcessing"'
    tokenizer = (out / "tokenizer.json").read_text()
    everything = layers_computed(monkeypatch, command(copied(out, tmp_path / "whole"), data))
    half = everything // 2
    assert cut_off(monkeypatch, LayerwiseMixture, "_layer_batch", half, command(out, data))
    # Without the text's first token.
    changed = json.loads(tokenizer) | {"post_processor": None}
    (out / "tokenizer.json").write_text(json.dumps(changed))
    # The texts are one token shorter, and a batch holds no fewer of them.
    assert everything - 10 <= layers_computed(monkeypatch, command(out, data)) <= everything
    assert template not in (out / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", ["_forwards", "_head", "_backwards"])
def test_refinement_goes_on(out, shared_family, tmp_path, monkeypatch, name: str) -> None:
    data = shared_family.seed_file()
    more = ("--refine-steps", "4", "--refine-tokens", "100", "--objective", "hidden")
    whole = copied(out, tmp_path / "whole")
    done(*command(whole, data, *more))
    assert cut_off(monkeypatch, GateTrainer, name, 2, command(out, data, *more))
    steps = []
    original = GateTrainer.slopes
    monkeypatch.setattr(GateTrainer, "slopes", lambda *args: (steps.append(1), original(*args))[1])
    done(*command(out, data, *more))
    assert len(steps) == 2
    assert contents(out) == contents(whole)
    report = json.loads((out / "upit_report.json").read_text())["router"]
    assert set(report["refined"]) == {"first_step", "last_step"}


def test_training_of_experts_goes_on(out, shared_family, tmp_path, monkeypatch) -> None:
    data = shared_family.seed_file()
    whole = copied(out, tmp_path / "whole")
    done(*command(whole, data, *TRAIN_EXPERTS))
    trained = load_model(whole)
    before = load_model(out)
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert changed == {n for n in trained if ".experts." in n or n.endswith("gate.weight")}
    from upit_merge.output.patch import PatchedCopies

    files = contents(out)
    # The third expert is trained, but not written yet; and the last step, many files' renaming.
    for owner, name, count in ((PatchedCopies, "write", 2), (Progress, "keep", 9)):
        copy = copied(out, tmp_path / f"{name}-{count}")
        assert cut_off(monkeypatch, owner, name, count, command(copy, data, *TRAIN_EXPERTS))
        assert contents(copy) == files
        done(*command(copy, data, *TRAIN_EXPERTS))
        assert contents(copy) == contents(whole)


def test_experts_that_another_process_trained_first_are_kept(
    out, shared_family, tmp_path, monkeypatch
) -> None:
    """The first process may be the last to finish: what is kept need not begin with expert 0."""
    data = shared_family.seed_file()
    whole = copied(out, tmp_path / "whole")
    done(*command(whole, data, *TRAIN_EXPERTS))
    # As if there were two: expert 1 is done, expert 0 is not.
    assert cut_off(monkeypatch, Progress, "keep", 8, command(out, data, *TRAIN_EXPERTS))
    kept = out / EDIT_STAGING["router"] / "progress"
    assert (kept / "tuned-1.safetensors").is_file()
    (kept / "tuned-0.safetensors").unlink()
    done(*command(out, data, *TRAIN_EXPERTS))
    assert contents(out) == contents(whole)


def test_trained_experts_are_refined_as_they_will_be(shared_family, merge, tmp_path) -> None:
    """By the command, beside the model; in a recipe's run, in place."""
    data = shared_family.seed_file()
    upit = {"train_experts": True, "epochs": 2, "lr": 3e-3}
    router = {"data": str(data), "objective": "upit", "upit": upit}
    router["refine"] = {"steps": 2, "tokens": 300}
    whole = merge(shared_family.recipe(router=router), "whole")
    later = merge(shared_family.recipe(), "later")
    words = ["--objective", "upit", "--upit-train-experts", "--upit-epochs", "2"]
    words += ["--upit-lr", "3e-3", "--refine-steps", "2", "--refine-tokens", "300"]
    done(*command(later, data, *words))
    expected = load_model(whole)
    for name, tensor in load_model(later).items():
        assert torch.equal(tensor, expected[name]), name
    found = [json.loads((f / "upit_report.json").read_text())["router"] for f in (whole, later)]
    assert found[0]["refined"] == found[1]["refined"]


def test_a_full_disk_is_told(out, shared_family, monkeypatch) -> None:
    def full(*_arguments) -> None:
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, "No space left" })')

    monkeypatch.setattr(progress, "save_file", full)
    words = command(out, shared_family.seed_file())
    assert "is full; free some space and run the same command again" in refused(*words)


def test_cut_off_between_two_files_it_is_no_model_and_then_the_new_one(
    out, shared_family, tmp_path, monkeypatch
) -> None:
    data = shared_family.seed_file(count=6, name="six.jsonl")  # it is trained on at every step
    words = ("--objective", "upit", "--upit-train-experts", "--upit-epochs", "1")
    whole = copied(out, tmp_path / "whole")
    done(*command(whole, data, *words))
    seen = set()
    for count in range(1, 200):
        copy = copied(out, tmp_path / "copy")
        original, left = os.replace, [count]

        def replace(source, target, copy=copy, left=left, original=original) -> None:
            if Path(target).parent == copy:
                left[0] -= 1
                if left[0] == 0:
                    raise CutOff
            original(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                done(*command(copy, data, *words))
                cut = False
            except CutOff:
                cut = True
        files = contents(copy)
        model = {n for n in files if "safetensors" in n or n == "config.json"}
        if "config.json" in files:
            kind = next(
                kind
                for kind, folder in (("old", out), ("new", whole))
                if all(files[name] == contents(folder)[name] for name in model)
            )
        else:
            kind = "none"
        seen.add(kind)
        if not cut:
            break
        if kind == "none":
            done(*command(copy, data, *words))
            assert contents(copy) == contents(whole)
        shutil.rmtree(copy)
    assert seen == {"none", "new"}


def test_hidden_states_are_kept_only_now_and_then(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "KEEP_SECONDS", 10.0)
    monkeypatch.setattr(progress, "_KEEP_SHARE", 0.05)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    states = PackedStates([3, 4], 2, torch.float32, scratch=tmp_path, budget_bytes=1e9)
    states.rows.copy_(torch.arange(14.0).view(7, 2))
    kept = Progress(tmp_path / "kept", {"a": 1})

    def layer_now() -> int:
        into = PackedStates([3, 4], 2, torch.float32, scratch=tmp_path, budget_bytes=1e9)
        layer, _ = Progress(tmp_path / "kept", {"a": 1}).states("sweep", into)
        assert layer == 0 or torch.equal(into.rows, states.rows)
        return layer

    kept.keep_states("sweep", 1, states, ())
    assert layer_now() == 0
    clock[0] = 11
    kept.keep_states("sweep", 2, states, ())
    assert layer_now() == 2
    clock[0] = 13
    states.rows.mul_(2)
    kept.keep_states("sweep", 3, states, ())
    assert Progress(tmp_path / "kept", {"a": 1}).states("sweep", states)[0] == 2
    clock[0] = 25
    kept.keep_states("sweep", 4, states, ())
    assert layer_now() == 4
    assert len(list((tmp_path / "kept").glob("states-*.bin"))) == 1
    assert Progress(tmp_path / "kept", {"a": 1}).states("another", states)[0] == 0
    monkeypatch.setattr(progress, "free_bytes", lambda _folder: 1)
    clock[0] = 50
    kept.keep_states("sweep", 5, states, ())
    assert layer_now() == 4
    assert Progress(tmp_path / "kept", {"a": 2}).states("sweep", states)[0] == 0
    assert not list((tmp_path / "kept").glob("states-*.bin"))


def test_losses_to_first_order_go_on_where_they_stopped(
    out, shared_family, tmp_path, monkeypatch
) -> None:
    """In the forward sweep, the backward one, the control group and the fits; three groups."""
    monkeypatch.setattr(memory, "GROUP_TOKENS", 40)
    data = shared_family.seed_file()
    more = ("--losses", "first_order", "--batch-tokens", "100")
    whole = copied(out, tmp_path / "whole")
    places = (
        (LayerwiseMixture, "run", 9),
        (MeanSweeps, "_multiply", 1),
        (MeanSweeps, "_multiply", 3),
        (RouterStage, "exact_losses", 0),
        (RouterStage, "_fit", 1),
    )
    layers: list[int] = []
    multiply = MeanSweeps._multiply
    monkeypatch.setattr(
        MeanSweeps, "_multiply", lambda *args: (layers.append(1), multiply(*args))[1]
    )
    done(*command(whole, data, *more))
    all_layers = len(layers)
    assert all_layers >= 2 * 3
    for owner, name, count in places:
        copy = copied(out, tmp_path / f"{name}-{count}")
        words = command(copy, data, *more)
        layers.clear()
        assert cut_off(monkeypatch, owner, name, count, words)
        done(*words)
        # Nothing is multiplied twice but the layer that was cut off.
        assert len(layers) <= all_layers + 1
        assert contents(copy) == contents(whole), name


def test_groups_may_be_smaller_than_before(out, shared_family, monkeypatch, tmp_path) -> None:
    """Whoever ran out of memory lowers what is computed at a time: what is done stays done."""
    monkeypatch.setattr(memory, "GROUP_TOKENS", 40)
    data = shared_family.seed_file()
    more = ("--losses", "first_order")
    whole = copied(out, tmp_path / "whole")
    done(*command(whole, data, *more, "--batch-tokens", "50"))
    words = command(out, data, *more, "--batch-tokens", "100")
    assert cut_off(monkeypatch, MeanSweeps, "_multiply", 3, words)
    done(*command(out, data, *more, "--batch-tokens", "50"))
    expected = load_model(whole)
    for name, tensor in load_model(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-3)
