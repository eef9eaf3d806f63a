"""Bad input of `upit-merge run`: one sentence that names the thing and the remedy, nothing left.

Cases about what a recipe names, about its seed data, and about options; `tests/support/spoilt.py`
says what a case is. Files of models, adapters and output folders have tables of their own.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import Family
from tests.support.spoilt import (
    BASE,
    FIRST,
    LAST,
    SECOND,
    UP,
    Case,
    assert_case_refused,
    assert_refused,
    assert_stderr,
    both,
    content,
    each,
    entry,
    parameters,
    pickled,
    recipe,
    run,
    seed_data,
    snapshot,
    without,
)
from tests.support.warm import Program

RECIPE_CASES = {
    "misspelled key": Case(
        recipe(paramters={}),
        "recipe.yml: unknown key paramters (did you mean parameters?).",
    ),
    "more per token than checkpoints": Case(
        parameters(experts_per_token=4),
        "The recipe makes 3 experts but routes a token to 4; lower experts_per_token or "
        "raise num_experts.",
    ),
    "many experts of one checkpoint": Case(
        recipe(models=[{"model": f"@{LAST}"}], parameters={"num_experts": 8}),
        "One checkpoint cannot be the parents of 8 experts; list at least two checkpoints "
        "under models:, or set num_experts: 1.",
    ),
    "copies that leave a checkpoint out": Case(
        parameters(num_experts=2, expansion="copy"),
        "The recipe copies 3 checkpoints into 2 experts, which leaves some out; raise num_experts "
        "or list fewer under models:.",
    ),
    "missing base": Case(
        recipe(base_model="@nowhere"),
        "The base_model nowhere does not exist (looked in …); correct the path in the recipe.",
    ),
    "missing checkpoint": Case(
        recipe(models=[{"model": f"@{FIRST}"}, {"model": "@sft/checkpoint-2000"}]),
        "The checkpoint sft/checkpoint-2000 does not exist (looked in …); correct the path "
        "in the recipe.",
    ),
    "unreachable Hub id": Case(
        recipe(base_model="nobody/nothing"),
        "The base_model nobody/nothing is neither a local folder nor a model the Hub could "
        "give (…); correct the name or download it first.",
    ),
    "glob without a match": Case(
        recipe(models=[{"model": "@sft/ckpt-*"}]),
        "models: sft/ckpt-* matches no folder (looked in …); correct the pattern or the "
        "working directory.",
    ),
    "checkpoint is a file": Case(
        recipe(models=[{"model": f"@{LAST}/config.json"}]),
        "The checkpoint sft/checkpoint-1500/config.json is a file; give the folder that holds it.",
    ),
    "adapter that is missing": Case(
        recipe(models=[{"model": f"@{BASE}+@adapter"}]),
        "The adapter adapter does not exist (looked in …); correct the path in the recipe.",
    ),
    "unknown backbone": Case(
        parameters(backbone="first"),
        "parameters.backbone: first is none of the recipe's models (sft/checkpoint-500, …); "
        "name one of them.",
    ),
    "unknown tokenizer_source": Case(
        recipe(tokenizer_source="gpt2"),
        "tokenizer_source: gpt2 is none of the recipe's models (sft/checkpoint-500, …); name "
        "one of them.",
    ),
    "unknown chat_template": Case(
        recipe(chat_template="chatml2"),
        "chat_template: 'chatml2' is neither a Jinja template nor one of mergekit's (alpaca, "
        "chatml, …); use one of these.",
    ),
}

TOKENIZERS = [
    f"{folder}/{name}"
    for folder in (BASE, FIRST, SECOND, LAST)
    for name in ("tokenizer.json", "tokenizer_config.json")
]

SEED_CASES = {
    "no such file": Case(
        seed_data(None),
        "There is no data at 'seed.jsonl'; give the path of a .jsonl, …",
    ),
    "malformed line": Case(
        seed_data('{"text": "one"}\n{"text": '),
        "seed.jsonl line 2 is not JSON (Expecting value at column 10); put one JSON object "
        "on each line.",
    ),
    "no chat template": Case(
        seed_data('{"messages": [{"role": "user", "content": "Hi"}]}\n'),
        "seed.jsonl line 1 is a conversation, but the tokenizer has no chat template; use a "
        "`text` column, or set `chat_template` in the recipe.",
    ),
    "too short": Case(
        seed_data('{"text": ""}\n' * 3),
        "No seed sample is left (3 samples dropped as too short); give longer samples or "
        "raise `max_length`.",
    ),
    "no tokenizer": Case(
        both(without(*TOKENIZERS), seed_data('{"text": "one"}')),
        "router: needs a tokenizer for its seed data, but no model of the recipe has one; "
        "put tokenizer.json into the last checkpoint's folder.",
    ),
    "broken tokenizer": Case(
        both(
            content(f"{LAST}/tokenizer.json", lambda old: old[:500]), seed_data('{"text": "one"}')
        ),
        "The tokenizer in sft/checkpoint-1500 cannot be loaded (…); check its files, or name "
        "another model's with tokenizer_source.",
    ),
}


@pytest.mark.parametrize("command", ["upit-merge", "mergekit-yaml"])
@each(RECIPE_CASES | SEED_CASES)
def test_one_sentence_and_nothing_left(
    case: Case, command: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit parses recipes itself, so what they say goes through its command as well."""
    assert_case_refused(case, family, monkeypatch, command=command)


