"""`upit-merge shrink --how drop`: REAP's scores, what is kept to the bit, gates fitted anew."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import build_family, byte_tokenizer
from tests.support.cards import report_of
from tests.support.commands import done, extend, refused, shrink
from tests.support.crash import crash
from tests.support.families import FORMAT_KINDS as KINDS
from tests.support.loading import is_gate, load
from tests.support.naive import load_model
from upit_merge.commands import router as router_command
from upit_merge.commands import shrink as shrink_command
from upit_merge.resizing.scores import kept_experts

PER_EXPERT = ("e_score_correction_bias", "expert_bias", "per_expert_scale")
DROP = ("--how", "drop")


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "upit_report.json").read_text())["shrunk"][-1]


def naive_scores(out: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, scores), (layers, experts), of transformers' whole model, token by token."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    seen: list[list[tuple[int, float, float]]] = []

    def watch(found: list[tuple[int, float, float]]) -> Any:
        def look(experts: Any, inputs: Any) -> None:
            for x, chosen, weights in zip(*inputs, strict=True):
                for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                    y = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
                    found.append((expert, weight, float(y.norm())))

        return look

    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            seen.append([])
            module.register_forward_pre_hook(watch(seen[-1]))
            count = len(module.down_proj)
    for text in texts:
        with torch.no_grad():
            model(torch.tensor([byte_tokenizer()(text)["input_ids"]]))
    tokens, sums = torch.zeros(len(seen), count), torch.zeros(len(seen), count)
    for layer, found in enumerate(seen):
        for expert, weight, norm in found:
            tokens[layer, expert] += 1
            sums[layer, expert] += weight * norm
    return tokens, sums / tokens.clamp(min=1)


def spread_what_routers_have(out: Path) -> None:
    """Give what a gate has one of for every expert values of their own, as training does."""
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(PER_EXPERT):
                tensor.copy_(torch.rand(tensor.shape, generator=torch.manual_seed(3)) * 0.3)
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", *KINDS])
def test_the_least_go_and_the_others_keep_every_bit(tmp_path, merge, kind: str) -> None:
    """In every format: scores by a naive implementation on transformers' whole model."""
    more = {"mixtral": ("llama", "mixtral", {}, {}), "qwen3_moe": ("qwen3", "qwen3_moe", {}, {})}
    dense, architecture, settings, parameters = {**KINDS, **more}[kind]
    family = build_family(tmp_path / "f", kind=dense, noise=0.2, **settings)
    parameters = {"num_experts": 5, **parameters}
    out = merge(family.recipe(architecture=architecture, parameters=parameters))
    spread_what_routers_have(out)
    before = load(out, dtype="auto").state_dict()
    few = family.seed_file(9, "few.jsonl")
    texts = [json.loads(line)["text"] for line in few.read_text().splitlines()]
    tokens, scores = naive_scores(out, texts)
    done(*shrink(out, family, 3, *DROP, "--data", few, "--batch-tokens", 100))
    record = record_of(out)
    torch.testing.assert_close(torch.tensor(record["scores"]), scores, rtol=2e-4, atol=1e-6)
    expected = [
        sorted(sorted(range(5), key=lambda e: (-s[e], -t[e], e))[:3])
        for s, t in zip(scores.tolist(), tokens.tolist(), strict=True)
    ]
    kept = [[members[0] for members in row] for row in record["groups"]]
    assert kept == expected
    after, first = load(out, dtype="auto").state_dict(), parameters.get("dense_layers", 0)
    changed = 0
    for name, tensor in before.items():
        found = after[name]
        if found.shape != tensor.shape:
            axis = next(i for i, n in enumerate(tensor.shape) if n != found.shape[i])
            layer = int(name.split("layers.")[1].split(".")[0]) - first
            tensor, changed = tensor.index_select(axis, torch.tensor(kept[layer])), changed + 1
        assert torch.equal(found, tensor), name
    assert changed >= 3 * len(kept)
    assert load(out).generate(torch.tensor([[0, 70, 71]]), max_new_tokens=4).shape[1] > 3


def test_ties_and_experts_nobody_chose() -> None:
    scores = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0])
    tokens = torch.tensor([0.0, 3.0, 5.0, 0.0, 3.0])
    assert kept_experts(tokens, scores, 4) == [0, 1, 2, 4]
    assert kept_experts(tokens, scores, 2) == [1, 2]
    assert kept_experts(tokens, scores, 1) == [2]
    # A score of zero is one of those that are never chosen, or that give nothing.
    assert kept_experts(torch.tensor([0.0, 4.0]), torch.zeros(2), 1) == [1]


