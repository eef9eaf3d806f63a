"""Gates of a few lines per expert: from a recipe, from a file, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import build_family, byte_tokenizer, train_on
from tests.support.commands import done, refused
from tests.support.naive import load_model
from upit_merge.commands.router import parse_settings
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.router import RouterSettings
from upit_merge.data.prompts import PromptSource, prompt_examples
from upit_merge.errors import UpitError
from upit_merge.pipeline.config import load_pipeline
from upit_merge.router.pretrain import load_seed_set

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
    words = ("--control", "--no-experts", "--no-rivals", "--quiet")
    done("evaluate", out, "--data", family.seed_file(), *words)
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
    examples = prompt_examples({1: ["b", CHAT], 0: ["a"]}, PromptSource())
    assert [example.label for example in examples] == [0, 1, 1]
    assert examples[2].messages == CHAT


def test_numbers_may_be_texts_as_in_json() -> None:
    assert RouterSettings(prompts={"1": ["b"], 0: ["a"]}).prompts == {1: ["b"], 0: ["a"]}


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (
            {0: ["a"], 1: ["b"]},
            "{} has none for expert(s) 2 of 3, which the gates would not choose; write some for "
            "each, or use data.",
        ),
        (
            {**PROMPTS, 3: ["d"]},
            "{} has expert 3, but the experts are numbered from 0 to 2; correct its number.",
        ),
    ],
)
def test_every_expert_needs_prompts(family, merge, prompts, told) -> None:
    recipe = family.write_recipe(family.recipe(router={"prompts": prompts}))
    out = family.root / "out"
    assert refused("run", recipe, out, "--quiet") == told.format("router.prompts")
    assert not out.exists()
    out = merge(family.recipe())
    path = family.root / "prompts.json"
    path.write_text(json.dumps(prompts))
    before = load_model(out)
    assert refused("router", out, "--prompts", path, "--quiet") == told.format(path)
    assert all(torch.equal(t, before[n]) for n, t in load_model(out).items())


# What is written, and the sentence: of the whole, or of those of expert 0.
WRONG = [
    ({"zero": ["a"]}, "{whole} has the key 'zero', expected an expert's number, from 0."),
    ({"-1": ["a"]}, "{whole} has the key '-1', expected an expert's number, from 0."),
    ({0: ["a"], "00": ["b"]}, "{whole} has expert 0 twice; put its prompts together."),
    ({}, "{whole} is empty; write a few lines for each expert."),
    ({0: "a"}, "{own} is 'a', expected a list of prompts, at least one."),
    ({0: []}, "{own} is [], expected a list of prompts, at least one."),
    ({0: None}, "{own} is None, expected a list of prompts, at least one."),
    ({0: [" "]}, "{own} holds ' ', expected a text, or a list of {{role, content}}."),
    ({0: [3]}, "{own} holds 3, expected a text, or a list of {{role, content}}."),
    ({0: [[]]}, "{own} holds [], expected a text, or a list of {{role, content}}."),
    ({0: [["a"]]}, "{own} holds ['a'], expected a text, or a list of {{role, content}}."),
    (
        {0: [[{1: "a"}]]},
        "{own} holds [{{1: 'a'}}], expected a text, or a list of {{role, content}}.",
    ),
]


IN_RECIPE = {"whole": "router.prompts", "own": "router.prompts.0"}


def as_file(path: Path) -> dict[str, str]:
    return {"whole": str(path), "own": f"{path}: expert 0"}


@pytest.mark.parametrize(("prompts", "told"), WRONG)
def test_wrong_prompts_are_said_to_be_where_they_are(tmp_path, prompts, told) -> None:
    """In a recipe, or in a file, which need not be of a name that no message begins with."""
    recipe = {"merge_method": "upit", "base_model": "b", "models": [{"model": "m"}]}
    recipe |= {"parameters": {}, "router": {"prompts": prompts}}
    with pytest.raises(UpitError) as caught:
        parse_recipe(recipe, "r.yml")
    assert caught.value.message == f"r.yml: {told.format(**IN_RECIPE)}"
    for name in ("router.prompts.yml", "data", "p {0}.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(prompts))
        message = refused("router", tmp_path, "--prompts", path)
        assert message == told.format(**as_file(path))
    if "{1:" in str(prompts):  # keys of JSON are texts
        return
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts))
    assert refused("router", tmp_path, "--prompts", path) == told.format(**as_file(path))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "p.yml",
            "- a",
            "{} is not a mapping of experts' numbers to lists of prompts; write `0: "
            '["a prompt", "another"]` and so on.',
        ),
        ("p.yml", "0: [", "{} is not valid YAML (line 1, column 5: while parsing a flow node"),
        (
            "p.yml",
            "0: [a]\n1: [b]\n0: [c]",
            "{} is not valid YAML (line 3, column 1: the key 0 is given twice); correct the file.",
        ),
        ("p.json", "[1]", "{} is not a JSON object; correct the file."),
        ("p.json", '{"0": [', "{} is not valid JSON (Expecting value: line 1 column 8"),
        (
            "p.json",
            '{"0": ["a"], "1": ["b"], "0": ["c"]}',
            "{} is not valid JSON (the key '0' is given twice); correct the file.",
        ),
        (
            "p.json",
            '{"0": [[{"role": "user", "content": "a", "content": "b"}]]}',
            "{} is not valid JSON (the key 'content' is given twice); correct the file.",
        ),
        ("p.json", '{"0": ["\\ud800"]}', r"{} holds '\ud800', half of a character; correct the"),
    ],
)
def test_a_file_that_holds_no_prompts_at_all(tmp_path, name, text, told) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert refused("router", tmp_path, "--prompts", path).startswith(told.format(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe without a router, and what it makes; nobody changes either."""
    family = build_family(tmp_path_factory.mktemp("plain"))
    out = family.root / "out"
    recipe = family.write_recipe(family.recipe())
    done("run", recipe, out, "--quiet")
    return recipe, out


