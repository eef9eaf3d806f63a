"""Hostile input: files of checkpoints made to crash their reader, exhaust it, or run code.

What is merely broken is in `test_bad_checkpoints.py`.
"""

from __future__ import annotations

import json
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file

from tests.conftest import Family
from tests.support.commands import invoke
from tests.support.spoilt import (
    LAST,
    UP,
    Case,
    Malicious,
    assert_case_refused,
    assert_refused,
    assert_sentence,
    pickled,
    refusal,
    run,
)
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.models.chat_template import write_chat_templates
from upit_merge.models.tokenizer import highest_token_id

# ---- headers of safetensors ----------------------------------------------------------------


def header(text: str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    encoded = (text if isinstance(text, str) else json.dumps(text)).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def tensor(shape: list[Any], end: int, start: int = 0, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CORRUPT = "x is truncated or corrupt (…); copy or download it again."
ODD = "x has a header in a form that nothing writes; copy or download it again, or convert …"
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

HEADERS = {
    "longer than the file": (header("{}", length=2**20), CORRUPT),
    "terabytes": (header("{}", length=2**42), CORRUPT),
    "all bits": (header("{}", length=2**64 - 1), CORRUPT),
    "empty": (b"", CORRUPT),
    "seven bytes": (b"\0" * 7, CORRUPT),
    "negative offset": (header({"a": tensor([1], 0, -4)}, b"abcd"), CORRUPT),
    "overlap": (header({"a": tensor([1], 4), "b": tensor([1], 4)}, b"abcd"), CORRUPT),
    "hole": (header({"a": tensor([1], 4), "b": tensor([1], 12, 8)}, b"abcd" * 3), CORRUPT),
    "beyond the end": (header({"a": tensor([2**38], 2**40)}, b"abcd"), CORRUPT),
    "data nobody has": (header({"a": tensor([1], 4)}, b"abcdabcd"), CORRUPT),
    "shape too large": (header({"a": tensor([2], 4)}, b"abcd"), CORRUPT),
    "overflow to nothing": (header({"a": tensor([2**32, 2**32], 0)}), CORRUPT),
    "two last names": (
        header(f'{{"a":{ENTRY},"a":{ENTRY.replace("4]", "8]")}}}', b"abcd"),
        CORRUPT,
    ),
    "name not a text": (header(f"{{1:{ENTRY}}}", b"abcd"), CORRUPT),
    "terminal escape in an error": (
        header('{"a":{"dtype":"\\u001b[2J","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
        "x is truncated or corrupt (…\\x1b[2J…); copy or download it again.",
    ),
    "too deep": (header("[" * 100_000), CORRUPT),
    "entry as a list": (header('{"a":["F32",[1],[0,4]]}', b"abcd"), ODD),
    "nothing, hugely": (
        header({"a": tensor([0, 2**63], 0)}),
        "x stores a in shape (0, 9223372036854775808); do not use this checkpoint.",
    ),
    "line end in a name": (
        header({"a\nb": tensor([1], 4)}, b"abcd"),
        "x has a tensor named 'a\\nb', as no Llama or Mistral has; do not use this checkpoint.",
    ),
    "long name": (
        header({"a" * 9999: tensor([1], 4)}, b"abcd"),
        "x has a tensor named 'aaa…aaa..., as no Llama or Mistral has; …",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, sentence = HEADERS[name]
    Path("x").write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    message = refusal(SafetensorsFile, Path("x"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 2
    assert peak < 10_000_000
    assert_sentence(message, sentence)
    assert len(message) < 400


def test_a_dtype_in_a_spelling_of_its_own(tmp_path: Path) -> None:
    """The library takes `{"F32": null}` for F32, and the last of two equal names; so do we."""
    other = ENTRY.replace('"F32"', '{"F32":null}')
    (tmp_path / "x").write_bytes(
        header(f'{{"a":{ENTRY.replace("F32", "I8")},"a":{other}}}', b"abcd")
    )
    file = SafetensorsFile(tmp_path / "x")
    assert file.rows("a", 0, 1).view(torch.uint8).numpy().tobytes() == b"abcd"
    file.close()


# ---- code in checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--lazy-unpickle",)], ids=["plain", "lazy-unpickle"])
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_pickles_do_not_run(
    form: str, options: tuple[str, ...], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def malicious(family: Family) -> None:
        state = load_file(folder / "model.safetensors") | {"extra": Malicious()}
        (folder / "model.safetensors").unlink()
        with path.open("wb") as file:
            if form == "pickle":
                pickle.dump(state, file)
            else:
                torch.save(state, file, _use_new_zipfile_serialization=form == "torch")

    folder = family.root / LAST
    path = folder / "pytorch_model.bin"
    assert_case_refused(Case(malicious, "…", options), family, monkeypatch)
    assert not Path("executed").exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert Path("executed").exists(), "the trap itself must work"


def test_parameters_in_a_pickle(family: Family) -> None:
    """`named_parameters` saved as they are want gradients; they are read all the same."""
    pickled(lambda s: s.update({UP: torch.nn.Parameter(s[UP])}))(family)
    recipe = family.write_recipe(family.recipe())
    assert run("upit-merge", recipe, family.root / "out", "--lazy-unpickle").exit_code == 0


CODE = """
import os
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Path(os.environ["UPIT_TRAP"]).touch()

class Trap(PreTrainedTokenizerFast):
    pass

class TrapConfig(PreTrainedConfig):
    model_type = "trap"
"""


def with_code(folder: Path) -> None:
    """A tokenizer and a configuration that ask for code of their own."""
    (folder / "trap.py").write_text(CODE)
    for name, auto_map in (
        ("tokenizer_config.json", {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}),
        (
            "config.json",
            {"AutoConfig": "trap.TrapConfig", "AutoTokenizer": ["trap.Trap", "trap.Trap"]},
        ),
    ):
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": auto_map}
        content |= {"tokenizer_class": "Trap"} if "tokenizer" in name else {}
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("trust", [False, True], ids=["plain", "trusted"])
@pytest.mark.parametrize("command", ["run", "plan", "router"])
def test_code_of_a_tokenizer(
    command: str, trust: bool, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs with `--trust-remote-code` and not without."""
    trap, modules = tmp_path / "executed", tmp_path / "modules"
    monkeypatch.setenv("UPIT_TRAP", str(trap))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    seeds = family.seed_file()
    out = family.root / "out"
    if command == "router":
        assert run("upit-merge", family.write_recipe(family.recipe()), out).exit_code == 0
        with_code(out)
        arguments = ["router", str(out), "--data", str(seeds)]
    else:
        for folder in (family.base, *family.checkpoints):
            with_code(folder)
        recipe = family.write_recipe(family.recipe(router={"data": str(seeds)}))
        arguments = [command, str(recipe), *([str(out)] if command == "run" else [])]
    arguments += ["--quiet", *(["--trust-remote-code"] if trust else [])]
    result = invoke(*arguments)
    assert trap.exists() == trust
    # Without it, transformers refuses the tokenizer or takes a class of its own.
    if trust or result.exit_code == 0:
        assert result.exit_code == 0, result.output
    else:
        assert_refused(result, "The tokenizer in … cannot be loaded (…); check its files.", family)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.clear() }}"])
def test_code_in_a_chat_template(template: str, family: Family) -> None:
    """transformers renders templates in a sandbox."""
    (family.root / LAST / "chat_template.jinja").write_text(template)
    conversation = {"messages": [{"role": "user", "content": "a"}]}
    (family.root / "seed.jsonl").write_text(json.dumps(conversation))
    recipe = family.recipe(router={"data": str(family.root / "seed.jsonl")})
    result = run("upit-merge", family.write_recipe(recipe), family.root / "out")
    sentence = "…seed.jsonl line 1 does not fit the tokenizer's chat template (… unsafe…); change …"
    assert_refused(result, sentence, family)


# ---- tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocabulary", [{"a": "zzz"}, {"a": 1e9}, {"a": None}, {"a": [1]}, 3, "[" * 5000]
)
def test_odd_vocabularies(vocabulary: Any, tmp_path: Path) -> None:
    text = json.dumps({"model": {"vocab": vocabulary}}).replace('"[', "[").replace('["', "[")
    (tmp_path / "tokenizer.json").write_text(text)
    assert highest_token_id(tmp_path) in (None, 4999)


def test_half_a_character_in_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"eos_token": "\\ud83d", "pad_token": "\\u00e9"}')
    write_chat_templates({"default": "{{ messages }}\ud83d"}, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "eos_token": "\ud83d",
        "pad_token": "é",
        "chat_template": "{{ messages }}\ud83d",
    }
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}?"
