"""Bad input: one sentence that names the thing and the remedy, and nothing left on the disk.

A case is a name, what spoils the family or the recipe, and the sentence the user must see. In the
sentences `…` stands for anything, and paths are relative to the family's folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from filelock import FileLock
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

from tests.conftest import Family, build_family
from upit_merge.cli.main import main as upit_merge

BASE, FIRST, SECOND, LAST = "base", *(f"sft/checkpoint-{step}" for step in (500, 1000, 1500))
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

Document = dict[str, Any]
Spoil = Callable[[Family], Document | None]  # None: the recipe stays as it is


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Spoil
    sentence: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


# ---- what spoils a family ------------------------------------------------------------------


def recipe(**keys: Any) -> Spoil:
    """Other top-level keys; a string with `@` has it replaced by the family's folder."""
    return lambda family: (
        family.recipe() | yaml.safe_load(json.dumps(keys).replace("@", f"{family.root}/"))
    )


def parameters(**settings: Any) -> Spoil:
    return recipe(parameters=settings)


def config(folder: str, **changes: Any) -> Spoil:
    """Change keys of a config.json."""

    def spoil(family: Family) -> None:
        path = family.root / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the tensors of a model in place."""

    def spoil(family: Family) -> None:
        path = family.root / folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return spoil


def entry(folder: str, name: str, value: float) -> Spoil:
    """Set one weight."""
    return weights(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


def content(path: str, new: Callable[[bytes], bytes]) -> Spoil:
    """Change a file's bytes."""

    def spoil(family: Family) -> None:
        file = family.root / path
        file.write_bytes(new(file.read_bytes() if file.exists() else b""))

    return spoil


def without(*paths: str) -> Spoil:
    """Remove files."""

    def spoil(family: Family) -> None:
        for path in paths:
            (family.root / path).unlink()

    return spoil


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Spoil:
    """Split the last checkpoint into shards, then spoil its folder and weight map."""

    def spoil(family: Family) -> None:
        folder = family.checkpoints[-1]
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
        for part in set(weight_map.values()):
            save_file({n: tensors[n] for n in tensors if weight_map[n] == part}, folder / part)
        change(folder, weight_map)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def other_family(folder: str, **settings: Any) -> Spoil:
    """Put a model with other settings in a folder's place."""

    def spoil(family: Family) -> None:
        other = build_family(family.root / "other", count=0, **settings)
        shutil.rmtree(family.root / folder)
        other.base.rename(family.root / folder)

    return spoil


def pickled(change: Callable[[Document], Any] = lambda state: None) -> Spoil:
    """Turn the last checkpoint into a `.bin`."""

    def spoil(family: Family) -> None:
        path = family.checkpoints[-1] / "model.safetensors"
        state = load_file(path)
        change(state)
        torch.save(state, path.with_name("pytorch_model.bin"))
        path.unlink()

    return spoil


class Malicious:
    """Unpickling it would make the file `executed` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def adapter(family: Family) -> None:
    folder = family.checkpoints[-1]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def adapter_as_base(family: Family) -> Document:
    adapter(family)
    return family.recipe() | {"base_model": str(family.checkpoints[-1])}


def seed_data(text: str | None, **settings: Any) -> Spoil:
    """A router block with this seed data."""

    def spoil(family: Family) -> Document:
        path = family.root / "seed.jsonl"
        if text is not None:
            path.write_text(text)
        return family.recipe(router={"data": str(path), **settings})

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other; the last one's recipe counts."""
    return lambda family: [spoil(family) for spoil in spoils][-1]


TOKENIZERS = [
    f"{folder}/{name}"
    for folder in (BASE, FIRST, SECOND, LAST)
    for name in ("tokenizer.json", "tokenizer_config.json")
]

