"""`upit-merge extend` and `shrink`: what changes, what must not, and that nothing is half there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import build_family, byte_tokenizer, train_on
from tests.support.commands import done, extend, invoke, refused, shrink
from tests.support.crash import crash
from tests.support.loading import is_gate, load
from tests.support.lora import save_adapter
from tests.support.naive import PROJECTIONS, load_model
from upit_merge.resizing.grouping import group_experts


def files(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


# ---- extend ------------------------------------------------------------------------------------


def test_an_expert_is_added_and_nothing_else_changes(four, moe) -> None:
    tensors, before = load_model(moe), files(moe)
    done(*extend(moe, four))
    after, dense = load_model(moe), load_model(four.checkpoints[-1])
    for name, tensor in tensors.items():
        found = after[name][: len(tensor)] if is_gate(name) else after[name]
        assert torch.equal(found, tensor), name
    new = {name: tensor for name, tensor in after.items() if name not in tensors}
    assert len(new) == 6
    for layer in range(2):
        for projection, short in PROJECTIONS.items():
            name = f"model.layers.{layer}.block_sparse_moe.experts.4.{short}.weight"
            assert torch.equal(new[name], dense[f"model.layers.{layer}.mlp.{projection}.weight"])
    # Of the files only that of the gates is another one.
    changed = {name for name, digest in files(moe).items() if before.get(name) != digest}
    with safe_open(moe / max(before), framework="pt") as file:
        assert all(map(is_gate, file.keys()))
    assert changed == {max(before), "model-expert-00004.safetensors"}
    model = load(moe)
    assert model.config.num_local_experts == 5
    assert model.generate(torch.tensor([[0, 70, 71]]), max_new_tokens=4).shape[1] > 3
    done("verify", moe)


def test_all_gates_can_be_fitted_anew(four, moe, tmp_path) -> None:
    """To the same bits as `upit-merge router` fits them later."""
    old = {name: t for name, t in load_model(moe).items() if is_gate(name)}
    later = shutil.copytree(moe, tmp_path / "later")
    done(*extend(moe, four, "--all-gates", "--objective", "ridge"))
    done(*extend(later, four))
    alone = load_model(later)
    assert all(torch.equal(alone[name][:4], rows) for name, rows in old.items())
    words = ["--data", four.seed_file(), "--objective", "ridge", "--quiet"]
    done("router", later, *words)
    fitted, expected = load_model(moe), load_model(later)
    assert all(torch.equal(fitted[name], expected[name]) for name in old)
    assert not any(torch.equal(fitted[name][:4], rows) for name, rows in old.items())
    for folder in (moe, later):
        done("verify", folder)
    report = json.loads((later / "upit_report.json").read_text())
    assert [(e["expert"], e["gates"]) for e in report["extensions"]] == [(4, "its own")]


def test_random_gates_stay_random_but_for_one(four, merge) -> None:
    out = merge(four.recipe())
    old = load_model(out)
    told = refused("extend", out, "--model", four.base)
    assert "is not known (its upit_report.json has none); give some with --data" in told
    done("extend", out, "--model", four.base, "--data", four.seed_file(), "--quiet")
    after = load_model(out)
    assert all(torch.equal(after[n][:4], t) for n, t in old.items() if is_gate(n))
    done("verify", out)


def test_twice_and_then_fewer(four, moe) -> None:
    done(*extend(moe, four))
    done("extend", moe, "--model", four.base, "--data", four.seed_file(), "--quiet")
    assert load(moe).config.num_local_experts == 6
    done("verify", moe)
    card = (moe / "README.md").read_text()
    assert "A mixture of 6 experts" in card
    assert "| 5 | base, added later |" in card
    assert card.count("was added later: its gate") == 2
    done("router", moe, "--data", four.seed_file(), "--quiet")
    done("verify", moe)
    done(*shrink(moe, four, 3))
    assert load(moe).config.num_local_experts == 3
    assert not list(moe.glob("model-expert*"))
    present = sorted(path.name for path in moe.iterdir())
    assert json.loads((moe / "upit_report.json").read_text())["files"] == present


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_file_becomes_several(tmp_path, merge, kind: str, dtype: str) -> None:
    family = build_family(tmp_path / "f", count=3, kind=kind, dtype=getattr(torch, dtype))
    models = [str(path) for path in family.checkpoints[:2]]
    out = merge(family.recipe(models=models, router={"data": str(family.seed_file())}))
    before = load_model(out)
    assert files(out).keys() == {"model.safetensors"}
    done(*extend(out, family))
    assert "model.safetensors" not in files(out)
    after = load_model(out)
    assert all(torch.equal(after[n], t) for n, t in before.items() if not is_gate(n))
    load(out, dtype="auto")
    done("verify", out)


def test_files_that_hold_gates_and_more(four, moe) -> None:
    """As in published models, which are not ours: all files have some."""
    tensors = load_model(moe)
    for path in moe.glob("*.safetensors"):
        path.unlink()
    halves = [[n for n in tensors if ("layers.1." in n) == upper] for upper in (False, True)]
    index = {}
    for number, names in enumerate(halves):
        save_file(
            {n: tensors[n] for n in names}, moe / f"model-{number}.safetensors", {"format": "pt"}
        )
        index |= dict.fromkeys(names, f"model-{number}.safetensors")
    (moe / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (moe / "README.md").write_text("# Somebody's own\n")
    (moe / "upit_report.json").unlink()
    done(*extend(moe, four, "--data", four.seed_file()))
    after = load_model(moe)
    assert all(torch.equal(after[n], t) for n, t in tensors.items() if not is_gate(n))
    assert (moe / "README.md").read_text() == "# Somebody's own\n"
    assert not (moe / "upit_report.json").exists()
    load(moe)


def test_a_new_expert_gets_its_kind_of_text(tmp_path, merge) -> None:
    """Checkpoints trained on different text; the third comes later, with text of its kind."""
    family = build_family(tmp_path, count=1, seed=3)
    texts = {"one": "abcabcabc" * 3, "two": "987654321" * 3, "three": "xYzxYzxYz" * 3}
    tokenizer = train_on(family, texts)
    seeds = {}
    for count in (2, 3):
        seeds[count] = tmp_path / f"{count}.jsonl"
        rows = [json.dumps({"text": text}) for text in [*texts.values()][:count]]
        seeds[count].write_text("\n".join(rows * 4) + "\n")
    models = [str(tmp_path / name) for name in ("one", "two")]
    out = merge(family.recipe(models=models, router={"data": str(seeds[2])}))
    before = load(out)
    done("extend", out, "--model", tmp_path / "three", "--data", seeds[3], "--quiet")
    after = load(out)
    for expert, text in enumerate(texts.values()):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = after(ids, labels=ids, output_router_logits=True)
            old_loss = before(ids, labels=ids).loss
        # The first layer sees what the gates were fitted on; the next one a mixture of experts.
        assert (output.router_logits[0].argmax(-1)[1:] == expert).float().mean() > 0.9
        assert output.loss < old_loss + (0.1 if expert < 2 else -1)


# ---- shrink ------------------------------------------------------------------------------------


def naive_groups(out: Path, texts: list[str], count: int) -> list[list[list[int]]]:
    """Groups by layer, from the whole model's router logits, one text at a time."""
    model, tokenizer = load(out), byte_tokenizer()
    logits: list[list[np.ndarray]] = [[] for _ in model.model.layers]
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            for layer, rows in enumerate(model(ids, output_router_logits=True).router_logits):
                logits[layer].append(rows.double().numpy())
    found = []
    for parts in logits:
        rows = np.concatenate(parts)
        top = np.argsort(-rows, axis=1)[:, :2]
        used = np.bincount(top.ravel(), minlength=rows.shape[1])
        best = sorted(np.argsort(-used, kind="stable")[:count].tolist())
        groups = {expert: [expert] for expert in best}
        for expert in set(range(rows.shape[1])) - set(best):
            a = rows[:, expert]
            likeness = [a @ rows[:, b] / np.sqrt((a @ a) * (rows[:, b] @ rows[:, b])) for b in best]
            groups[best[int(np.argmax(likeness))]].append(expert)
        found.append(
            [(members, used[members] / used[members].sum()) for members in groups.values()]
        )
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_experts_become_the_means_of_their_groups(tmp_path, merge, kind: str) -> None:
    family = build_family(tmp_path / "f", count=3, kind=kind)
    seeds = family.seed_file()
    out = merge(family.recipe(parameters={"num_experts": 6}, router={"data": str(seeds)}))
    texts = [json.loads(line)["text"] for line in seeds.read_text().splitlines()]
    expected, before = naive_groups(out, texts, 3), load_model(out)
    done(*shrink(out, family, 3))
    after = load_model(out)
    untouched = 0
    for layer, groups in enumerate(expected):
        block = "mlp" if kind == "qwen3" else "block_sparse_moe"
        prefix = f"model.layers.{layer}.{block}."
        for index, (members, shares) in enumerate(groups):
            for projection, short in PROJECTIONS.items():
                last = f"{projection if kind == 'qwen3' else short}.weight"
                parts = [before[f"{prefix}experts.{m}.{last}"] for m in members]
                found = after[f"{prefix}experts.{index}.{last}"]
                if len(members) == 1:
                    assert torch.equal(found, parts[0])
                    untouched += 1
                mean = sum(float(share) * part for share, part in zip(shares, parts, strict=True))
                torch.testing.assert_close(found, mean)
            rows = before[f"{prefix}gate.weight"][members]
            mean = (torch.tensor(shares).float().unsqueeze(1) * rows).sum(0)
            torch.testing.assert_close(after[f"{prefix}gate.weight"][index], mean)
    assert untouched
    assert all(
        torch.equal(after[n], t)
        for n, t in before.items()
        if ".experts." not in n and not is_gate(n)
    )
    record = json.loads((out / "upit_report.json").read_text())["shrunk"][0]
    assert (record["from"], record["to"]) == (6, 3)
    assert load(out).generate(torch.tensor([[0, 70, 71]]), max_new_tokens=4).shape[1] > 3
    assert "was 6" not in (out / "README.md").read_text()
    assert "had 6 experts per layer" in (out / "README.md").read_text()
    assert "verify the model before that" in refused("verify", out)


