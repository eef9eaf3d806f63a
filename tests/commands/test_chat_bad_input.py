"""What cannot be talked to: one sentence before anything is loaded; and what strangers' files try."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.conftest import Family
from tests.support.commands import refused
from tests.support.spoilt import assert_sentence, refusal, snapshot
from tests.support.talk import family_that_talks, session, typed
from upit_merge.commands.dialogue import voices
from upit_merge.errors import printable
from upit_merge.runtime.device import resolve_chat_device, resolve_device


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family_that_talks(tmp_path_factory.mktemp("family"), count=1)


@pytest.fixture
def family(shared: Family, tmp_path: Path) -> Family:
    shutil.copytree(shared.root, tmp_path / "family")
    return Family(tmp_path / "family", tmp_path / "family/base", [])


def json_of(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def without_a_tensor(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def adapter(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "adapter_config.json").write_text("{}")


def template(text: str) -> Callable[[Path], None]:
    def spoil(base: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = text
        tokenizer.save_pretrained(base)

    return spoil


def code(base: Path) -> None:
    """transformers would ask whether to run it."""
    json_of(base / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (base / "own.py").write_text("from pathlib import Path\nPath('executed').touch()\n")


CASES: list[tuple[str, Callable[[Path], None], tuple[str, ...], str]] = [
    (
        "missing",
        shutil.rmtree,
        (),
        "The model @ does not exist (looked in …); correct the path.",
    ),
    (
        "no config",
        lambda base: (base / "config.json").unlink(),
        (),
        "The model base has no config.json in @; give the folder of a complete Hugging Face "
        "checkpoint.",
    ),
    (
        "no weights",
        lambda base: (base / "model.safetensors").unlink(),
        (),
        "Checkpoint the model base has no weights …",
    ),
    (
        "pickles",
        pickled,
        (),
        "The model base has its weights in .bin files, pickles that could run code; convert it to "
        "safetensors first.",
    ),
    (
        "a tensor less",
        without_a_tensor,
        (),
        "The model base lacks model.layers.1.mlp.up_proj.weight, which its config.json asks for; "
        "copy or download it again.",
    ),
    (
        "adapter",
        adapter,
        (),
        "The model @ is an adapter; write BASE+ADAPTER, with the model that it was trained on.",
    ),
    (
        "no tokenizer",
        lambda base: (base / "tokenizer.json").unlink(),
        (),
        "The model base has no tokenizer in @; put that of the model it was made from there.",
    ),
    (
        "code",
        code,
        (),
        "The model base comes with code of its own, which transformers does not run unasked; read "
        "the .py files in @, and add --trust-remote-code.",
    ),
    (
        "no such type",
        lambda base: json_of(base / "config.json", model_type="nothing"),
        (),
        "The model base cannot be loaded by transformers (…nothing…); check its files in @.",
    ),
    (
        "settings of the wrong kind",
        lambda base: json_of(base / "generation_config.json", temperature="hot", do_sample=True),
        (),
        "base cannot answer (…temperature…); try another device or dtype, and check its "
        "generation_config.json.",
    ),
    (
        "a template that raises",
        template("{{ raise_exception('no \x1b[2J users here') }}"),
        (),
        "The chat template of base does not take the message (no \\x1b[2J users here); mend the "
        "template, or talk to a model with another.",
    ),
    (
        "a template that is none",
        template("{% for"),
        (),
        "The chat template of base does not take the message (…); mend the template, or talk to a "
        "model with another.",
    ),
    (
        "a template of nothing",
        template("{# nothing #}"),
        (),
        "The message has no tokens; write something.",
    ),
    (
        "a system message without a template",
        lambda base: (base / "chat_template.jinja").unlink(),
        ("--system", "be kind"),
        "base has no chat template, so that a system message has no place; leave out --system, and "
        "begin the first message with it.",
    ),
    (
        "a system message that is refused",
        template("{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}a"),
        ("--system", "be kind"),
        "The chat template of base does not take the system message or the message (none); mend "
        "the template, or talk to a model with another.",
    ),
    (
        "experts of a dense model",
        lambda base: None,
        ("--show-experts",),
        "base has no experts that can be told apart here: …; leave the expert out.",
    ),
    (
        "a rival twice",
        lambda base: None,
        ("--against", "a=x/y", "--against", "a=x/z"),
        "Two models to compare with are called a; give names: --against NAME=MODEL.",
    ),
    (
        "a rival that is not there",
        lambda base: None,
        ("--against", "./nowhere"),
        "The model ./nowhere does not exist (looked in …); correct the path.",
    ),
    (
        "a rival that is an expert of none",
        lambda base: None,
        ("--against", "expert:1"),
        "base has no experts that can be told apart here: …; leave the expert out.",
    ),
    (
        "greedy and drawn",
        lambda base: None,
        ("--greedy", "--top-p", "0.5"),
        "--greedy takes the likeliest token always, --temperature and --top-p draw from several; "
        "leave out one or the other.",
    ),
    (
        "no such device",
        lambda base: None,
        ("--device", "tpu"),
        "The device 'tpu' …; use cpu or cuda.",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_refused_in_one_sentence(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    options: tuple[str, ...],
    sentence: str,
) -> None:
    spoil(family.base)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = snapshot(tmp_path)
    told = refused("chat", family.base, "--device", "cpu", *options, "--prompt", "hello")
    assert_sentence(told.replace(str(family.base), "@"), sentence)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--expert", "4"), "out has the experts 0 to 2, and no expert 4; give one of these."),
        (
            ("--against", "expert:3"),
            "out has the experts 0 to 2, and no expert 3; give one of these.",
        ),
    ],
)
def test_an_expert_that_is_not_there_is_told_before_the_model_is_loaded(
    shared: Family,
    merge: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    out = merge(shared.recipe(parameters={"num_experts": 3, "expansion": "copy"}))
    monkeypatch.setattr(voices, "_load", None)
    assert refused("chat", out, *options, "--prompt", "a") == sentence


def test_memory_is_foretold(shared: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights as they will be in memory, before any is read."""
    weights = load_file(shared.base / "model.safetensors")
    size = sum(tensor.numel() for tensor in weights.values())
    found = {
        dtype: voices._source(
            voices.Rival("base", str(shared.base)), voices.VoiceOptions(dtype=dtype)
        ).num_bytes
        for dtype in voices.DTYPES
    }
    assert found == {
        "auto": 4 * size,
        "float32": 4 * size,
        "bfloat16": 2 * size,
        "float16": 2 * size,
    }
    monkeypatch.setattr(voices, "_load", None)
    monkeypatch.setattr(voices, "memory_limit", lambda: (1 << 30, "this machine"))
    assert refused("chat", shared.base, "--prompt", "a") == (
        "Talking to base takes 1.0 GiB of memory, but this machine has 1.0 GiB; run it quantised "
        "with llama.cpp (docs/use-anywhere.md); `upit-merge evaluate` measures it here, layer by "
        "layer."
    )
    told = refused("chat", shared.base, "--against", f"b={shared.base}", "--prompt", "a")
    assert told.startswith("Talking to base and b takes 1.0 GiB")
    assert "leave out --against" in told