RECIPE_CASES = [
    Case(
        "unknown key",
        recipe(flavour=3),
        "recipe.yml: unknown key flavour (known here: architecture, …, tokenizer_source).",
    ),
    Case(
        "misspelled key",
        recipe(paramters={}),
        "recipe.yml: unknown key paramters (did you mean parameters?).",
    ),
    Case(
        "misspelled parameter",
        parameters(num_expert=4),
        "recipe.yml: unknown key parameters.num_expert (did you mean num_experts?).",
    ),
    Case(
        "more experts per token than experts",
        parameters(num_experts=2, experts_per_token=3),
        "recipe.yml: parameters: num_experts (2) is below experts_per_token (3), but …; "
        "lower experts_per_token or raise num_experts.",
    ),
    Case(
        "more per token than checkpoints",
        parameters(experts_per_token=4),
        "The recipe makes 3 experts but routes a token to 4; lower experts_per_token or "
        "raise num_experts.",
    ),
    Case(
        "many experts of one checkpoint",
        recipe(models=[{"model": f"@{LAST}"}], parameters={"num_experts": 8}),
        "One checkpoint cannot be the parents of 8 experts; list at least two checkpoints "
        "under models:, or set num_experts: 1.",
    ),
    Case(
        "copies that leave a checkpoint out",
        parameters(num_experts=2, expansion="copy"),
        "The recipe copies 3 checkpoints into 2 experts, which leaves some out; raise num_experts "
        "or list fewer under models:.",
    ),
    Case(
        "missing base",
        recipe(base_model="@nowhere"),
        "The base_model nowhere does not exist (looked in …); correct the path in the recipe.",
    ),
    Case(
        "missing checkpoint",
        recipe(models=[{"model": f"@{FIRST}"}, {"model": "@sft/checkpoint-2000"}]),
        "The checkpoint sft/checkpoint-2000 does not exist (looked in …); correct the path "
        "in the recipe.",
    ),
    Case(
        "unreachable Hub id",
        recipe(base_model="nobody/nothing"),
        "The base_model nobody/nothing is neither a local folder nor a model the Hub could "
        "give (…); correct the name or download it first.",
    ),
    Case(
        "glob without a match",
        recipe(models=[{"model": "@sft/ckpt-*"}]),
        "models: sft/ckpt-* matches no folder (looked in …); correct the pattern or the "
        "working directory.",
    ),
    Case(
        "checkpoint is a file",
        recipe(models=[{"model": f"@{LAST}/config.json"}]),
        "The checkpoint sft/checkpoint-1500/config.json is a file; give the folder that holds it.",
    ),
    Case(
        "adapter that is missing",
        recipe(models=[{"model": f"@{BASE}+@adapter"}]),
        "The adapter adapter does not exist (looked in …); correct the path in the recipe.",
    ),
    Case(
        "unknown backbone",
        parameters(backbone="first"),
        "parameters.backbone: first is none of the recipe's models (sft/checkpoint-500, …); "
        "name one of them.",
    ),
    Case(
        "unknown tokenizer_source",
        recipe(tokenizer_source="gpt2"),
        "tokenizer_source: gpt2 is none of the recipe's models (sft/checkpoint-500, …); name "
        "one of them.",
    ),
    Case(
        "unknown chat_template",
        recipe(chat_template="chatml2"),
        "chat_template: 'chatml2' is neither a Jinja template nor one of mergekit's (alpaca, "
        "chatml, …); use one of these.",
    ),
]

