"""Bad adapters: one sentence that names the thing and the remedy, and nothing left on the disk.

`tests/support/spoilt.py` says what a case is; what is spoilt is the last of three adapters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from tests.support.lora import EVERYTHING, save_adapter, with_adapters
from tests.support.spoilt import (
    BASE,
    UP,
    Case,
    Malicious,
    Spoil,
    assert_case_refused,
    assert_refused,
    both,
    content,
    each,
    entry,
    json_file,
    moved_out,
    pickled,
    recipe,
    refusal,
    run,
    tensors,
    without,
)
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions
from upit_merge.models.lora.adapter import open_model
from upit_merge.models.lora.config import read_adapter_config

LAST = "lora/checkpoint-1500"
CONFIG = f"{LAST}/adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODULE = "model.layers.1.mlp.up_proj"
PREFIX = f"base_model.model.{MODULE}"
MERGE = "merge it into its base first (PEFT's merge_and_unload)."


@pytest.fixture(scope="module")
def shared_adapters(shared_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("adapters") / "family"
    root.mkdir()
    shutil.copytree(shared_family.base, root / BASE)
    family = Family(root, root / BASE, [])
    with_adapters(family)
    return family


@pytest.fixture
def family(shared_adapters: Family, tmp_path: Path) -> Family:
    """A base and three adapters that say they were trained on it."""
    root = tmp_path / "family"
    shutil.copytree(shared_adapters.root, root)
    folders = [root / "lora" / f"checkpoint-{step}" for step in (500, 1000, 1500)]
    family = Family(root, root / BASE, folders)
    for folder in folders:
        path = f"lora/{folder.name}/adapter_config.json"
        json_file(path, base_model_name_or_path=str(family.base))(family)
    return family


def settings(**changes: Any) -> Spoil:
    """Change the last adapter's configuration."""
    return json_file(CONFIG, **changes)


def factors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the last adapter's tensors."""
    return tensors(f"{LAST}/{WEIGHTS}", change)


def trained(**config: Any) -> Spoil:
    """Train the last adapter in another way."""

    def spoil(family: Family) -> None:
        shutil.rmtree(family.root / LAST)
        save_adapter(family.base, family.root / LAST, **config)

    return spoil


def on_other_base(**config: Any) -> Spoil:
    """Train the last adapter on a model of other sizes, and tell nobody."""

    def spoil(family: Family) -> None:
        other = build_family(family.root / "other", count=0, **config)
        shutil.rmtree(family.root / LAST)
        save_adapter(other.base, family.root / LAST)
        settings(base_model_name_or_path=None)(family)

    return spoil


def tied(**config: Any) -> Spoil:
    """Train all adapters on a base that ties its embeddings."""

    def spoil(family: Family) -> None:
        other = build_family(family.root / "tied", count=0, tie_word_embeddings=True)
        shutil.rmtree(family.base)
        other.base.rename(family.base)
        trained(**config)(family)

    return spoil


def models(*references: str) -> Spoil:
    """A recipe of these; `@` is the family's folder."""
    return recipe(models=[{"model": reference} for reference in references])


def set_entry(name: str, value: float) -> Spoil:
    return factors(lambda t: t[name].view(-1)[3:4].fill_(value))