def test_a_gpu_that_is_too_small(
    shared: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With auto the model goes into the machine's memory; asked for, the GPU is refused."""
    source = voices._source(voices.Rival("base", str(shared.base)), voices.VoiceOptions())
    gpu = torch.device("cuda", 0)
    properties = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    chosen = voices._with_room([source], gpu, voices.VoiceOptions())
    assert chosen == torch.device("cpu")
    assert "are put into the machine's memory" in caplog.text
    options = voices.VoiceOptions(device="cuda")
    assert "cuda:0 has 0.0 GiB; use --device cpu, or run it" in refusal(
        voices._with_room, [source], gpu, options
    )
    properties.total_memory = 1 << 40
    assert voices._with_room([source], gpu, options) == gpu


# ---- Apple's GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("has_mps", [False, True])
@pytest.mark.parametrize("has_cuda", [False, True])
def test_apple_s_gpu(monkeypatch: pytest.MonkeyPatch, has_mps: bool, has_cuda: bool) -> None:
    """Taken by chat where it is; never by what merges, fits or measures."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_cuda))
    expected = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    assert resolve_chat_device("auto").type == expected
    assert resolve_device("auto").type == ("cuda" if has_cuda else "cpu")
    assert resolve_chat_device("cpu").type == "cpu"
    if has_mps:
        assert resolve_chat_device("mps") == torch.device("mps")
        assert refusal(resolve_chat_device, "mps:1") == (
            "The device 'mps:1' does not exist, there is one; use --device mps."
        )
    else:
        assert refusal(resolve_chat_device, "mps") == (
            "There is no GPU of Apple's here that torch can use (macOS 14 or newer on Apple "
            "silicon has one); use --device cpu."
        )
    assert refusal(resolve_device, "mps") == (
        "Apple's GPU (mps) is for `upit-merge chat`, everything else is computed on the CPU, which "
        "has the same memory; leave out --device."
    )


# ---- what a model says is a stranger's text -----------------------------------------------------


def test_an_answer_does_not_write_to_the_terminal(family: Family) -> None:
    """A model that says nothing but ESC: transformers forbids it all else, by its own settings."""
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    (escape,) = tokenizer("\x1b", add_special_tokens=False)["input_ids"]
    others = [number for number in range(261) if number != escape]
    json_of(family.base / "generation_config.json", suppress_tokens=others)
    talked, shown = session(family.base, max_new_tokens=3)
    talked.say("hello")
    assert talked._last.text == "\x1b" * 3
    assert shown.getvalue() == "\\x1b" * 3 + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("\x9b2J", "\\x9b2J"),
        ("new\r\nline\rover\ttab", "new\nlineover\ttab"),
        ("back\x08wards\u202eesrever", "back\\x08wards\\u202eesrever"),
        ("👩‍🚀 été 漢字 می‌روم", "👩‍🚀 été 漢字 می‌روم"),
        ("half \ud83d", "half \\ud83d"),
        ("line\u2028end", "line\\u2028end"),
    ],
)
def test_what_is_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_model_that_cannot_go_on_is_told_and_the_session_stays(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    talked, shown = session(family.base)

    def fails(*_args: Any, **_settings: Any) -> None:
        raise RuntimeError("MPS backend out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(talked._talks[0].voice.speaker.model, "generate", fails)
        talked.talk(typed("hello"))
    assert (
        "Error: base cannot answer (MPS backend out of memory); try another device or dtype, and "
        "check its generation_config.json.\n"
    ) in shown.getvalue()
    assert talked._talks[0].messages == []
    talked.say("hello")
    assert len(talked._talks[0].messages) == 2


def test_a_report_of_no_colours_is_plain_text(family: Family) -> None:
    talked, shown = session(family.base)
    talked.say("hello")
    assert isinstance(shown, io.StringIO)
    assert "\x1b" not in shown.getvalue()