FOLDER_CASES = [
    Case(
        "no config.json",
        without(f"{SECOND}/config.json"),
        "Checkpoint sft/checkpoint-1000 has no config.json in sft/checkpoint-1000; give the "
        "folder of a complete Hugging Face checkpoint.",
    ),
    Case(
        "invalid config.json",
        content(f"{SECOND}/config.json", lambda old: old[:-20]),
        "sft/checkpoint-1000/config.json is not valid JSON (…line 31 column 3…); copy or "
        "download it again.",
    ),
    Case(
        "config.json is a list",
        content(f"{SECOND}/config.json", lambda old: b"[]"),
        "sft/checkpoint-1000/config.json is not a JSON object; copy or download it again.",
    ),
    Case(
        "no weights",
        without(f"{LAST}/model.safetensors"),
        "Checkpoint sft/checkpoint-1500 has no weights (model.safetensors or …) in "
        "sft/checkpoint-1500; give the folder of a complete Hugging Face checkpoint.",
    ),
    Case(
        "other architecture",
        config(SECOND, model_type="qwen2"),
        "Checkpoint sft/checkpoint-1000 has model_type 'qwen2'; use llama, mistral "
        "or qwen3 checkpoints.",
    ),
    Case(
        "no model_type",
        config(BASE, model_type=None),
        "Checkpoint base has model_type None; use llama, mistral or qwen3 checkpoints.",
    ),
    Case(
        "Llama and Mistral",
        other_family(LAST, kind="mistral"),
        "Checkpoint sft/checkpoint-1500 is a mistral model, the base base a llama; all must "
        "come from one base.",
    ),
    Case(
        "other hidden size",
        other_family(LAST, hidden_size=64),
        "Checkpoint sft/checkpoint-1500 has hidden_size 64, the base base has 32; all models "
        "must come from the same base.",
    ),
    Case(
        "other number of layers",
        other_family(LAST, num_hidden_layers=3),
        "Checkpoint sft/checkpoint-1500 has num_hidden_layers 3, the base base has 2; all "
        "models must come from the same base.",
    ),
    Case(
        "other vocabulary",
        other_family(LAST, vocab_size=260),
        "Checkpoint sft/checkpoint-1500 has vocab_size 260, the base base has 259; resize "
        "the base's embeddings to the tokenizer the checkpoints were trained with.",
    ),
    Case(
        "other rope",
        config(LAST, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "Checkpoint sft/checkpoint-1500 has rope_parameters {…500000.0…}, the base base has "
        "{…10000.0…}; all models must come from the same base.",
    ),
    Case(
        "attention_bias",
        config(LAST, attention_bias=True),
        "Checkpoint sft/checkpoint-1500 sets attention_bias, which Mixtral cannot express; "
        "use a model without it.",
    ),
    Case(
        "mlp_bias",
        config(LAST, mlp_bias=True),
        "Checkpoint sft/checkpoint-1500 sets mlp_bias, which Mixtral cannot express; use a "
        "model without it.",
    ),
    Case(
        "quantised",
        config(LAST, quantization_config={"bits": 4}),
        "Checkpoint sft/checkpoint-1500 is quantised (quantization_config); use the "
        "unquantised checkpoint.",
    ),
    Case(
        "senseless config.json",
        config(LAST, num_attention_heads="four"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama "
        "configuration (…num_attention_heads…'four'…); copy or download it again.",
    ),
    Case(
        "unknown activation",
        config(LAST, hidden_act="swish-9"),
        "The config.json of checkpoint sft/checkpoint-1500 is not a valid llama configuration "
        "(hidden_act 'swish-9' is unknown); copy or download it again.",
    ),
    Case(
        "config.json of another model",
        both(*(config(f, intermediate_size=64) for f in (BASE, FIRST, SECOND, LAST))),
        "The base base should have model.layers.0.mlp.gate_proj.weight of shape [64, 32] by "
        "its config.json but has it in shape [48, 32]; use a complete checkpoint.",
    ),
    Case(
        "adapter as base",
        adapter_as_base,
        "sft/checkpoint-1500 is an adapter, but a complete model is needed here; name the model "
        "the adapter was trained on.",
    ),
    Case(
        "pickle without the option",
        pickled(),
        "Checkpoint sft/checkpoint-1500 has only pytorch_model.bin, a pickle that could run "
        "code; convert it to safetensors, or pass --lazy-unpickle to read it with "
        "weights_only.",
    ),
    Case(
        "malicious pickle",
        pickled(lambda s: s.update(extra=Malicious())),
        "sft/checkpoint-1500/pytorch_model.bin cannot be read with weights_only (it is "
        "corrupt or holds objects other than tensors, which could run code); convert the "
        "checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    Case(
        "truncated pickle",
        both(pickled(), content(f"{LAST}/pytorch_model.bin", lambda old: old[:5000])),
        "sft/checkpoint-1500/pytorch_model.bin is not a file of torch.save (…), or is "
        "truncated; copy or download it again, or convert the checkpoint to safetensors.",
        ("--lazy-unpickle",),
    ),
    Case(
        "missing shard",
        sharded(lambda folder, _: (folder / "part-1.safetensors").unlink()),
        "Checkpoint sft/checkpoint-1500 lacks the shard part-1.safetensors that its "
        "model.safetensors.index.json lists; copy or download it again.",
    ),
    Case(
        "index points outside",
        sharded(lambda _, m: m.update({UP: "../checkpoint-500/model.safetensors"})),
        "sft/checkpoint-1500/model.safetensors.index.json points outside its folder "
        "(../checkpoint-500/model.safetensors); do not use this checkpoint.",
    ),
    Case(
        "index lists too much",
        sharded(lambda _, m: m.update(extra="part-0.safetensors")),
        "Checkpoint sft/checkpoint-1500 lacks extra that its model.safetensors.index.json "
        "lists; copy or download it again.",
    ),
    Case(
        "index without weight_map",
        sharded(lambda folder, m: m.update({UP: 3})),
        "sft/checkpoint-1500/model.safetensors.index.json has no usable weight_map; copy or "
        "download it again.",
    ),
]

WEIGHT_CASES = [
    Case(
        "truncated safetensors",
        content(f"{SECOND}/model.safetensors", lambda old: old[:-100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…not fully covered); "
        "copy or download it again.",
    ),
    Case(
        "cut to its header",
        content(f"{SECOND}/model.safetensors", lambda old: old[:100]),
        "sft/checkpoint-1000/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    Case(
        "garbage safetensors",
        content(f"{BASE}/model.safetensors", lambda old: b"garbage" * 99),
        "base/model.safetensors is truncated or corrupt (…header…); copy or download it again.",
    ),
    Case(
        "empty safetensors",
        content(f"{LAST}/model.safetensors", lambda old: b""),
        "sft/checkpoint-1500/model.safetensors is truncated or corrupt (…header…); copy or "
        "download it again.",
    ),
    Case(
        "missing tensor",
        weights(SECOND, lambda t: t.pop(UP)),
        "Checkpoint sft/checkpoint-1000 has no tensor model.layers.1.mlp.up_proj.weight; use "
        "a complete llama checkpoint.",
    ),
    Case(
        "missing tensor in the base",
        weights(BASE, lambda t: t.pop(UP)),
        "The base base should have model.layers.1.mlp.up_proj.weight of shape [48, 32] by "
        "its config.json but lacks it; use a complete checkpoint.",
    ),
    Case(
        "other shape",
        weights(SECOND, lambda t: t.update({UP: t[UP][1:].clone()})),
        "Checkpoint sft/checkpoint-1000 has model.layers.1.mlp.up_proj.weight of shape [47, "
        "32], the base base has [48, 32]; all models must come from the same base.",
    ),
    Case(
        "other vocabulary in the weights",
        weights(SECOND, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(300, 32)})),
        "Checkpoint sft/checkpoint-1000 has a vocabulary of 300 in "
        "model.embed_tokens.weight, the base base one of 259; resize the base's embeddings "
        "to the tokenizer the checkpoints were trained with.",
    ),
    Case(
        "bias tensors",
        weights(SECOND, lambda t: t.update({QUERY.replace("weight", "bias"): torch.zeros(32)})),
        "Checkpoint sft/checkpoint-1000 has the tensor model.layers.0.self_attn.q_proj.bias, "
        "which Mixtral has no place for; use a plain checkpoint without biases or "
        "adapters.",
    ),
    Case(
        "int8 tensors",
        weights(SECOND, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        "sft/checkpoint-1000/model.safetensors stores model.layers.1.mlp.up_proj.weight as "
        "I8, which cannot be merged; use the unquantised checkpoint (…).",
    ),
    Case(
        "NaN in an FFN",
        entry(SECOND, UP, float("nan")),
        "Checkpoint sft/checkpoint-1000 has NaN or infinite weights in "
        "model.layers.1.mlp.up_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    Case(
        "NaN in the base",
        entry(BASE, UP, float("nan")),
        "Checkpoint base has NaN or infinite weights in model.layers.1.mlp.up_proj.weight; use …",
    ),
    Case(
        "infinity in the backbone",
        entry(LAST, QUERY, float("inf")),
        "Checkpoint sft/checkpoint-1500 has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use a checkpoint from before the training "
        "diverged.",
    ),
    Case(
        "NaN in an averaged backbone",
        both(entry(FIRST, QUERY, float("nan")), parameters(backbone="average")),
        "Checkpoint sft/checkpoint-500… has NaN or infinite weights in "
        "model.layers.0.self_attn.q_proj.weight; use …",
    ),
    Case(
        "float16 overflow",
        both(entry(SECOND, UP, 1e5), recipe(dtype="float16")),
        f"Expert 1's {UP} overflows float16; set dtype: bfloat16.",
    ),
    Case(
        "float16 overflow in the backbone",
        both(entry(LAST, QUERY, 1e5), recipe(dtype="float16")),
        f"The backbone's {QUERY} overflows float16; set dtype: bfloat16.",
    ),
]

SEED_CASES = [
    Case(
        "no such file",
        seed_data(None),
        "There is no seed data at 'seed.jsonl'; give the path of a .jsonl, …",
    ),
    Case("empty file", seed_data(""), "seed.jsonl is empty; put at least one sample in it."),
    Case(
        "malformed line",
        seed_data('{"text": "one"}\n{"text": '),
        "seed.jsonl line 2 is not JSON (Expecting value at column 10); put one JSON object "
        "on each line.",
    ),
    Case(
        "no usable column",
        seed_data('{"input": "one"}\n'),
        "seed.jsonl line 1 has `input` and no usable column; give each record `text`, …",
    ),
    Case(
        "no chat template",
        seed_data('{"messages": [{"role": "user", "content": "Hi"}]}\n'),
        "seed.jsonl line 1 is a conversation, but the tokenizer has no chat template; use a "
        "`text` column, or set `chat_template` in the recipe.",
    ),
    Case(
        "too short",
        seed_data('{"text": ""}\n' * 3),
        "No seed sample is left (3 samples dropped as too short); give longer samples or "
        "raise `max_length`.",
    ),
    Case(
        "no tokenizer",
        both(without(*TOKENIZERS), seed_data('{"text": "one"}')),
        "router: needs a tokenizer for its seed data, but no model of the recipe has one; "
        "put tokenizer.json into the last checkpoint's folder.",
    ),
    Case(
        "broken tokenizer",
        both(
            content(f"{LAST}/tokenizer.json", lambda old: old[:500]), seed_data('{"text": "one"}')
        ),
        "The tokenizer in sft/checkpoint-1500 cannot be loaded (…); check its files.",
    ),
]


CASES = [*RECIPE_CASES, *FOLDER_CASES, *WEIGHT_CASES, *SEED_CASES]


# ---- what the user must see ----------------------------------------------------------------


def run(command: str, recipe: Path, out: Path, *options: str) -> Result:
    """What the command prints and returns to the shell."""
    if command == "mergekit-yaml":
        return CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), "--quiet", *options])
    return CliRunner().invoke(upit_merge, ["run", str(recipe), str(out), "--quiet", *options])


