"""Bad recipes: every key with its wrong values, and every other sentence a recipe is refused with.

What a run says of models and data that a recipe names is in `tests/commands/test_bad_input.py`;
recipes made to harm are in `test_hostile_recipes.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.support.recipes import Document, document, parameters, router
from tests.support.spoilt import assert_sentence, refusal
from upit_merge.config.card import CardSettings
from upit_merge.config.recipe import (
    Parameters,
    Recipe,
    load_recipe,
    parse_recipe,
    parse_recipe_text,
)
from upit_merge.config.router import ByColumn, Refinement, RouterSettings, UpitObjective
from upit_merge.models.formats import FORMATS

BLOCKS = {
    "parameters": Parameters,
    "card": CardSettings,
    "router": RouterSettings,
    "router.assign": ByColumn,
    "router.upit": UpitObjective,
    "router.refine": Refinement,
}


def entry(**keys: Any) -> Document:
    return document(models=[{"model": "one"}, {"model": "two", **keys}])


# What a block holds beside the key that is wrong.
BESIDE = {"router": {"data": "seed.jsonl"}, "assign": {"column": "c"}, "refine": {"steps": 10}}


def with_value(key: str, value: Any) -> Document:
    """A good recipe but for this value of this key, such as `models.1.parameters.density`."""
    recipe = document()
    *blocks, last = key.split(".")
    block: Any = recipe
    for name in blocks:
        if isinstance(block, list):
            block = block[int(name)]
        else:
            block = block.setdefault(name, copy.deepcopy(BESIDE.get(name, {})))
    block[int(last) if isinstance(block, list) else last] = value
    return recipe


# ---- wrong values --------------------------------------------------------------------------

DENSITY = "a number in (0, 1], a list of them over the layers, or a list of filter: and value:"
MODELS = "a list of `- model: FOLDER` entries, at least one"
ASSIGN = "lowest, balanced, shuffled, or column: NAME"
SAMPLE = "a whole number of samples, or a fraction in (0, 1] such as 0.01"
DTYPES = "'float32', 'float16' or 'bfloat16'"
FILE = "a mapping with at least data: FILE"
MAPPING = "a mapping of parameter names to values"
POSITIVE = "a number above 0"
PARTIAL = "a number from 0 to below 1, such as 0.5"
TEXT = "a text"
NOT_EMPTY = "a text that is not empty"
WHOLE = "a whole number"

# The key, what the sentence says it expects, and values it refuses.
WRONG_VALUES: list[tuple[str, str, list[Any]]] = [
    ("base_model", TEXT, [3, None, ["x"]]),
    ("base_model", NOT_EMPTY, [""]),
    ("models", MODELS, [[], None, "./sft/*", {"model": "one"}]),
    ("models.0", "an entry of the form `- model: FOLDER`", ["one"]),
    ("models.1.model", TEXT, [3]),
    ("models.1.model", NOT_EMPTY, [""]),
    ("models.1.parameters", MAPPING, [None]),
    ("models.1.parameters.density", DENSITY, [0]),
    ("architecture", ", ".join(["auto", *FORMATS]), ["gpt", "qwen2_moe"]),
    ("architecture", TEXT, [8]),
    ("dtype", DTYPES, ["int8", 16]),
    ("out_dtype", DTYPES, ["fp16"]),
    ("tokenizer_source", TEXT, [3]),
    ("chat_template", TEXT, [["x"]]),
    ("parameters", MAPPING, [None, []]),
    ("card", "a mapping such as {license: apache-2.0}", ["mit", []]),
    ("card.name", TEXT, [3]),
    ("card.name", NOT_EMPTY, [""]),
    ("card.license", TEXT, [["mit"]]),
    ("card.language", "a code such as en, or a list of them", [3, []]),
    ("card.tags", "a word, or a list of them", [{"a": 1}, []]),
    ("router", FILE, ["seed.jsonl", []]),
    ("parameters.num_experts", "1 or more", [0]),
    ("parameters.num_experts", WHOLE, [8.0, "8", True]),
    ("parameters.experts_per_token", "1 or more", [0]),
    ("parameters.experts_per_token", WHOLE, ["two"]),
    (
        "parameters.density",
        DENSITY,
        [
            0,
            1.5,
            -0.5,
            float("nan"),
            True,
            "high",
            "1e1",
            None,
            [],
            [0.5, 2],
            [[0.5, 1]],
            {"filter": "up"},
            {"value": 2},
            [{"value": 0.5, "filter": 3}],
            [{"value": 0.5, "filter": "up"}, 0.9],
        ],
    ),
    ("parameters.expansion", "'genetic' or 'copy'", ["clone"]),
    ("parameters.noise", "a number, 0 or more, such as 0.01", [-1, float("inf")]),
    ("parameters.reinitialise", PARTIAL, [1, -0.1, "half"]),
    ("parameters.select", "'last', 'diverse' or 'merge_similar'", ["first"]),
    ("parameters.parents", "'most_dissimilar', 'farthest_child' or 'random'", ["all"]),
    ("parameters.granularity", "'model', 'layer' or 'tensor'", [3]),
    ("parameters.repeat_pairs", "true or false", [1, "yes"]),
    ("parameters.similarity", "'cosine' or 'l2'", ["l1"]),
    ("parameters.mutation", "'once' or 'compound'", ["twice"]),
    ("parameters.backbone", NOT_EMPTY, [""]),
    ("parameters.backbone", TEXT, [3]),
    ("parameters.shared", "'auto', 'none', 'zero' or 'split'", ["half", True]),
    ("parameters.shared_from", NOT_EMPTY, [""]),
    ("parameters.shared_from", TEXT, [3]),
    ("parameters.dense_layers", "0 or more", [-1]),
    ("parameters.dense_layers", WHOLE, [1.5, "all", True]),
    ("parameters.seed", "0 or more", [-1]),
    ("parameters.seed", WHOLE, [1.5]),
    ("parameters.seed", f"a number below {2**63}", [2**63]),
    ("router.data", TEXT, [3]),
    ("router.data", NOT_EMPTY, [""]),
    ("router.prompts", "a mapping of experts' numbers to lists of prompts", [3, ["a"]]),
    ("router.subset", TEXT, [3]),
    ("router.split", TEXT, [None]),
    ("router.sample", SAMPLE, [0, -5, 0.0, 1.5, True, "all", "1e3"]),
    ("router.max_length", "2 or more", [1]),
    ("router.max_length", WHOLE, [512.0]),
    ("router.assign", ASSIGN, ["best", "column:", None]),
    ("router.assign.column", "the name of a column", [3]),
    ("router.assign.experts.code", "0 or more", [-1]),
    ("router.assign.experts", "a mapping of the column's values to experts' numbers, from 0", [3]),
    (
        "router.objective",
        "'one_vs_rest', 'softmax', 'ridge', 'hidden', 'kmeans', 'upit' or 'random'",
        ["best"],
    ),
    ("router.upit", "a mapping such as {train_experts: true}", [True]),
    ("router.upit.train_experts", "true or false", ["yes"]),
    ("router.upit.alpha", "a number from 0 to 1", [1.5]),
    ("router.upit.epochs", "1 or more", [0]),
    ("router.upit.lr", POSITIVE, [0]),
    ("router.upit.batch_size", WHOLE, [2.5]),
    ("router.upit.lora_rank", "1 or more", [0]),
    ("router.refine", "a mapping such as {steps: 100}", [100]),
    ("router.refine.steps", "1 or more", [0]),
    ("router.refine.lr", POSITIVE, [-1]),
    ("router.refine.tokens", "2 or more", [1]),
    ("router.refine.balance", "a number, 0 or more", [-1]),
    ("router.stream", "'mean' or 'expert'", ["all"]),
    ("router.temperature", POSITIVE, [0, "hot", float("inf")]),
    ("router.batch_tokens", "1 or more", [0]),
    ("router.compute", "'auto', 'float32' or 'bfloat16'", ["float16", 32]),
    ("router.losses", "'auto', 'first_order' or 'exact'", ["all", 1]),
    ("router.memory_gb", POSITIVE, ["4GB", -1]),
]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [(key, value, expected) for key, expected, values in WRONG_VALUES for value in values],
)
def test_wrong_value(key: str, value: Any, expected: str) -> None:
    message = f"recipe.yml: {key} is {value!r}, expected {expected}."
    assert refusal(parse_recipe, with_value(key, value), "recipe.yml") == message


def test_every_key_has_a_wrong_value() -> None:
    """A key that is added to the recipe must be added to the table."""
    fields = set(Recipe.model_fields) - {"merge_method"}
    for block, model in BLOCKS.items():
        fields |= {f"{block}.{name}" for name in model.model_fields}
    assert fields <= {key for key, _, _ in WRONG_VALUES}


def test_a_long_value_is_cut() -> None:
    message = refusal(parse_recipe, router(data=["x" * 50] * 9))
    assert message.startswith("the recipe: router.data is ['xxxxx")
    assert message.endswith("..., expected a text.")
    assert len(message) < 160


# ---- keys that are not known ---------------------------------------------------------------

UNKNOWN_KEYS = {
    "router.upit.epoch": "did you mean epochs?",
    "router.refine.rate": "known here: balance, lr, steps, tokens",
    "paramters": "did you mean parameters?",
    "base_modle": "did you mean base_model?",
    "Router": "did you mean router?",
    "models.1.modle": "did you mean model?",
    "models.1.weight": "known here: model, parameters",
    "models.1.parameters.densty": "did you mean density?",
    "models.1.parameters.weight": "known here: density",
    "parameters.num_expert": "did you mean num_experts?",
    "parameters.num-experts": "did you mean num_experts?",
    "router.samples": "did you mean sample?",
    "router.seed": "it belongs under parameters:",
    "num_experts": "it belongs under parameters:",
    "objective": "it belongs under router:",
    "parameters.share": "did you mean shared?",
    "dense_layers": "it belongs under parameters:",
    "parameters.dtype": "it belongs at the top level",
    "flavour": "known here: architecture, base_model, card, chat_template, dtype, merge_method, models, out_dtype, parameters, router, tokenizer_source",
    "router.learning rate": "known here: assign, batch_tokens, compute, data, losses, max_length, memory_gb, objective, prompts, refine, sample, split, stream, subset, temperature, upit",
}


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_unknown_key(key: str) -> None:
    message = f"recipe.yml: unknown key {key} ({UNKNOWN_KEYS[key]})."
    assert refusal(parse_recipe, with_value(key, 1), "recipe.yml") == message


# ---- documents that make no sense ----------------------------------------------------------

OTHERWISE_WRONG = [
    (None, "r is not a YAML mapping; see recipes/upit-8x.yml for one."),
    ([document()], "r is not a YAML mapping; see recipes/upit-8x.yml for one."),
    ({}, "r: merge_method is missing; add merge_method: upit."),
    (
        document(merge_method="ties"),
        "r: merge_method is 'ties', not 'upit'; run other methods with mergekit-yaml.",
    ),
    ({"merge_method": "upit", "models": [{"model": "one"}]}, "r: base_model is missing; add it."),
    ({"merge_method": "upit", "base_model": "base"}, "r: models is missing; add it."),
    (document(models=[{}]), "r: models.0.model is missing; add it."),
    (
        document(router={}),
        "r: router: neither data nor prompts is given; add data: FILE, or prompts: {0: [...], 1: "
        "[...]} with a few lines for each expert.",
    ),
    (
        router(prompts={0: ["a"]}),
        "r: router: data and prompts are both given; remove one of them.",
    ),
    (
        document(router={"prompts": {0: ["a"]}, "sample": 3}),
        "r: router: sample has no meaning with prompts, which are all used, each for its expert; "
        "remove it.",
    ),
    (
        document(router={"prompts": {0: ["a"]}, "objective": "kmeans"}),
        "r: router: objective: kmeans does not ask whose a prompt is; use another, or data.",
    ),
    (
        document(router={"prompts": {"-1": ["a"]}}),
        "r: router.prompts has the key '-1', expected an expert's number, from 0.",
    ),
    (
        router(objective="kmeans", assign="balanced"),
        "r: router: assign has no meaning with objective: kmeans, where no sample belongs to an "
        "expert; remove it.",
    ),
    (
        document() | {7: 1},
        "r: the key 7 is not a text; remove it or put it in quotes.",
    ),
    (
        document(slices=[]),
        "r: slices is not supported by upit: upit merges whole models; list them under models:.",
    ),
    (
        document(tokenizer={}),
        "r: tokenizer is not supported by upit: upit keeps the vocabulary; use tokenizer_source: "
        "base or a model.",
    ),
    (
        document(tokenizer_source="union"),
        "r: tokenizer_source: union would change the vocabulary, which an expert cannot follow; "
        "use base or one of the models.",
    ),
    (
        parameters(num_experts=2, experts_per_token=3),
        "r: parameters: num_experts (2) is below experts_per_token (3), but a token cannot be "
        "routed to more experts than there are; lower experts_per_token or raise num_experts.",
    ),
    (
        parameters(shared_from="base"),
        "r: parameters: shared_from is for shared: split, but shared is auto; add shared: split, or "
        "remove it.",
    ),
    (
        parameters(noise=0.1),
        "r: parameters: noise is for copies of a model, which would be alike without; add "
        "expansion: copy, or remove it.",
    ),
    (
        parameters(reinitialise=0.5),
        "r: parameters: reinitialise is for copies of a model, which would be alike without; add "
        "expansion: copy, or remove it.",
    ),
    *(
        (
            parameters(expansion="copy", **{name: value}),
            f"r: parameters: {name} has no meaning with expansion: copy, where every checkpoint is "
            "copied and nothing is grown; remove it.",
        )
        for name, value in {
            "select": "diverse",
            "parents": "random",
            "granularity": "layer",
            "repeat_pairs": True,
            "similarity": "l2",
            "mutation": "compound",
            "density": 0.5,
        }.items()
    ),
    (
        entry(parameters={"density": 0.5}) | {"parameters": {"expansion": "copy"}},
        "r: parameters: density has no meaning with expansion: copy, where every checkpoint is "
        "copied and nothing is grown; remove it.",
    ),
    (
        parameters(parents="farthest_child", repeat_pairs=True),
        "r: parameters: repeat_pairs has no meaning with parents: farthest_child, which takes a "
        "pair again whenever its child is the farthest; remove it.",
    ),
    (
        entry(parameters={"density": 0.5}) | {"parameters": {"mutation": "compound"}},
        "r: models: density per model has no meaning with mutation: compound, which drops from "
        "children too; use parameters.density or mutation: once.",
    ),
    (
        router(upit={"train_experts": True}),
        "r: router: upit is given, but objective is one_vs_rest; set objective: upit or remove the "
        "upit: block.",
    ),
    (
        router(assign={"columns": "x"}),
        "r: unknown key router.assign.columns (did you mean column?).",
    ),
    (
        parameters(density=[{"value": 0.5, "fliter": "up"}]),
        "r: unknown key parameters.density.0.fliter (did you mean filter?).",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), OTHERWISE_WRONG)
def test_impossible_recipe(wrong: Any, message: str) -> None:
    assert refusal(parse_recipe, wrong, "r") == message


# ---- texts that are no recipe --------------------------------------------------------------

# Where it is, and what the YAML library says of it; `…` is any text.
INVALID_YAML = [
    ("models: [\n", "line 2, column 1: while parsing a flow node, expected the node content,…"),
    ("models: [", "line 1, column 10: …"),
    ("merge_method: upit\n\tx: 1", "line 2, column 1: while scanning for the next token,…"),
    ("a:\n  - b\n c: d", "line 3, column 2: while parsing a block mapping, expected <block…"),
    ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but…"),
    ("a: !!python/name:os.system", "line 1, column 4: could not determine a constructor…"),
    ("a: 2026-13-01", "month must be in 1..12"),
    ("a: \x00", "special characters are not allowed"),
    ("a: 1\nbase_model: a\nbase_model: b\n", "line 3, column 1: the key base_model is given twice"),
    ("a: {seed: 1, density: 0.5, seed: 2}", "line 1, column 28: the key seed is given twice"),
    ("models:\n- model: a\n  model: b", "line 3, column 3: the key model is given twice"),
]


@pytest.mark.parametrize(("text", "problem"), INVALID_YAML)
def test_invalid_yaml_names_the_line(text: str, problem: str) -> None:
    message = refusal(parse_recipe_text, text, "recipe.yml")
    assert_sentence(message, f"recipe.yml is not valid YAML ({problem}); correct the file.")


def test_unreadable_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    missing = f"The recipe {path} does not exist; correct the path."
    assert refusal(load_recipe, path) == missing
    path.write_bytes(b"merge_method: \xff")
    sentence = f"The recipe {path} cannot be read (…utf-8…); check the file."
    assert_sentence(refusal(load_recipe, path), sentence)
    assert refusal(load_recipe, tmp_path).startswith(f"The recipe {tmp_path} cannot be read (")
