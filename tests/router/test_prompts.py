"""Gates of a few lines per expert: from a recipe, from a file, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import build_family, train_on
from tests.support.commands import done, refused
from tests.support.naive import load_model
from upit_merge.config.router import RouterSettings
from upit_merge.data.prompts import prompt_examples
from upit_merge.errors import UpitError
from upit_merge.pipeline.config import load_pipeline

CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
PROMPTS = {0: ["Write a function", "def f(x):"], 1: ["Hello there"], 2: ["7 times 8", "1 + 1 ="]}


@pytest.fixture
def no_losses(monkeypatch) -> None:
    for name in ("losses", "exact_losses"):
        monkeypatch.setattr(f"upit_merge.router.stage.RouterStage.{name}", None)


def report_of(out: Path) -> dict:
    return json.loads((out / "upit_report.json").read_text())["router"]


def as_data(family, prompts: dict[int, list[str]]) -> dict:
    """The same lines as data with a column, which is an independent way to the same gates."""
    path = family.root / "lines.jsonl"
    rows = [{"text": t, "expert": e} for e, texts in sorted(prompts.items()) for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(path), "assign": {"column": "expert"}}


@pytest.mark.parametrize("objective", ["hidden", "ridge", "softmax", "one_vs_rest", "upit"])
def test_prompts_are_samples_that_name_their_expert(family, merge, no_losses, objective) -> None:
    given = {"objective": objective}
    out = merge(family.recipe(router={"prompts": PROMPTS, **given}))
    other = merge(family.recipe(router={**as_data(family, PROMPTS), **given}), "other")
    expected = load_model(other)
    for name, tensor in load_model(out).items():
        assert torch.equal(tensor, expected[name]), name


def test_everything_that_follows_a_run_knows_prompts(family, merge, no_losses) -> None:
    recipe = family.write_recipe(family.recipe(router={"prompts": PROMPTS}))
    done("plan", recipe, family.root / "planned")
    out = family.root / "out"
    printed = done("run", recipe, out).output
    assert "5 samples" in printed
    card = (out / "README.md").read_text()
    assert "on 5 prompts" in card
    assert "each written for its expert" in card
    assert [row["samples"] for row in report_of(out)["buckets"]["experts"]] == [2, 1, 2]
    assert "same bits" in done("verify", out, "--gates").output
    done("page", out)
    done("evaluate", out, "--data", family.seed_file(), "--control", "--no-experts", "--quiet")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(layer.mlp.gate.weight.norm(dim=1).min() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("suffix", [".json", ".yml"])
def test_a_file_of_prompts_gives_what_the_recipe_would_have(family, merge, suffix) -> None:
    expected = load_model(merge(family.recipe(router={"prompts": PROMPTS})))
    out, path = merge(family.recipe(), "later"), family.root / f"prompts{suffix}"
    path.write_text(json.dumps(PROMPTS) if suffix == ".json" else yaml.safe_dump(PROMPTS))
    done("router", out, "--prompts", path, "--quiet")
    for name, tensor in load_model(out).items():
        assert torch.equal(tensor, expected[name]), name
    assert "same bits" in done("verify", out, "--gates").output
    message = refused("extend", out, "--model", family.base, "--quiet")
    assert "none of which is the new expert's; give data with --data" in message


def test_prompts_route_text_to_the_expert_that_knows_it(tmp_path, merge) -> None:
    """Two checkpoints trained on different text, told apart by two lines of each."""
    family = build_family(tmp_path, count=1, seed=3)
    texts = {"one": "abcabcabc" * 3, "two": "987654321" * 3}
    tokenizer = train_on(family, texts)
    folders = [str(family.root / name) for name in texts]
    prompts = {0: ["abcab", "cabc"], 1: ["9876", "4321"]}
    out = merge(family.recipe(models=folders, router={"prompts": prompts}))
    moe = AutoModelForCausalLM.from_pretrained(out).eval()
    for expert, text in enumerate(texts.values()):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = moe(ids, output_router_logits=True)
        for layer_logits in output.router_logits:
            assert (layer_logits.argmax(-1)[1:] == expert).float().mean() > 0.9


def test_a_conversation_is_written_by_the_chat_template(family, merge) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    prompts = {**PROMPTS, 1: [CHAT]}
    out = merge(family.recipe(chat_template=template, router={"prompts": prompts}))
    # Of bytes: the tokenizer puts <s> before a text, and the template does not.
    texts = sum(len(text) + 1 for expert in (0, 2) for text in PROMPTS[expert])
    assert report_of(out)["data"]["tokens"] == texts + len("[user]What is 2+2?[assistant]4")
    with pytest.raises(UpitError) as caught:
        merge(family.recipe(router={"prompts": prompts}), "b")
    message = caught.value.message
    assert "router.prompts.1 no. 1 is a conversation, but the tokenizer has no chat" in message


def test_a_single_token_is_a_prompt(family, merge) -> None:
    prompts = {0: ["a"], 1: ["b"], 2: ["c"]}
    out = merge(family.recipe(router={"prompts": prompts}))
    assert report_of(out)["data"]["samples"] == 3


def test_labels_are_the_experts() -> None:
    examples = prompt_examples({1: ["b", CHAT], 0: ["a"]})
    assert [example.label for example in examples] == [0, 1, 1]
    assert examples[2].messages == CHAT


def test_numbers_may_be_texts_as_in_json() -> None:
    assert RouterSettings(prompts={"1": ["b"], 0: ["a"]}).prompts == {1: ["b"], 0: ["a"]}


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ({0: ["a"], 1: ["b"]}, "router.prompts has none for expert(s) 2 of 3, which the gates"),
        ({**PROMPTS, 3: ["d"]}, "has expert 3, but the experts are numbered from 0 to 2"),
    ],
)
def test_every_expert_needs_prompts(family, merge, prompts, told) -> None:
    with pytest.raises(UpitError) as caught:
        merge(family.recipe(router={"prompts": prompts}))
    assert told in caught.value.message
    assert not (family.root.parent / "out").exists()
    out = merge(family.recipe())
    path = family.root / "prompts.json"
    path.write_text(json.dumps(prompts))
    before = load_model(out)
    assert told in refused("router", out, "--prompts", path, "--quiet")
    assert all(torch.equal(t, before[n]) for n, t in load_model(out).items())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a", "is not a mapping of experts' numbers to lists of prompts"),
        ("zero: [a]", "prompts has the key 'zero', expected an expert's number, from 0."),
        ("{}", "prompts is empty; write a few lines for each expert."),
        ("0: a", "prompts.0 is 'a', expected a list of prompts, at least one."),
        ("0: []", "prompts.0 is [], expected a list of prompts, at least one."),
        ("0: [' ']", "prompts.0 holds ' ', expected a text, or a list of {role, content}."),
        ("0: [3]", "prompts.0 holds 3, expected a text, or a list of {role, content}."),
        ("{0: [a], '00': [b]}", "prompts has expert 0 twice; put its prompts together."),
        ("0: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_of_prompts_is_named(family, merge, text, told) -> None:
    path = family.root / "prompts.yml"
    path.write_text(text)
    message = refused("router", family.root, "--prompts", path)
    assert str(path) in message
    assert told in message


def test_neither_or_both_of_data_and_prompts(family) -> None:
    path = family.root / "prompts.yml"
    path.write_text(yaml.safe_dump(PROMPTS))
    assert "--data is missing; name the seed data with it" in refused("router", family.root)
    both = refused("router", family.root, "--prompts", path, "--data", "x.jsonl")
    assert "data and prompts are both given; remove one of them" in both
    missing = refused("router", family.root, "--prompts", path.with_name("none.json"))
    assert "none.json does not exist" in missing


def test_a_pipeline_may_have_prompts(family) -> None:
    """With data for its trainings or without; that is then not the router's."""
    path = family.root / "pipeline.yml"
    document = {
        "base_model": str(family.base),
        "output": str(family.root / "run"),
        "checkpoints": str(family.root / "sft" / "checkpoint-*"),
        "router": {"prompts": PROMPTS},
    }
    for extra in ({}, {"data": str(family.seed_file())}):
        path.write_text(yaml.safe_dump({**document, **extra}))
        router = load_pipeline(path).parsed_recipe().router
        assert router is not None
        assert (router.prompts, router.data) == (PROMPTS, None)
    done("pipeline", path, "--quiet")
    assert report_of(load_pipeline(path).merged)["data"]["samples"] == 5