def test_groups_of_experts_nobody_chose() -> None:
    """Two dominant experts; the idle ones join by likeness, with plain means among themselves."""
    chosen = torch.tensor([0.0, 5.0, 0.0, 7.0])
    logits = torch.tensor([[1.0, 0.0, 0.1, 1.0], [0.0, 1.0, 1.0, 0.1]], dtype=torch.float64)
    groups = group_experts(chosen, logits.T @ logits, 2)
    assert [group.members for group in groups] == [(1, 2), (3, 0)]
    assert [group.shares for group in groups] == [(1.0, 0.0), (1.0, 0.0)]
    idle = group_experts(torch.zeros(4), logits.T @ logits, 1)
    assert [(group.members, group.shares) for group in idle] == [((0, 1, 2, 3), (0.25,) * 4)]


# ---- cut off -----------------------------------------------------------------------------------


def test_killed_at_every_change_of_a_file_and_at_any_time(tmp_path: Path) -> None:
    """The model is the old one, none, or the new one; the same command ends with the new one."""
    trials = crash("edit_killed", tmp_path)
    kills = [trial for trial in trials if trial["status"] == -signal.SIGKILL]
    assert len(kills) > 40
    for trial in trials:
        assert trial["wrong"] == [], trial
        assert (trial.get("finished", 0), trial["identical"]) == (0, True), trial
    assert any("finished" not in trial for trial in kills)  # cut off after the last change