CONFIG_CASES = {
    "another method": Case(
        settings(peft_type="LOHA"),
        f"Checkpoint {LAST} is an adapter of type 'LOHA', of which only LORA can be read; {MERGE}",
    ),
    "no method": Case(
        settings(peft_type=None),
        f"Checkpoint {LAST} is an adapter of type None, of which only LORA can be read; {MERGE}",
    ),
    **{
        f"initialised by {start}": Case(
            settings(init_lora_weights=start),
            f"Checkpoint {LAST} was initialised by {start}, which changes the base's weights too; "
            "save it with PEFT's path_initial_model_for_weight_conversion.",
        )
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of")
    },
    **{
        key: Case(
            settings(**{key: value}),
            f"Checkpoint {LAST} sets {key}, which cannot be read; {MERGE}",
        )
        for key, value in {
            "lora_bias": True,
            "fan_in_fan_out": True,
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "trainable_token_indices": [1, 2],
            "use_qalora": True,
            "layer_replication": [[0, 2]],
            "alora_invocation_tokens": [1],
        }.items()
    },
    **{
        f"{key} {value}": Case(
            settings(**{key: value}),
            f"{CONFIG} has {key} {shown}, which is not a plain value of this setting; …",
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
        settings(target_modules=["up_proj"], layers_pattern="x", layers_to_transform=None),
        f"The adapter_config.json of checkpoint {LAST} is not a valid LoRA configuration (…); "
        f"copy or download {LAST} again.",
    ),
    "broken JSON": Case(
        content(CONFIG, lambda old: old[:50]),
        f"{CONFIG} is not valid JSON (…); copy or download it again.",
    ),
    "JSON without end": Case(
        content(CONFIG, lambda _: b"[" * 100_000),
        f"{CONFIG} is not valid JSON (…); copy or download it again.",
    ),
}

WEIGHT_CASES = {
    "no weights": Case(
        without(f"{LAST}/{WEIGHTS}"),
        f"Checkpoint {LAST} has an adapter_config.json but no {WEIGHTS} in {LAST}; give the folder "
        "of a complete adapter.",
    ),
    "pickle without the option": Case(
        pickled(path=f"{LAST}/{WEIGHTS}", name="adapter_model.bin"),
        f"Checkpoint {LAST} has only adapter_model.bin, a pickle that could run code; convert it "
        "to safetensors, or pass --lazy-unpickle to read it with weights_only.",
    ),
    "malicious pickle": Case(
        pickled(
            lambda state: state.update(a=Malicious()), f"{LAST}/{WEIGHTS}", "adapter_model.bin"
        ),
        f"{LAST}/adapter_model.bin cannot be read with weights_only (it is corrupt or holds "
        "objects other than tensors, which could run code); convert the checkpoint to …",
        ("--lazy-unpickle",),
    ),
    "truncated": Case(
        content(f"{LAST}/{WEIGHTS}", lambda old: old[:-10]),
        f"{LAST}/{WEIGHTS} is truncated or corrupt (…); copy or download it again.",
    ),
    "link out of the folder": Case(
        moved_out(f"{LAST}/{WEIGHTS}", absolute=True),
        f"{LAST}/{WEIGHTS} is a link to outside/{WEIGHTS}, outside its folder; copy the file "
        "there, or link the whole folder.",
    ),
    "configuration out of the folder": Case(
        moved_out(CONFIG, absolute=True),
        f"{CONFIG} is a link to outside/adapter_config.json, outside its folder; …",
    ),
    "only one factor": Case(
        factors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")),
        f"Checkpoint {LAST} has not both factors for {MODULE} (it has {PREFIX}.lora_A.weight); "
        "save the adapter again.",
    ),
    "only the other factor": Case(
        factors(lambda t: t.pop(f"{PREFIX}.lora_A.weight")),
        f"Checkpoint {LAST} has not both factors for {MODULE} (it has {PREFIX}.lora_B.weight); …",
    ),
    "no factors for a target": Case(
        factors(lambda t: [t.pop(f"{PREFIX}.lora_{f}.weight") for f in "AB"]),
        f"Checkpoint {LAST} has no tensors for {MODULE}, which its adapter_config.json names; save "
        "the adapter again.",
    ),
    "no module that was to be saved": Case(
        settings(modules_to_save=["lm_head"]),
        f"Checkpoint {LAST} has no tensors for lm_head, which its adapter_config.json names; save …",
    ),
    "another rank than told": Case(
        settings(r=8),
        f"Checkpoint {LAST} has factors of shapes [4, …] and […, 4] for …, but its "
        "adapter_config.json says rank 8; save the adapter again.",
    ),
    "another rank than its pattern": Case(
        settings(rank_pattern={"layers.1.mlp.up_proj": 2}),
        f"Checkpoint {LAST} has factors of shapes [4, 32] and [48, 4] for {MODULE}, but its "
        "adapter_config.json says rank 2; save the adapter again.",
    ),
    "factors that are vectors": Case(
        factors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(4)})),
        f"Checkpoint {LAST} has factors of shapes [4] and [48, 4] for {MODULE}, but …",
    ),
    "a module the base has not": Case(
        factors(
            lambda t: [
                t.update({f"base_model.model.model.router.lora_{f}.weight": torch.zeros(4, 4)})
                for f in "AB"
            ]
        ),
        f"Checkpoint {LAST} changes model.router, which the base base has not; name the base it "
        "was trained on.",
    ),
    "a bias": Case(
        factors(lambda t: t.update({f"{PREFIX}.bias": torch.zeros(48)})),
        f"Checkpoint {LAST} has the tensor {PREFIX}.bias, which is a bias, which Mixtral cannot "
        "express; use a plain LoRA adapter without biases, or merge it into its base first …",
    ),
    **{
        f"tensor {name}": Case(
            factors(lambda t, name=name: t.update({name: torch.zeros(2, 2)})),
            f"Checkpoint {LAST} has the tensor {name}, which cannot be applied; use a plain …",
        )
        for name in (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            f"{PREFIX}.lora_diag",
            "prompt_embeddings",
            f"{MODULE}.lora_A.weight",
        )
    },
    "magnitudes without DoRA": Case(
        both(trained(use_dora=True), settings(use_dora=False)),
        f"Checkpoint {LAST} has magnitudes for …, but its adapter_config.json sets use_dora to "
        "false; save the adapter again.",
    ),
    "DoRA without magnitudes": Case(
        settings(use_dora=True),
        f"Checkpoint {LAST} has no magnitudes for …, but its adapter_config.json sets use_dora to "
        "true; save the adapter again.",
    ),
    "DoRA on embeddings": Case(
        trained(use_dora=True, target_modules=["embed_tokens", "up_proj"]),
        f"Checkpoint {LAST} has DoRA on model.embed_tokens, which is not supported on embeddings; "
        f"{MERGE}",
    ),
    "attention only": Case(
        trained(target_modules=["q_proj", "v_proj"]),
        f"Checkpoint {LAST} has trained no FFN module (gate_proj, down_proj, up_proj), so there is "
        "no expert in it; use an adapter that has, as attention is shared by all experts.",
    ),
    "tied embeddings": Case(
        tied(modules_to_save=["lm_head"]),
        "Checkpoint … changes lm_head.weight, but the base base ties its embeddings; …",
    ),
}