@pytest.mark.parametrize("fast", [False, True])
def test_refitted_gates_are_those_of_router(four, moe, tmp_path, monkeypatch, fast) -> None:
    """One command, to the same bits as two, on CPUs that multiply in bfloat16 and on others."""
    for command in (router_command, shrink_command):
        monkeypatch.setattr(command, "has_fast_bfloat16", lambda: fast)
    later = shutil.copytree(moe, tmp_path / "later")
    done(*shrink(moe, four, 3, *DROP, "--refit"))
    done(*shrink(later, four, 3, *DROP))
    apart = load_model(later)
    done("router", later, "--data", four.seed_file(), "--quiet")
    fitted, expected = load_model(moe), load_model(later)
    assert fitted.keys() == expected.keys()
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)
    assert not all(torch.equal(apart[name], expected[name]) for name in expected if is_gate(name))
    card = (moe / "README.md").read_text()
    assert "They were fitted anew when 4 experts became 3." in card
    table = card.split("| expert | seed samples")[1]
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["0", "1", "2"]
    told = [json.loads((f / "upit_report.json").read_text())["router"] for f in (moe, later)]
    assert told[0]["gates_sha256"] == told[1]["gates_sha256"]
    assert told[0]["compute"] == told[1]["compute"] == ("bfloat16" if fast else "float32")


def test_merged_ones_are_refitted_with_what_is_recorded(four, moe, tmp_path) -> None:
    words = ["--objective", "ridge", "--temperature", "0.5", "--data", four.seed_file(), "--quiet"]
    done("router", moe, *words)
    later = shutil.copytree(moe, tmp_path / "later")
    done(*shrink(moe, four, 2, "--refit"))
    done(*shrink(later, four, 2))
    done("router", later, *words)
    fitted, expected = load_model(moe), load_model(later)
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)


def test_gates_fitted_to_prompts_are_refitted_to_the_data(four, moe, tmp_path) -> None:
    prompts = tmp_path / "prompts.yml"
    prompts.write_text("".join(f"{expert}: [sample {expert}]\n" for expert in range(4)))
    done("router", moe, "--prompts", prompts, "--quiet")
    done(*shrink(moe, four, 2, *DROP, "--refit"))
    settings = report_of(moe)["router"]["settings"]
    assert (settings["prompts"], settings["data"]) == (None, str(four.seed_file()))


def test_what_others_make_of_it(four, moe) -> None:
    """The card maps the experts' numbers; verify refuses; extend, and more dropping, go on."""
    done(*shrink(moe, four, 3, *DROP))
    record = record_of(moe)
    assert (record["how"], record["from"], record["to"]) == ("drop", 4, 3)
    card = (moe / "README.md").read_text()
    assert "Of 4 experts per layer 3 are left, as they were" in card
    for old in {members[0] for row in record["groups"] for members in row}:
        count = sum([old] in row for row in record["groups"])
        assert f"| {old} | {count} of 2 | expert " in card
    assert "The experts before some were dropped" in card
    assert "The gates are what is left of them since some experts were dropped." in card
    assert "seed samples |" not in card
    told = refused("verify", moe)
    assert told.startswith(f"Some experts of {moe} were dropped by `upit-merge shrink`, so")
    done(*extend(moe, four))
    assert "Expert 3 is " in (moe / "README.md").read_text()
    done(*shrink(moe, four, 2, *DROP))
    report = json.loads((moe / "upit_report.json").read_text())
    assert [(r["from"], r["to"]) for r in report["shrunk"]] == [(4, 3), (4, 2)]
    assert load(moe).config.num_local_experts == 2
    done("page", moe)


def test_bad_numbers_change_nothing(four, moe) -> None:
    before = {path.name: path.read_bytes() for path in moe.iterdir() if path.is_file()}
    assert "cannot be merged" not in (told := refused(*shrink(moe, four, 4, *DROP)))
    assert told == f"{moe} has 4 experts per layer, which cannot become 4; give a lower --experts."
    told = refused(*shrink(moe, four, 1, *DROP))
    assert "routes a token to 2 experts, so that 1 would be too few" in told
    assert {path.name: path.read_bytes() for path in moe.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("how", ["merge", "drop"])
def test_a_router_that_needs_two_experts_keeps_two(tmp_path, merge, how: str) -> None:
    family = build_family(tmp_path / "f", kind="qwen2", count=2)
    parameters = {"num_experts": 3, "experts_per_token": 1}
    out = merge(family.recipe(architecture="glm4_moe", parameters=parameters))
    told = refused(*shrink(out, family, 1, "--how", how))
    assert told.startswith("The router of a GLM-4-MoE needs 2 experts, so that 1 would be too few")
    done(*shrink(out, family, 2, "--how", how))
    assert load(out).generate(torch.tensor([[0, 70, 71]]), max_new_tokens=4).shape[1] > 3


def test_killed_while_experts_go_and_gates_are_fitted(tmp_path: Path) -> None:
    trials = crash("drop_killed", tmp_path)
    kills = [trial for trial in trials if trial["status"] == -signal.SIGKILL]
    assert len(kills) > 10
    for trial in trials:
        assert trial["wrong"] == [], trial
        assert (trial.get("finished", 0), trial["identical"]) == (0, True), trial