def told(stderr: str, family: Family) -> str:
    """The one line on stderr, without the family's folder."""
    line = stderr.strip().replace(f"{family.root}/", "")
    # mergekit hands us the document, not the name of its file.
    return line.replace("Error: the recipe: ", "Error: recipe.yml: ")


def like(sentence: str) -> re.Pattern[str]:
    return re.compile("Error: " + ".*".join(map(re.escape, sentence.split("…"))))


def assert_refused(result: Result, sentence: str, family: Family) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    line = told(result.stderr, family)
    assert like(sentence).fullmatch(line), line
    assert line.endswith(".")
    assert not result.stdout


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("command", ["upit-merge", "mergekit-yaml"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_sentence_and_nothing_left(
    case: Case, command: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family.root)
    recipe = family.write_recipe(case.spoil(family) or family.recipe())
    before = snapshot(family.root)
    result = run(command, recipe, family.root / "new" / "out", *case.options)
    assert_refused(result, case.sentence, family)
    assert snapshot(family.root) == before


def test_real_mergekit_yaml(shared_family: Family, tmp_path: Path) -> None:
    """The same by the installed command, in processes of their own that run side by side."""
    names = ("misspelled key", "truncated safetensors", "NaN in an FFN")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = Path(sys.executable).with_name("mergekit-yaml")
    started = []
    for case in (case for case in CASES if case.name in names):
        root = tmp_path / str(case)
        shutil.copytree(shared_family.root, root)
        checkpoints = [root / p.relative_to(shared_family.root) for p in shared_family.checkpoints]
        family = Family(root, root / "base", checkpoints)
        recipe = family.write_recipe(case.spoil(family) or family.recipe())
        process = subprocess.Popen(
            [command, recipe, root / "out", "--quiet"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append((case, family, process))
    assert len(started) == len(names)
    for case, family, process in started:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert like(case.sentence).fullmatch(told(stderr, family)), stderr
        assert not stdout
        assert not (family.root / "out").exists()


# ---- recipe files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "The recipe recipe.yml does not exist; correct the path."),
        ("models: [", "recipe.yml is not valid YAML (line 1, column 10: …); correct the file."),
        ("", "recipe.yml is not a YAML mapping; see recipes/upit-8x.yml for one."),
        (
            "merge_method: linear",
            "recipe.yml: merge_method is 'linear', not 'upit'; run other methods with "
            "mergekit-yaml.",
        ),
        ("base_model: x", "recipe.yml: merge_method is missing; add merge_method: upit."),
        ("merge_method: \xff", "The recipe recipe.yml cannot be read (…utf-8…); check the file."),
    ],
    ids=["missing", "not YAML", "empty", "other method", "no method", "not UTF-8"],
)
def test_recipe_file(text: str | None, sentence: str, family: Family) -> None:
    path = family.root / "recipe.yml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    before = snapshot(family.root)
    assert_refused(run("upit-merge", path, family.root / "out"), sentence, family)
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
        ("--device=mps", "The device 'mps' is not supported; use cpu or cuda."),
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


# ---- output folders ------------------------------------------------------------------------


def test_an_empty_folder_stays(family: Family) -> None:
    out = family.root / "out"
    out.mkdir()
    entry(SECOND, UP, float("nan"))(family)
    recipe = family.write_recipe(family.recipe())
    assert_refused(run("upit-merge", recipe, out), "… has NaN or infinite weights in …", family)
    assert snapshot(out) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            (),
            "The output folder out is not empty (it holds thesis.tex); choose a new folder, or "
            "replace an earlier output with `upit-merge run --overwrite`.",
        ),
        (
            ("--overwrite",),
            "The output folder out was not written by upit-merge (it has no upit_report.json); "
            "choose another folder.",
        ),
    ],
    ids=["not empty", "overwrite a foreign folder"],
)
def test_files_of_others_stay(options: tuple[str, ...], sentence: str, family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    before = snapshot(family.root)
    assert_refused(run("upit-merge", recipe, out, *options), sentence, family)
    assert snapshot(family.root) == before


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("recipe.yml", "The output recipe.yml is a file; give a folder."),
        (
            "recipe.yml/out",
            "The output folder recipe.yml/out cannot be created (Not a directory); choose another.",
        ),
    ],
)
def test_output_is_a_file(out: str, sentence: str, family: Family) -> None:
    recipe = family.write_recipe(family.recipe())
    before = snapshot(family.root)
    assert_refused(run("upit-merge", recipe, family.root / out), sentence, family)
    assert snapshot(family.root) == before


