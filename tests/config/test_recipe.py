"""The recipe: every key with its wrong values, and what the flexible ones come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from upit_merge.config.recipe import (
    FilteredDensity,
    Parameters,
    Recipe,
    load_recipe,
    parse_recipe,
    parse_recipe_text,
)
from upit_merge.config.references import expand_models
from upit_merge.config.router import ByColumn, Refinement, RouterSettings, UpitObjective
from upit_merge.errors import UpitError
from upit_merge.merge.density import resolve_densities
from upit_merge.models.dense import DenseArchitecture
from upit_merge.models.formats import FORMATS

Document = dict[str, Any]

BLOCKS = {
    "parameters": Parameters,
    "router": RouterSettings,
    "router.assign": ByColumn,
    "router.upit": UpitObjective,
    "router.refine": Refinement,
}


def document(**keys: Any) -> Document:
    listed = [{"model": "one"}, {"model": "two"}]
    return {"merge_method": "upit", "base_model": "base", "models": listed, **keys}


def parameters(**settings: Any) -> Document:
    return document(parameters=settings)


def copied(**settings: Any) -> Document:
    return parameters(expansion="copy", **settings)


def router(**settings: Any) -> Document:
    return document(router={"data": "seed.jsonl", **settings})


def upit(**settings: Any) -> Document:
    return router(objective="upit", upit=settings)


def refine(**settings: Any) -> Document:
    return router(refine={"steps": 10, **settings})


def entry(**keys: Any) -> Document:
    return document(models=[{"model": "one"}, {"model": "two", **keys}])


def refusal(parse: Any, *arguments: Any) -> str:
    with pytest.raises(UpitError) as caught:
        parse(*arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


# ---- wrong documents -----------------------------------------------------------------------

DENSITY = "a number in (0, 1], a list of them over the layers, or a list of filter: and value:"
MODELS = "a list of `- model: FOLDER` entries, at least one"
ASSIGN = "lowest, balanced, shuffled, or column: NAME"
SAMPLE = "a whole number of samples, or a fraction in (0, 1] such as 0.01"
DTYPES = "'float32', 'float16' or 'bfloat16'"
ENTRY = "an entry of the form `- model: FOLDER`"
FILE = "a mapping with at least data: FILE"
MAPPING = "a mapping of parameter names to values"
POSITIVE = "a number above 0"
PARTIAL = "a number from 0 to below 1, such as 0.5"
TEXT = "a text"
NOT_EMPTY = "a text that is not empty"
WHOLE = "a whole number"

# The document, the key as the sentence names it, what the sentence shows of it, what it expects.
WRONG_VALUES: list[tuple[Document, str, str, str]] = [
    (document(base_model=3), "base_model", "3", TEXT),
    (document(base_model=""), "base_model", "''", NOT_EMPTY),
    (document(base_model=None), "base_model", "None", TEXT),
    (document(base_model=["x"]), "base_model", "['x']", TEXT),
    (document(models=[]), "models", "[]", MODELS),
    (document(models=None), "models", "None", MODELS),
    (document(models="./sft/*"), "models", "'./sft/*'", MODELS),
    (document(models={"model": "one"}), "models", "{'model': 'one'}", MODELS),
    (document(models=["one"]), "models.0", "'one'", ENTRY),
    (entry(model=3), "models.1.model", "3", TEXT),
    (entry(model=""), "models.1.model", "''", NOT_EMPTY),
    (entry(parameters=None), "models.1.parameters", "None", MAPPING),
    (entry(parameters={"density": 0}), "models.1.parameters.density", "0", DENSITY),
    (document(architecture="gpt"), "architecture", "'gpt'", "auto, mixtral, qwen3_moe"),
    (document(architecture=8), "architecture", "8", "a text"),
    (document(dtype="int8"), "dtype", "'int8'", DTYPES),
    (document(dtype=16), "dtype", "16", DTYPES),
    (document(out_dtype="fp16"), "out_dtype", "'fp16'", DTYPES),
    (document(tokenizer_source=3), "tokenizer_source", "3", TEXT),
    (document(chat_template=["x"]), "chat_template", "['x']", TEXT),
    (document(parameters=None), "parameters", "None", MAPPING),
    (document(parameters=[]), "parameters", "[]", MAPPING),
    (document(router="seed.jsonl"), "router", "'seed.jsonl'", FILE),
    (document(router=[]), "router", "[]", FILE),
    (parameters(num_experts=0), "parameters.num_experts", "0", "1 or more"),
    (parameters(num_experts=8.0), "parameters.num_experts", "8.0", WHOLE),
    (parameters(num_experts="8"), "parameters.num_experts", "'8'", WHOLE),
    (parameters(num_experts=True), "parameters.num_experts", "True", WHOLE),
    (parameters(experts_per_token=0), "parameters.experts_per_token", "0", "1 or more"),
    (parameters(experts_per_token="two"), "parameters.experts_per_token", "'two'", WHOLE),
    (parameters(density=0), "parameters.density", "0", DENSITY),
    (parameters(density=1.5), "parameters.density", "1.5", DENSITY),
    (parameters(density=-0.5), "parameters.density", "-0.5", DENSITY),
    (parameters(density=float("nan")), "parameters.density", "nan", DENSITY),
    (parameters(density=True), "parameters.density", "True", DENSITY),
    (parameters(density="high"), "parameters.density", "'high'", DENSITY),
    (parameters(density="1e1"), "parameters.density", "'1e1'", DENSITY),
    (parameters(density=None), "parameters.density", "None", DENSITY),
    (parameters(density=[]), "parameters.density", "[]", DENSITY),
    (parameters(density=[0.5, 2]), "parameters.density", "[0.5, 2]", DENSITY),
    (parameters(density=[[0.5, 1]]), "parameters.density", "[[0.5, 1]]", DENSITY),
    (parameters(density={"filter": "up"}), "parameters.density", "{'filter': 'up'}", DENSITY),
    (parameters(density={"value": 2}), "parameters.density", "{'value': 2}", DENSITY),
    (
        parameters(density=[{"value": 0.5, "filter": 3}]),
        "parameters.density",
        "[{'value': 0.5, 'filter': 3}]",
        DENSITY,
    ),
    (
        parameters(density=[{"value": 0.5, "filter": "up"}, 0.9]),
        "parameters.density",
        "[{'value': 0.5, 'filter': 'up'}, 0.9]",
        DENSITY,
    ),
    (parameters(expansion="clone"), "parameters.expansion", "'clone'", "'genetic' or 'copy'"),
    (copied(noise=-1), "parameters.noise", "-1", "a number, 0 or more, such as 0.01"),
    (copied(noise=float("inf")), "parameters.noise", "inf", "a number, 0 or more, such as 0.01"),
    (copied(reinitialise=1), "parameters.reinitialise", "1", PARTIAL),
    (copied(reinitialise=-0.1), "parameters.reinitialise", "-0.1", PARTIAL),
    (copied(reinitialise="half"), "parameters.reinitialise", "'half'", PARTIAL),
    (
        parameters(select="first"),
        "parameters.select",
        "'first'",
        "'last', 'diverse' or 'merge_similar'",
    ),
    (
        parameters(parents="all"),
        "parameters.parents",
        "'all'",
        "'most_dissimilar', 'farthest_child' or 'random'",
    ),
    (parameters(granularity=3), "parameters.granularity", "3", "'model', 'layer' or 'tensor'"),
    (parameters(repeat_pairs=1), "parameters.repeat_pairs", "1", "true or false"),
    (parameters(repeat_pairs="yes"), "parameters.repeat_pairs", "'yes'", "true or false"),
    (parameters(similarity="l1"), "parameters.similarity", "'l1'", "'cosine' or 'l2'"),
    (parameters(mutation="twice"), "parameters.mutation", "'twice'", "'once' or 'compound'"),
    (parameters(backbone=""), "parameters.backbone", "''", NOT_EMPTY),
    (parameters(backbone=3), "parameters.backbone", "3", TEXT),
    (parameters(seed=-1), "parameters.seed", "-1", "0 or more"),
    (parameters(seed=1.5), "parameters.seed", "1.5", WHOLE),
    (parameters(seed=2**63), "parameters.seed", f"{2**63}", f"a number below {2**63}"),
    (router(data=3), "router.data", "3", TEXT),
    (router(data=""), "router.data", "''", NOT_EMPTY),
    (router(subset=3), "router.subset", "3", TEXT),
    (router(split=None), "router.split", "None", TEXT),
    (router(sample=0), "router.sample", "0", SAMPLE),
    (router(sample=-5), "router.sample", "-5", SAMPLE),
    (router(sample=0.0), "router.sample", "0.0", SAMPLE),
    (router(sample=1.5), "router.sample", "1.5", SAMPLE),
    (router(sample=True), "router.sample", "True", SAMPLE),
    (router(sample="all"), "router.sample", "'all'", SAMPLE),
    (router(sample="1e3"), "router.sample", "'1e3'", SAMPLE),
    (router(max_length=1), "router.max_length", "1", "2 or more"),
    (router(max_length=512.0), "router.max_length", "512.0", WHOLE),
    (router(assign="best"), "router.assign", "'best'", ASSIGN),
    (router(assign="column:"), "router.assign", "'column:'", ASSIGN),
    (router(assign=None), "router.assign", "None", ASSIGN),
    (router(assign={"column": 3}), "router.assign.column", "3", "the name of a column"),
    (
        router(assign={"column": "c", "experts": {"code": -1}}),
        "router.assign.experts.code",
        "-1",
        "0 or more",
    ),
    (
        router(assign={"column": "c", "experts": 3}),
        "router.assign.experts",
        "3",
        "a mapping of the column's values to experts' numbers, from 0",
    ),
    (
        router(objective="best"),
        "router.objective",
        "'best'",
        "'one_vs_rest', 'softmax', 'ridge', 'hidden', 'upit' or 'random'",
    ),
    (router(upit=True), "router.upit", "True", "a mapping such as {train_experts: true}"),
    (upit(train_experts="yes"), "router.upit.train_experts", "'yes'", "true or false"),
    (upit(alpha=1.5), "router.upit.alpha", "1.5", "a number from 0 to 1"),
    (upit(epochs=0), "router.upit.epochs", "0", "1 or more"),
    (upit(lr=0), "router.upit.lr", "0", POSITIVE),
    (upit(batch_size=2.5), "router.upit.batch_size", "2.5", WHOLE),
    (upit(lora_rank=0), "router.upit.lora_rank", "0", "1 or more"),
    (router(refine=100), "router.refine", "100", "a mapping such as {steps: 100}"),
    (refine(steps=0), "router.refine.steps", "0", "1 or more"),
    (refine(lr=-1), "router.refine.lr", "-1", POSITIVE),
    (refine(tokens=1), "router.refine.tokens", "1", "2 or more"),
    (refine(balance=-1), "router.refine.balance", "-1", "a number, 0 or more"),
    (router(stream="all"), "router.stream", "'all'", "'mean' or 'expert'"),
    (router(temperature=0), "router.temperature", "0", POSITIVE),
    (router(temperature="hot"), "router.temperature", "'hot'", POSITIVE),
    (router(temperature=float("inf")), "router.temperature", "inf", POSITIVE),
    (router(batch_tokens=0), "router.batch_tokens", "0", "1 or more"),
    (router(memory_gb="4GB"), "router.memory_gb", "'4GB'", POSITIVE),
    (router(memory_gb=-1), "router.memory_gb", "-1", POSITIVE),
]


@pytest.mark.parametrize(("wrong", "key", "shown", "expected"), WRONG_VALUES)
def test_wrong_value(wrong: Document, key: str, shown: str, expected: str) -> None:
    message = f"recipe.yml: {key} is {shown}, expected {expected}."
    assert refusal(parse_recipe, wrong, "recipe.yml") == message


def test_every_key_has_a_wrong_value() -> None:
    """A key that is added to the recipe must be added to the table."""
    fields = {"merge_method", *Recipe.model_fields}
    for block, model in BLOCKS.items():
        fields |= {f"{block}.{name}" for name in model.model_fields}
    covered = {key for _, key, _, _ in WRONG_VALUES} | {"merge_method"}
    assert fields <= covered


def test_a_long_value_is_cut() -> None:
    message = refusal(parse_recipe, router(data=["x" * 50] * 9))
    assert message.startswith("the recipe: router.data is ['xxxxx")
    assert message.endswith("..., expected a text.")
    assert len(message) < 160


def test_a_column_may_assign_the_samples() -> None:
    for assign in ("column: kind", "column:kind", {"column": "kind"}):
        assert parse_recipe(router(assign=assign)).router.column == "kind"
    experts = {"code": 0, 7: 1}
    rule = parse_recipe(router(assign={"column": "kind", "experts": experts})).router.assign
    assert rule.experts == experts
    assert parse_recipe(router()).router.column is None


def test_settings_of_an_objective_need_it() -> None:
    message = refusal(parse_recipe, router(upit={"train_experts": True}))
    assert message.endswith(
        "upit is given, but objective is one_vs_rest; set objective: upit or remove the upit: "
        "block."
    )


def test_the_paper_s_rates_and_stream_come_with_its_objective() -> None:
    rates = [
        parse_recipe(upit(**settings)).router.upit_settings.learning_rate
        for settings in ({}, {"train_experts": True}, {"train_experts": True, "lora_rank": 8})
    ]
    assert rates == [2e-4, 2e-5, 2e-4]
    assert parse_recipe(upit(lr="1e-3")).router.upit_settings.learning_rate == 1e-3
    assert parse_recipe(router(objective="upit")).router.router_stream == "expert"
    assert parse_recipe(router()).router.router_stream == "mean"
    assert parse_recipe(router(objective="upit", stream="mean")).router.router_stream == "mean"


MISSPELLED = [
    (upit(epoch=1), "router.upit.epoch", "did you mean epochs?"),
    (refine(rate=1), "router.refine.rate", "known here: balance, lr, steps, tokens"),
    (router(assign={"columns": "x"}), "router.assign.columns", "did you mean column?"),
    (document(paramters={}), "paramters", "did you mean parameters?"),
    (document(base_modle="x"), "base_modle", "did you mean base_model?"),
    (document(Router={}), "Router", "did you mean router?"),
    (entry(modle="x"), "models.1.modle", "did you mean model?"),
    (entry(weight=1), "models.1.weight", "known here: model, parameters"),
    (entry(parameters={"densty": 1}), "models.1.parameters.densty", "did you mean density?"),
    (entry(parameters={"weight": 1}), "models.1.parameters.weight", "known here: density"),
    (parameters(num_expert=4), "parameters.num_expert", "did you mean num_experts?"),
    (parameters(**{"num-experts": 4}), "parameters.num-experts", "did you mean num_experts?"),
    (
        parameters(density=[{"value": 0.5, "fliter": "up"}]),
        "parameters.density.0.fliter",
        "did you mean filter?",
    ),
    (router(samples=3), "router.samples", "did you mean sample?"),
    (router(seed=3), "router.seed", "it belongs under parameters:"),
    (document(num_experts=8), "num_experts", "it belongs under parameters:"),
    (document(objective="ridge"), "objective", "it belongs under router:"),
    (parameters(dtype="float32"), "parameters.dtype", "it belongs at the top level"),
    (
        document(flavour=1),
        "flavour",
        "known here: architecture, base_model, chat_template, dtype, merge_method, models, out_dtype, "
        "parameters, router, tokenizer_source",
    ),
    (
        router(**{"learning rate": 1}),
        "router.learning rate",
        "known here: assign, batch_tokens, data, max_length, memory_gb, objective, refine, sample, "
        "split, stream, subset, temperature, upit",
    ),
]


@pytest.mark.parametrize(("wrong", "key", "hint"), MISSPELLED)
def test_unknown_key(wrong: Document, key: str, hint: str) -> None:
    assert refusal(parse_recipe, wrong, "recipe.yml") == f"recipe.yml: unknown key {key} ({hint})."


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
    (document(router={}), "r: router.data is missing; add it."),
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
            copied(**{name: value}),
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
]


@pytest.mark.parametrize(("wrong", "message"), OTHERWISE_WRONG)
def test_impossible_recipe(wrong: Any, message: str) -> None:
    assert refusal(parse_recipe, wrong, "r") == message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("models: [\n", "line 2, column 1: while parsing a flow node, expected the node content,"),
        ("merge_method: upit\n\tx: 1", "line 2, column 1: while scanning for the next token,"),
        ("a:\n  - b\n c: d", "line 3, column 2: while parsing a block mapping, expected <block"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but"),
        ("a: !!python/name:os.system", "line 1, column 4: could not determine a constructor"),
        ("a: 2026-13-01", "month must be in 1..12)"),
        ("a: \x00", "special characters are not allowed)"),
    ],
)
def test_invalid_yaml_names_the_line(text: str, found: str) -> None:
    message = refusal(parse_recipe_text, text, "recipe.yml")
    assert message.startswith(f"recipe.yml is not valid YAML ({found}")
    assert message.endswith("); correct the file.")


def test_unreadable_recipe(tmp_path: Path) -> None:
    missing = refusal(load_recipe, tmp_path / "recipe.yml")
    assert missing == f"The recipe {tmp_path}/recipe.yml does not exist; correct the path."
    folder = refusal(load_recipe, tmp_path)
    assert folder.startswith(f"The recipe {tmp_path} cannot be read (")


# ---- right documents -----------------------------------------------------------------------


def test_defaults() -> None:
    recipe = parse_recipe(document())
    assert recipe.output_dtype is None
    assert recipe.router is None
    assert recipe.parameters.model_dump() == {
        "num_experts": None,
        "experts_per_token": None,
        "expansion": "genetic",
        "noise": 0,
        "reinitialise": 0,
        "density": 0.9,
        "select": "last",
        "parents": "most_dissimilar",
        "granularity": "model",
        "repeat_pairs": False,
        "similarity": "cosine",
        "mutation": "once",
        "backbone": "last",
        "seed": 0,
    }


def test_out_dtype_wins() -> None:
    assert parse_recipe(document(dtype="bfloat16")).output_dtype is torch.bfloat16
    both = document(dtype="bfloat16", out_dtype="float16")
    assert parse_recipe(both).output_dtype is torch.float16


def test_another_seed() -> None:
    recipe = parse_recipe(parameters(seed=3, num_experts=5))
    assert recipe.with_seed(None) is recipe
    assert recipe.with_seed(0).parameters == parse_recipe(parameters(num_experts=5)).parameters


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.9", 0.9),
        ("1", 1),
        ("9e-1", 0.9),
        ("1.0e+0", 1.0),
        ("[0.5, 1e-1]", [0.5, 0.1]),
        ("{value: 0.5}", FilteredDensity(value=0.5)),
        ("{filter: up_proj, value: [5e-1, 1]}", FilteredDensity(filter="up_proj", value=[0.5, 1])),
        (
            "[{filter: up_proj, value: 0.5}, {value: 0.9}]",
            [FilteredDensity(filter="up_proj", value=0.5), FilteredDensity(value=0.9)],
        ),
    ],
)
def test_density_as_written_in_yaml(written: str, read: Any) -> None:
    text = f"{{merge_method: upit, base_model: b, models: [model: m], parameters: {{density: {written}}}}}"
    assert parse_recipe_text(text).parameters.density == read


@pytest.mark.parametrize(
    ("written", "read"),
    [("500", 500), ("1", 1), ("1.0", 1.0), ("0.01", 0.01), ("1e-2", 0.01), ("null", None)],
)
def test_sample_is_a_count_or_a_fraction(written: str, read: float | None) -> None:
    """1 is one sample, 1.0 is all of them."""
    text = f"{{merge_method: upit, base_model: b, models: [model: m], router: {{data: d, sample: {written}}}}}"
    recipe = parse_recipe_text(text)
    assert recipe.router is not None
    assert recipe.router.sample == read
    assert type(recipe.router.sample) is type(read)


# ---- globs ---------------------------------------------------------------------------------


def expanded(*models: str) -> list[str]:
    entries = parse_recipe(document(models=[{"model": model} for model in models])).models
    return [entry.model for entry in expand_models(entries)]


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-90", "best"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    (tmp_path / "sft" / "checkpoint-7.txt").touch()


@pytest.mark.usefixtures("steps")
def test_globs_give_folders_in_step_order() -> None:
    steps = [f"sft/checkpoint-{step}" for step in (90, 500, 1000, 1500)]
    assert expanded("sft/checkpoint-*") == steps
    assert expanded("sft/checkpoint-?000", "sft/best") == ["sft/checkpoint-1000", "sft/best"]
    assert expanded("org/model", "**/checkpoint-[59]*") == [
        "org/model",
        "sft/checkpoint-90",
        "sft/checkpoint-500",
    ]


@pytest.mark.usefixtures("steps")
def test_an_entry_s_parameters_hold_for_all_its_folders() -> None:
    models = [{"model": "sft/checkpoint-1*", "parameters": {"density": 0.3}}]
    entries = expand_models(parse_recipe(document(models=models)).models)
    assert [entry.parameters.density for entry in entries] == [0.3, 0.3]


@pytest.mark.usefixtures("steps")
def test_a_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    assert expanded("run[1]") == ["run[1]"]


@pytest.mark.usefixtures("steps")
def test_a_glob_without_a_match(tmp_path: Path) -> None:
    for pattern in ("sft/ckpt-*", "sft/*.txt"):
        message = refusal(expanded, "sft/best", pattern)
        assert message == (
            f"models: {pattern} matches no folder (looked in {tmp_path}); correct the pattern or "
            "the working directory."
        )


# ---- density per tensor --------------------------------------------------------------------

GATE_DOWN_UP = ("gate_proj", "down_proj", "up_proj")


def densities(layers: int, shared: Any, *per_model: Any) -> list[list[float]]:
    """Rows: layer by layer gate, down, up. Columns: models."""
    settings = per_model or (None,)
    models = [
        {"model": "m", "parameters": {} if own is None else {"density": own}} for own in settings
    ]
    recipe = parse_recipe(document(models=models, parameters={"density": shared}))
    architecture = DenseArchitecture(FORMATS["mixtral"], {"num_hidden_layers": layers}, {})
    assert [p for _, p, _ in architecture.ffn_names()] == [*GATE_DOWN_UP] * layers
    resolved = resolve_densities(
        architecture,
        recipe.parameters.density,
        [entry.parameters.density for entry in recipe.models],
    )
    assert resolved.dtype == torch.float64
    return resolved.tolist()


def column(*values: float) -> Any:
    """One model; values per row, or per layer if there is a third of them."""
    return [pytest.approx([value], abs=1e-12) for value in values]


def per_layer(*values: float) -> Any:
    return column(*(value for value in values for _ in GATE_DOWN_UP))


def test_density_scalar() -> None:
    assert densities(2, 0.7) == per_layer(0.7, 0.7)


@pytest.mark.parametrize(
    ("layers", "gradient", "expected"),
    [
        (3, [0.2, 0.6], (0.2, 0.4, 0.6)),
        (2, [0.2, 0.6], (0.2, 0.6)),
        (5, [0.2, 1.0, 0.4], (0.2, 0.6, 1.0, 0.7, 0.4)),
        (2, [0.5], (0.5, 0.5)),
        (1, [0.2, 0.6], (0.6,)),
    ],
)
def test_density_gradient_over_layers(
    layers: int, gradient: list[float], expected: tuple[float, ...]
) -> None:
    assert densities(layers, gradient) == per_layer(*expected)


def test_density_filter_by_projection() -> None:
    """The first filter that fits decides; without one that fits it is the default, 0.9."""
    down = {"filter": "down_proj", "value": 0.5}
    assert densities(2, [down, {"value": 0.8}]) == column(0.8, 0.5, 0.8, 0.8, 0.5, 0.8)
    assert densities(2, [{"value": 0.8}, down]) == column(*[0.8] * 6)
    assert densities(2, down) == column(0.9, 0.5, 0.9, 0.9, 0.5, 0.9)


def test_density_filter_with_a_gradient() -> None:
    setting = [{"filter": "up_proj", "value": [0.2, 0.6]}, {"value": 0.8}]
    assert densities(3, setting) == column(0.8, 0.8, 0.2, 0.8, 0.8, 0.4, 0.8, 0.8, 0.6)


def test_density_of_one_model() -> None:
    """An entry's own density wins where it applies; elsewhere the recipe's holds."""
    up = [{"filter": "up_proj", "value": 0.3}]
    layers = densities(2, 0.8, None, 0.5, [0.1, 0.2], up)
    plain, last = [0.8, 0.5, 0.1, 0.8], [0.8, 0.5, 0.2, 0.8]
    expected = [plain, plain, [*plain[:3], 0.3], last, last, [*last[:3], 0.3]]
    assert layers == [pytest.approx(row, abs=1e-12) for row in expected]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("merge_method: upit\nbase_model: a\nbase_model: b\n", "line 3, column 1"),
        ("parameters: {seed: 1, density: 0.5, seed: 2}", "line 1, column 37"),
        ("models:\n- model: a\n  model: b", "line 3, column 3"),
    ],
)
def test_a_key_given_twice_is_refused(text: str, where: str) -> None:
    with pytest.raises(UpitError, match=rf"{where}: the key \w+ is given twice"):
        parse_recipe_text(text)


@pytest.mark.parametrize(
    "density",
    [
        {"filter": "down_prj", "value": 0.5},
        [{"filter": "self_attn", "value": 0.5}, {"value": 0.9}],
    ],
)
def test_a_filter_that_matches_nothing_is_refused(shared_family, merge, density) -> None:
    with pytest.raises(UpitError, match=r"density: the filter '\w+' matches no FFN tensor"):
        merge(shared_family.recipe(parameters={"density": density}))