def test_real_mergekit_yaml(shared_family: Family, tmp_path: Path) -> None:
    """By the installed command: a mistake before the work and one in the middle, side by side."""
    diverged = Case(
        entry(SECOND, UP, float("nan")),
        f"Checkpoint {SECOND} has NaN or infinite weights in {UP}; use a checkpoint from before "
        "the training diverged.",
    )
    started = []
    for index, case in enumerate((RECIPE_CASES["misspelled key"], diverged)):
        root = tmp_path / str(index)
        shutil.copytree(shared_family.root, root)
        checkpoints = [root / p.relative_to(shared_family.root) for p in shared_family.checkpoints]
        family = Family(root, root / "base", checkpoints)
        recipe = family.write_recipe(case.spoil(family) or family.recipe())
        process = Program(
            "mergekit.scripts.run_yaml",
            recipe,
            root / "out",
            "--quiet",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append((case, family, process))
    for case, family, process in started:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert_stderr(stderr, case.sentence, family)
        assert not stdout
        assert not (family.root / "out").exists()


def test_a_recipe_that_is_missing(family: Family) -> None:
    before = snapshot(family.root)
    result = run("upit-merge", family.root / "recipe.yml", family.root / "out")
    assert_refused(result, "The recipe recipe.yml does not exist; correct the path.", family)
    assert snapshot(family.root) == before


# ---- options -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["upit-merge", "mergekit-yaml"])
@pytest.mark.parametrize("option", ["--device=cuda", "--cuda", "--multi-gpu"])
def test_cuda_without_a_device(option: str, command: str, family: Family) -> None:
    result = run(command, family.write_recipe(family.recipe()), family.root / "out", option)
    sentence = (
        "There is no CUDA device here that torch can use; leave out --cuda and --multi-gpu, or "
        "use --device cpu."
    )
    assert_refused(result, sentence, family)
    assert not (family.root / "out").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--device=tpu", "The device 'tpu' does not exist; use cpu or cuda."),
        (
            "--device=mps",
            "Apple's GPU (mps) is for `upit-merge chat`, everything else is computed on the CPU, "
            "which has the same memory; leave out --device.",
        ),
        (
            "--no-safe-serialization",
            "upit writes safetensors only; leave out --no-safe-serialization.",
        ),
    ],
)
def test_options(option: str, sentence: str, family: Family) -> None:
    recipe = family.write_recipe(family.recipe())
    assert_refused(run("mergekit-yaml", recipe, family.root / "out", option), sentence, family)
    assert not (family.root / "out").exists()


def test_pickles_are_read_when_asked(family: Family) -> None:
    """`--lazy-unpickle` gives the same bytes as safetensors do."""
    recipe = family.write_recipe(family.recipe(parameters={"num_experts": 5}))
    outs = [family.root / "from-safetensors", family.root / "from-pickle"]
    assert run("upit-merge", recipe, outs[0]).exit_code == 0
    pickled()(family)
    assert run("upit-merge", recipe, outs[1], "--lazy-unpickle").exit_code == 0
    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second