# Found while tensors are compared or written, not when the adapter is opened.
VALUE_CASES = {
    "NaN in a factor": Case(
        set_entry(f"{PREFIX}.lora_A.weight", float("nan")),
        f"Checkpoint {LAST} has NaN or infinite weights in {UP}; use a checkpoint from before the "
        "training diverged.",
    ),
    "infinity in a factor": Case(
        set_entry(f"{PREFIX}.lora_B.weight", float("inf")),
        f"Checkpoint {LAST} has NaN or infinite weights in {UP}; …",
    ),
    "NaN in the base": Case(
        entry(BASE, UP, float("nan")),
        f"Checkpoint base has NaN or infinite weights in {UP}; …",
    ),
    "a product that overflows": Case(
        factors(lambda t: [t[f"{PREFIX}.lora_{f}.weight"].fill_(1e38) for f in "AB"]),
        f"Checkpoint {LAST} has NaN or infinite weights in {UP}; …",
    ),
}

BASE_CASES = {
    "other sizes": Case(
        on_other_base(intermediate_size=64),
        f"Checkpoint {LAST} was trained for another base: its factors for "
        "model.layers.0.mlp.down_proj make [32, 64], the base base has [32, 48].",
    ),
    "another folder": Case(
        settings(base_model_name_or_path="lora"),
        f"Checkpoint {LAST} is an adapter for lora, not for the base_model base; if they are the "
        f"same model, write base+{LAST}.",
    ),
    "base plus a model": Case(
        models("@base+@base"),
        "base+base needs an adapter after the +, but base has no adapter_config.json, or has "
        "complete weights too; give an adapter's folder.",
    ),
    "adapter on an adapter": Case(
        models(f"@lora/checkpoint-500+@{LAST}"),
        "lora/checkpoint-500 is an adapter, but a complete model is needed here; …",
    ),
    "missing base": Case(
        models(f"@nowhere+@{LAST}"),
        "The adapter's base nowhere does not exist (looked in …); correct the path in the recipe.",
    ),
    "glob of adapters without a match": Case(
        models("@base+@lora/step-*"),
        "models: base+lora/step-* matches no folder (looked in …); correct the pattern or …",
    ),
    "base_model with an adapter": Case(
        lambda family: family.recipe() | {"base_model": f"{family.base}+{family.root / LAST}"},
        f"base_model: base+{LAST} is an adapter on base, but deltas are measured against a "
        "complete model; write base_model: base.",
    ),
}