def test_another_command_does_not_touch_what_is_half_way(four, moe, monkeypatch) -> None:
    words = extend(moe, four)

    class CutOff(BaseException):
        pass

    def replace_but_weights(source: Path, target: Path) -> None:
        if target.parent == moe:
            raise CutOff
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", replace_but_weights)
    with pytest.raises(CutOff):
        invoke(*words)
    monkeypatch.undo()
    assert not (moe / "config.json").exists()
    for other in (shrink(moe, four, 2), ["router", moe, "--data", four.seed_file()]):
        assert refused(*other) == (
            f"What `upit-merge extend` makes is half-way into the model in {moe}; give the command "
            "that was interrupted again first."
        )
    done(*words)
    load(moe)


# ---- adapters ----------------------------------------------------------------------------------


def test_an_adapter_becomes_an_expert(four, moe, tmp_path) -> None:
    """Its base comes with it; alone it is refused."""
    adapter = tmp_path / "adapter"
    merged = save_adapter(four.base, adapter, target_modules=["gate_proj", "up_proj", "down_proj"])
    told = refused("extend", moe, "--model", adapter, "--quiet")
    assert told == f"Checkpoint {adapter} is an adapter; give its base too, as BASE+{adapter}."
    done("extend", moe, "--model", f"{four.base}+{adapter}", "--quiet")
    after = load_model(moe)
    for layer in range(2):
        for projection, short in PROJECTIONS.items():
            found = after[f"model.layers.{layer}.block_sparse_moe.experts.4.{short}.weight"]
            expected = merged[f"model.layers.{layer}.mlp.{projection}.weight"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert "| 4 | adapter, added later |" in (moe / "README.md").read_text()
    done("verify", moe)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cuda_does_what_the_cpu_does(tmp_path, merge, kind: str) -> None:
    """The same experts; gates within rounding."""
    family = build_family(tmp_path / "f", count=4, kind=kind)
    models = [str(path) for path in family.checkpoints[:3]]
    router = {"data": str(family.seed_file())}
    out = merge(family.recipe(models=models, parameters={"num_experts": 4}, router=router))
    found = []
    for device in ("cpu", "cuda"):
        folder = shutil.copytree(out, tmp_path / device / "out")
        done(*extend(folder, family, "--device", device))
        done(*shrink(folder, family, 3, "--device", device))
        found.append(load_model(folder))
    for name, tensor in found[0].items():
        if is_gate(name):
            torch.testing.assert_close(found[1][name], tensor, rtol=0.02, atol=1e-3)
        elif ".experts." not in name:
            assert torch.equal(found[1][name], tensor)
        else:
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4)