SAID = {"role": "user", "content": "Hi"}
# What only the tokenizer, or the records' reader, finds.
UNREADABLE = [
    (CHAT, "{} no. 1 is a conversation, but the tokenizer has no chat template; use a"),
    ([{"role": "user"}], "{} no. 1 has "),
    ([{"role": 3, "content": "Hi"}], "{} no. 1 has "),
    ([SAID, {"role": "user", "content": [{"type": "image"}]}], "{} no. 1 has "),
]


@pytest.mark.parametrize(("prompt", "told"), UNREADABLE)
def test_what_is_no_conversation_is_said_to_be_where_it_is(plain, tmp_path, prompt, told) -> None:
    recipe, out = plain
    prompts = {0: [prompt], 1: ["b"], 2: ["c"]}
    own = tmp_path / "recipe.yml"
    document = yaml.safe_load(recipe.read_text())
    own.write_text(yaml.safe_dump({**document, "router": {"prompts": prompts}}))
    message = refused("run", own, tmp_path / "out", "--quiet")
    assert message.startswith(told.format("router.prompts.0"))
    path = tmp_path / "lines.yml"
    path.write_text(yaml.safe_dump(prompts))
    of_file = refused("router", out, "--prompts", path, "--quiet")
    assert of_file == message.replace("router.prompts.0", f"{path}: expert 0")


def test_prompts_too_short_for_what_follows(plain, tmp_path) -> None:
    recipe, _out = plain
    prompts = {0: ["a"], 1: ["b"], 2: ["c"]}
    router = {"prompts": prompts, "refine": {"steps": 1}}
    told = "No prompt of {} is left (3 samples dropped as too short); give longer ones or raise "
    own = tmp_path / "recipe.yml"
    document = yaml.safe_load(recipe.read_text())
    own.write_text(yaml.safe_dump({**document, "router": router}))
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = None
    with pytest.raises(UpitError) as caught:
        load_seed_set(parse_recipe(yaml.safe_load(own.read_text())).router, tokenizer, **LIMITS)
    assert caught.value.message.startswith(told.format("router.prompts"))
    path = tmp_path / "lines.yml"
    path.write_text(yaml.safe_dump(prompts))
    settings = parse_settings({"prompts": str(path), "refine_steps": "1"})
    with pytest.raises(UpitError) as caught:
        load_seed_set(settings, tokenizer, **LIMITS)
    assert caught.value.message.startswith(told.format(path))


LIMITS = {"context": 100, "vocab_size": 259, "seed": 0}


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