def test_overwrite(family: Family) -> None:
    """It replaces what an earlier run wrote, all of it and nothing else."""
    out, fresh = family.root / "out", family.root / "fresh"
    first = family.write_recipe(family.recipe(parameters={"num_experts": 4}))
    assert run("upit-merge", first, out, "--out-shard-size", "50K").exit_code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    (out / "notes.txt").write_text("mine")
    second = family.write_recipe(family.recipe(parameters={"num_experts": 2}))
    assert run("upit-merge", second, out, "--overwrite").exit_code == 0
    assert run("upit-merge", second, fresh).exit_code == 0
    assert snapshot(out).keys() - snapshot(fresh).keys() == {"notes.txt"}
    assert (out / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_a_failed_overwrite_keeps_the_earlier_output(family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    assert run("upit-merge", recipe, out).exit_code == 0
    entry(SECOND, UP, float("nan"))(family)
    before = snapshot(out)
    result = run("upit-merge", recipe, out, "--overwrite")
    assert_refused(result, "… has NaN or infinite weights in …", family)
    assert snapshot(out) == before


def test_two_runs_into_one_folder(family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    out.mkdir()
    with FileLock(out / ".upit-lock"):
        sentence = "Another run is writing to out; wait for it or choose another folder."
        assert_refused(run("upit-merge", recipe, out), sentence, family)
    assert run("upit-merge", recipe, out).exit_code == 0


def test_leftovers_of_a_killed_run_do_not_matter(family: Family) -> None:
    recipe, out = family.write_recipe(family.recipe()), family.root / "out"
    (out / ".upit-staging").mkdir(parents=True)
    (out / ".upit-staging" / "model.safetensors").write_bytes(b"half")
    (out / ".upit-lock").touch()
    assert run("upit-merge", recipe, out).exit_code == 0
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


# ---- trouble on the way --------------------------------------------------------------------


def test_full_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("upit_merge.io.tensor_file.PositionedFile.write", no_space)
    recipe = family.write_recipe(family.recipe())
    before = snapshot(family.root)
    result = run("upit-merge", recipe, family.root / "out")
    assert_refused(
        result, "The disk of out is full; free some space and run the same command again.", family
    )
    assert snapshot(family.root) == before


def test_too_small_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(family.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    sentence = (
        "The disk of out has 0.00 GB free, but the output (0.00 GB) must fit; free some space or "
        "choose another folder."
    )
    recipe = family.write_recipe(family.recipe())
    assert_refused(run("upit-merge", recipe, family.root / "out"), sentence, family)
    assert not (family.root / "out").exists()
