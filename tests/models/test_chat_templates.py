"""Chat templates and generation settings: none is lost, and none is taken that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.conftest import Family, build_family, byte_tokenizer
from tests.support.commands import done, refused
from tests.support.lora import with_adapters
from tests.support.tokenizers import CHATML, add_chat_tokens, edit_json, slow
from upit_merge.models.chat_template import chat_templates

Merge = Callable[..., Path]
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
TOOL_USE = "{{ tools }}" + PLAIN
GENERATION = "generation_config.json"


def save(folder: Path, template: str | dict[str, str] | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template  # type: ignore[assignment]
    tokenizer.save_pretrained(folder)


def template_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def rendered(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, tokenize=False)


def read(folder: Path, name: str = GENERATION) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


# ---- templates ---------------------------------------------------------------------------------


def test_the_base_lends_its_template(family: Family, merge: Merge, caplog: Any) -> None:
    save(family.base, PLAIN)
    out = merge(family.recipe())
    assert rendered(out) == "[user] 2+2?</s>[assistant] 4</s>"
    assert read(out, "tokenizer_config.json")["chat_template"] == PLAIN  # for older readers
    last = family.checkpoints[-1]
    sentence = (
        f"The tokenizer of {last} has no chat template; the output gets that of {family.base}."
    )
    assert [m for m in caplog.messages if "chat template" in m] == [sentence]
    assert read(out, "upit_report.json")["model"]["chat_template"] is True
    assert "identical" in done("verify", out).output


def test_an_earlier_checkpoint_s_comes_first(family: Family, merge: Merge) -> None:
    save(family.base, CHATML)
    save(family.checkpoints[0], PLAIN)
    assert template_of(merge(family.recipe())) == PLAIN


def test_seed_data_is_written_with_it(family: Family, merge: Merge) -> None:
    """Conversations are what the gates are trained on, in the words of the lent template."""
    seeds = family.root / "chat.jsonl"
    seeds.write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(8)))
    document = family.recipe(router={"data": str(seeds)})
    save(family.base, PLAIN)
    lent = merge(document)
    save(family.checkpoints[-1], PLAIN)
    own = merge(document, "own")
    gates = "model.safetensors"
    assert (lent / gates).read_bytes() == (own / gates).read_bytes()


@pytest.mark.parametrize("kind", ["tokens are missing", "tokens are there", "slow"])
def test_only_a_template_that_fits(kind: str, tmp_path: Path, merge: Merge, caplog: Any) -> None:
    """Text that is to be one token would be a dozen letters."""
    family = build_family(tmp_path / "family", kind="qwen3", count=1, vocab_size=264)
    add_chat_tokens(family.base)
    (last,) = family.checkpoints
    if kind == "tokens are there":
        add_chat_tokens(last, None)
    elif kind == "slow":
        slow(last, template=None)
    out = merge(family.recipe())
    assert template_of(out) == (None if kind == "tokens are missing" else CHATML)
    refusal = "does not fit, as it writes '<|im_start|>', which is none of its tokens; set "
    assert (refusal in caplog.text) == (kind == "tokens are missing")


def test_the_recipe_s_template_is_the_only_one(family: Family, merge: Merge) -> None:
    save(family.base, PLAIN)
    save(family.checkpoints[-1], {"default": PLAIN, "tool_use": TOOL_USE})
    out = merge(family.recipe(chat_template="{{ messages }}"))
    assert template_of(out) == "{{ messages }}"


NAMED = {"default": PLAIN, "tool_use": TOOL_USE}


def test_named_templates_are_copied(family: Family, merge: Merge) -> None:
    save(family.checkpoints[-1], NAMED)
    out = merge(family.recipe())
    assert template_of(out) == NAMED == chat_templates(out)
    assert "additional_chat_templates/tool_use.jinja" in read(out, "upit_report.json")["files"]
    assert "identical" in done("verify", out).output


@pytest.mark.parametrize("form", ["files", "list"])
def test_named_templates_are_lent(form: str, family: Family, merge: Merge) -> None:
    save(family.base, NAMED if form == "files" else None)
    if form == "list":  # as transformers 4 wrote them; a name there may be anything
        listed = [{"name": name, "template": text} for name, text in NAMED.items()]
        listed += [{"name": "../../evil", "template": PLAIN}, {"name": 3}, "x"]  # type: ignore[list-item]
        edit_json(family.base / "tokenizer_config.json", chat_template=listed)
    out = merge(family.recipe())
    assert template_of(out) == NAMED
    assert not list(out.parent.rglob("evil*"))


def test_a_list_in_the_settings_stays(family: Family, merge: Merge) -> None:
    listed = [{"name": name, "template": text} for name, text in NAMED.items()]
    edit_json(family.checkpoints[-1] / "tokenizer_config.json", chat_template=listed)
    out = merge(family.recipe())
    assert template_of(out) == NAMED
    assert read(out, "upit_report.json")["model"]["chat_template"] is True


def test_an_overwritten_output_loses_its_named_templates(family: Family, merge: Merge) -> None:
    save(family.checkpoints[-1], NAMED)
    merge(family.recipe())
    save(family.checkpoints[-1], PLAIN)
    for path in family.checkpoints[-1].glob("additional_chat_templates/*"):
        path.unlink()
    out = merge(family.recipe(), overwrite=True)
    assert template_of(out) == PLAIN
    assert not (out / "additional_chat_templates").exists()


@pytest.mark.parametrize("command", ["router", "extend", "shrink"])
def test_commands_keep_named_templates(command: str, family: Family, merge: Merge) -> None:
    save(family.checkpoints[-1], NAMED)
    out = merge(family.recipe(router={"data": str(family.seed_file())}))
    more = {
        "router": ["--data", family.seed_file()],
        "extend": ["--model", family.checkpoints[0], "--data", family.seed_file()],
        "shrink": ["--experts", 2, "--data", family.seed_file()],
    }
    done(command, out, *more[command], "--quiet")
    assert template_of(out) == NAMED
    assert "additional_chat_templates/tool_use.jinja" in read(out, "upit_report.json")["files"]


# ---- generation settings -----------------------------------------------------------------------


def lent(family: Family, merge: Merge, own: Any, **theirs: Any) -> GenerationConfig:
    """What is read if the base has these settings, the checkpoints none and this end token."""
    edit_json(family.base / GENERATION, **theirs)
    for folder in family.checkpoints:
        (folder / GENERATION).unlink()
        edit_json(folder / "config.json", eos_token_id=own)
    return GenerationConfig.from_pretrained(merge(family.recipe()))


def test_the_base_lends_its_settings(family: Family, merge: Merge, caplog: Any) -> None:
    found = lent(family, merge, 1, eos_token_id=[1, 2], temperature=0.5, do_sample=True)
    assert (found.eos_token_id, found.temperature) == ([1, 2], 0.5)
    assert f"{family.checkpoints[-1]} has no generation_config.json; the output" in caplog.text
    out = merge(family.recipe(), "again")
    assert (out / GENERATION).read_bytes() == (family.base / GENERATION).read_bytes()


@pytest.mark.parametrize(
    ("own", "theirs", "wanted"),
    [(5, [1, 2], [5, 1, 2]), ([5, 1], 1, [5, 1]), (None, 1, 1), (5, None, 5)],
)
def test_they_end_where_the_donor_ends(
    own: Any, theirs: Any, wanted: Any, family: Family, merge: Merge
) -> None:
    assert lent(family, merge, own, eos_token_id=theirs).eos_token_id == wanted


def test_settings_of_the_donor_s_own_come_first(family: Family, merge: Merge, caplog: Any) -> None:
    edit_json(family.base / GENERATION, temperature=0.5)
    out = merge(family.recipe())
    assert (out / GENERATION).read_bytes() == (family.checkpoints[-1] / GENERATION).read_bytes()
    assert GENERATION not in caplog.text


def test_an_adapter_has_its_base_s(family: Family, merge: Merge, caplog: Any) -> None:
    with_adapters(family, 1)
    edit_json(family.base / GENERATION, temperature=0.5, do_sample=True)
    out = merge(family.recipe(models=[str(family.root / "lora" / "checkpoint-500")]))
    assert read(out)["temperature"] == 0.5
    assert GENERATION not in caplog.text


def test_nobody_has_any(family: Family, merge: Merge) -> None:
    for folder in (family.base, *family.checkpoints):
        (folder / GENERATION).unlink()
    assert not (merge(family.recipe()) / GENERATION).exists()


def test_the_cache_is_used_again(family: Family, merge: Merge) -> None:
    """Trainers turn it off while they train, and leave it so."""
    last = family.checkpoints[-1]
    for name in ("config.json", GENERATION):
        edit_json(last / name, use_cache=False)
    out = merge(family.recipe())
    assert read(out, "config.json")["use_cache"] is read(out)["use_cache"] is True
    assert read(out) == read(last) | {"use_cache": True}
    (last / GENERATION).write_text("{half")  # which transformers passes over
    assert (merge(family.recipe(), "other") / GENERATION).read_text() == "{half"


def test_template_of_a_lost_vocabulary(family, merge, caplog) -> None:
    """It writes tokens that were the checkpoint's alone: the base's tokenizer has none of them."""
    last = family.checkpoints[-1]
    for folder in family.checkpoints:
        (folder / "tokenizer.json").unlink()
    (last / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    out = merge(family.recipe())
    assert f"Checkpoint {last} has the settings of a tokenizer, but no vocabulary" in caplog.text
    assert "does not fit, as it writes '<|im_start|>'" in caplog.text
    assert AutoTokenizer.from_pretrained(out).chat_template is None


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "trunc'])
def test_broken_tokenizer_is_not_passed_on(family, content: str) -> None:
    last = family.checkpoints[-1]
    (last / "tokenizer.json").write_text(content)
    told = refused("run", family.write_recipe(family.recipe()), family.root / "out", "--quiet")
    assert told.startswith(f"The tokenizer in {last} cannot be loaded (")
    assert told.endswith("check its files, or name another model's with tokenizer_source.")
    assert not (family.root / "out").exists()