@each(CONFIG_CASES | WEIGHT_CASES | BASE_CASES)
def test_one_sentence_and_nothing_left(
    case: Case, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_case_refused(case, family, monkeypatch)


@each(VALUE_CASES)
@pytest.mark.parametrize("experts", [3, 5])
def test_values(case: Case, experts: int, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pass over the models and with two."""
    assert_case_refused(case, family, monkeypatch, num_experts=experts)


def test_settings_of_any_kind(family: Family) -> None:
    """Whatever a setting is, the adapter is opened or refused in a sentence."""
    values = [None, True, 0, -1, 1.5, "x", "", "\ud800", [], [1], ["x"], [None], [[1]], "a\nb"]
    values += [{}, {"x": 1}, {"x": None}, {"": 2}, float("inf"), 10**400]
    path = family.root / CONFIG
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
    settings(invented_later=3, off_by_default=None)(family)
    recipe = family.write_recipe(family.recipe())
    assert run("upit-merge", recipe, family.root / "out").exit_code == 0
    assert "sets invented_later, which the installed version of PEFT" in caplog.text
    assert "off_by_default" not in caplog.text


def test_nan_in_a_tensor_no_adapter_touches(family: Family) -> None:
    """Comparing adapters does not read the base: writing finds it."""
    for folder in family.checkpoints:
        shutil.rmtree(folder)
        save_adapter(family.base, folder, target_modules=["down_proj"])
    entry(BASE, UP, float("inf"))(family)
    recipe = family.write_recipe(family.recipe(parameters={"num_experts": 5}))
    result = run("upit-merge", recipe, family.root / "out")
    assert_refused(result, f"Checkpoint base has NaN or infinite weights in {UP}; …", family)
    assert not (family.root / "out").exists()


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
    settings(base_model_name_or_path=named)(family)
    document = family.recipe(models=[str(family.root / LAST)]) | {"base_model": base}
    result = run("upit-merge", family.write_recipe(document), family.root / "out")
    if not refused:
        assert result.exit_code == 0, result.output
        return
    sentence = (
        f"Checkpoint {LAST} is an adapter for {named}, not for the base_model {base}; if they are "
        f"the same model, write {base}+{LAST}."
    )
    assert_refused(result, sentence, family)
    explicit = family.recipe(models=[f"{base}+{family.root / LAST}"]) | {"base_model": base}
    assert run("upit-merge", family.write_recipe(explicit), family.root / "out").exit_code == 0


def test_tied_embeddings_that_are_replaced_together(tmp_path: Path) -> None:
    """As trainers save them when the vocabulary was looked at: twice the same table."""
    family = build_family(tmp_path, count=0, tie_word_embeddings=True)
    folder = tmp_path / "adapter"
    save_adapter(family.base, folder, target_modules=EVERYTHING)
    found = load_file(folder / WEIGHTS)
    table = torch.randn(259, 32)
    for name in ("model.embed_tokens", "lm_head"):
        found[f"base_model.model.{name}.weight"] = table.clone()
    save_file(found, folder / WEIGHTS)
    recipe = family.write_recipe(family.recipe(models=[str(folder)]))
    result = run("upit-merge", recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    moe = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(moe["model.embed_tokens.weight"], table)


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
