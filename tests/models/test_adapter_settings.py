"""The configuration of an adapter: what is refused, and what is passed over with a warning.

`tests/support/spoilt.py` says what a case is; what is spoilt is the last of three adapters.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Family
from tests.support.spoilt import (
    ADAPTER,
    ADAPTER_CONFIG,
    Case,
    adapter_settings,
    assert_case_refused,
    assert_refused,
    content,
    each,
    refusal,
    run,
)
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.models.lora.adapter import open_model
from upit_merge.models.lora.config import read_adapter_config

MERGE = "merge it into its base first (PEFT's merge_and_unload)."


@pytest.fixture
def family(adapted: Family) -> Family:
    """A base and three adapters that say they were trained on it."""
    return adapted


CONFIG_CASES = {
    "another method": Case(
        adapter_settings(peft_type="LOHA"),
        f"Checkpoint {ADAPTER} is an adapter of type 'LOHA', of which only LORA can be read; {MERGE}",
    ),
    "no method": Case(
        adapter_settings(peft_type=None),
        f"Checkpoint {ADAPTER} is an adapter of type None, of which only LORA can be read; {MERGE}",
    ),
    **{
        f"initialised by {start}": Case(
            adapter_settings(init_lora_weights=start),
            f"Checkpoint {ADAPTER} was initialised by {start}, which changes the base's weights too; "
            "save it with PEFT's path_initial_model_for_weight_conversion.",
        )
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of")
    },
    **{
        key: Case(
            adapter_settings(**{key: value}),
            f"Checkpoint {ADAPTER} sets {key}, which cannot be read; {MERGE}",
        )
        for key, value in {
            "lora_bias": True,
            "fan_in_fan_out": True,
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "use_qalora": True,
            "layer_replication": [[0, 2]],
            "alora_invocation_tokens": [1],
        }.items()
    },
    **{
        f"{key} {value}": Case(
            adapter_settings(**{key: value}),
            f"{ADAPTER_CONFIG} has {key} {shown}, which is not a plain value of this setting; …",
        )
        for key, value, shown in (
            ("r", 0, "0"),
            ("r", "8", "'8'"),
            ("r", True, "True"),
            ("lora_alpha", None, "None"),
            ("lora_alpha", float("nan"), "nan"),
            ("rank_pattern", [3], "[3]"),
            ("rank_pattern", {"up_proj": 2.5}, "2.5"),
            ("alpha_pattern", {"up_proj": "x"}, "'x'"),
            ("alpha_pattern", {"[": 2}, "'['"),
            ("modules_to_save", [3], "[3]"),
            ("target_modules", [3], "…3…"),
            ("base_model_name_or_path", 3, "3"),
        )
    },
    "settings of a wrong kind": Case(
        adapter_settings(target_modules=["up_proj"], layers_pattern="x", layers_to_transform=None),
        f"The adapter_config.json of checkpoint {ADAPTER} is not a valid LoRA configuration (…); "
        f"copy or download {ADAPTER} again.",
    ),
    "broken JSON": Case(
        content(ADAPTER_CONFIG, lambda old: old[:50]),
        f"{ADAPTER_CONFIG} is not valid JSON (…); copy or download it again.",
    ),
    "JSON without end": Case(
        content(ADAPTER_CONFIG, lambda _: b"[" * 100_000),
        f"{ADAPTER_CONFIG} is not valid JSON (…); copy or download it again.",
    ),
}


@each(CONFIG_CASES)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


def test_settings_of_any_kind(family: Family) -> None:
    """Whatever a setting is, the adapter is opened or refused in a sentence."""
    values = [None, True, 0, -1, 1.5, "x", "", "\ud800", [], [1], ["x"], [None], [[1]], "a\nb"]
    values += [{}, {"x": 1}, {"x": None}, {"": 2}, float("inf"), 10**400]
    path = family.root / ADAPTER_CONFIG
    plain, told = json.loads(path.read_text()), []
    with closing(Checkpoint("base", family.base, OpenOptions())) as base:
        for key in (*plain, "runtime_config", "unheard-of"):
            for value in values:
                path.write_text(json.dumps(plain | {key: value}))
                try:
                    open_model(str(path.parent), base, OpenOptions(), lambda *_: base).close()
                except UpitError as error:
                    told.append(error.message)
    assert len(told) > 100
    assert all(sentence.endswith(".") and len(sentence) < 1000 for sentence in told)
    assert not any("\n" in sentence for sentence in told)


def test_a_setting_that_peft_does_not_know(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    adapter_settings(invented_later=3, off_by_default=None)(family)
    recipe = family.write_recipe(family.recipe())
    assert run("upit-merge", recipe, family.root / "out").exit_code == 0
    assert "sets invented_later, which the installed version of PEFT" in caplog.text
    assert "off_by_default" not in caplog.text


@pytest.mark.parametrize(
    ("named", "base", "refused"),
    [
        ("meta/Llama-3-8B", "meta/Llama-3-8B", False),
        ("meta/Llama-3-8B", "Mirror/llama-3-8b@main", False),
        ("meta/Llama-3-8B", "meta/Llama-3-8B-Instruct", True),
        ("/home/somebody/llama", "meta/Llama-3-8B", False),
        (None, "meta/Llama-3-8B", False),
    ],
)
def test_hub_ids_of_bases(
    named: str | None, base: str, refused: bool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(family.base))
    adapter_settings(base_model_name_or_path=named)(family)
    document = family.recipe(models=[str(family.root / ADAPTER)]) | {"base_model": base}
    result = run("upit-merge", family.write_recipe(document), family.root / "out")
    if not refused:
        assert result.exit_code == 0, result.output
        return
    sentence = (
        f"Checkpoint {ADAPTER} is an adapter for {named}, not for the base_model {base}; if they are "
        f"the same model, write {base}+{ADAPTER}."
    )
    assert_refused(result, sentence, family)
    explicit = family.recipe(models=[f"{base}+{family.root / ADAPTER}"]) | {"base_model": base}
    assert run("upit-merge", family.write_recipe(explicit), family.root / "out").exit_code == 0


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", ".*.*.*.*.*x", ".?" * 30 + "#", "(|.)" * 30 + "#", "(a|aa)" * 9, "a" * 5000],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "modules_to_save"])
def test_patterns_that_could_take_for_ever(tmp_path: Path, key: str, pattern: str) -> None:
    value: Any = [pattern] if key == "modules_to_save" else {pattern: 4}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    message = refusal(read_adapter_config, "it", tmp_path)
    assert "could take for ever to match; write the names of the" in message


@pytest.mark.parametrize(
    "pattern", [r"layers\.(0|1|2|31)\.mlp\.(up|down)_proj", ".*up_proj", "^x$"]
)
def test_patterns_that_are_fine(tmp_path: Path, pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    config["rank_pattern"] = {pattern: 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter_config("it", tmp_path).rank("layers.5.mlp.gate_proj") == 4
