"""`upit-merge evaluate --against`: other models on the same samples."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Family, build_family
from tests.support.commands import done, invoke
from tests.support.lora import save_adapter
from upit_merge.commands.compare import Rival


def evaluate(out: Path, data: Path, *options: str) -> dict:
    file = out.parent / "evaluation.json"
    arguments = ["evaluate", str(out), "--data", str(data), "--json", str(file), *options]
    result = done(*arguments)
    return {**json.loads(file.read_text()), "output": result.output}


def by_transformers(model: torch.nn.Module, folder: Path, data: Path) -> float:
    """Perplexity over all target tokens, one sample at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total += loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.fixture
def data(four: Family) -> Path:
    return four.seed_file(12, "held-out.jsonl")


def test_dense_models_and_mixtures_have_the_perplexity_transformers_gives(
    moe: Path, four: Family, data: Path
) -> None:
    last = four.checkpoints[-1]
    found = evaluate(moe, data, "--against", f"the base={four.base}", "--against", str(last))
    named = {other["model"]: other["perplexity"] for other in found["others"]}
    assert list(named) == ["the base", "checkpoint-2000"]
    for folder, name in ((four.base, "the base"), (last, "checkpoint-2000")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert named[name] == pytest.approx(by_transformers(model, folder, data), rel=1e-4)
    assert "checkpoint-2000" in found["output"]
    again = evaluate(moe, data, "--against", f"itself={moe}")
    (itself,) = again["others"]
    assert itself["perplexity"] == pytest.approx(again["groups"]["all"]["perplexity"])


def test_an_adapter_is_applied(moe: Path, four: Family, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = tmp_path / "adapter"
    save_adapter(four.base, adapter)
    found = evaluate(moe, data, "--against", f"{four.base}+{adapter}")
    (other,) = found["others"]
    assert other["model"] == "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(four.base), adapter)
    assert other["perplexity"] == pytest.approx(by_transformers(model, four.base, data), rel=1e-4)


def test_the_page_shows_them(moe: Path, four: Family, data: Path) -> None:
    evaluate(moe, data, "--card", "--against", f"before | tuning={four.base}")
    assert "before \\| tuning" in (moe / "README.md").read_text()


def test_other_vocabularies_and_equal_names_are_refused(
    moe: Path, four: Family, data: Path, tmp_path: Path, merge: Callable[..., Path]
) -> None:
    other = build_family(tmp_path / "other", count=1, vocab_size=300)
    arguments = ["evaluate", str(moe), "--data", str(data), "--against"]
    result = invoke(*arguments, other.base)
    assert "has a vocabulary of 300 tokens, the mixture one of 259" in result.output
    twice = [*arguments, str(four.base), "--against", str(four.base)]
    result = invoke(*twice)
    assert "Two models to compare with are called base" in result.output
    result = invoke(*arguments, "./nowhere")
    assert result.exit_code == 1
    assert "./nowhere does not exist" in result.output


def test_what_cannot_be_compared_is_told(
    moe: Path, four: Family, data: Path, tmp_path: Path
) -> None:
    save_adapter(four.base, tmp_path / "adapter")
    arguments = ["evaluate", str(moe), "--data", str(data), "--against"]

    def told(model: str) -> str:
        return invoke(*arguments, model).output

    assert "is an adapter; write BASE+" in told(str(tmp_path / "adapter"))
    assert "an adapter of a mixture" in told(f"x={moe}+{tmp_path / 'adapter'}")
    # As large a vocabulary, but other pieces of text.
    other = tmp_path / "lr=0.1"
    shutil.copytree(four.base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "The model lr=0.1 has another tokenizer" in told(str(other))


def test_names_are_the_last_part_unless_given() -> None:
    assert Rival.parse("a=b/c") == Rival("a", "b/c")
    assert Rival.parse("x/base") == Rival("base", "x/base")
    assert Rival.parse("owner/base+x/adapter") == Rival("adapter", "owner/base+x/adapter")


def test_models_are_checked_before_anything_is_measured(
    moe: Path, four: Family, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_args: object, **_kwargs: object) -> None:
        pytest.fail("something was measured")

    monkeypatch.setattr("upit_merge.commands.measured_mixture.run_mixture", measured)
    arguments = ["evaluate", moe, "--data", data, "--against", four.base, "--against"]
    assert "./nowhere does not exist" in invoke(*arguments, "./nowhere").output
    broken = four.root / "broken"
    shutil.copytree(four.base, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    result = invoke(*arguments, broken)
    assert result.exit_code == 1
    assert "broken" in result.stderr


def test_what_was_measured_before_is_kept(
    moe: Path, four: Family, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upit_merge.commands import compare

    counted: list[str] = []
    original = compare.checkpoint_losses

    def counting(*args, **kwargs):
        counted.append(kwargs["label"])
        return original(*args, **kwargs)

    monkeypatch.setattr(compare, "checkpoint_losses", counting)
    words = ["--against", str(four.base), "--against", str(four.checkpoints[-1])]
    first = evaluate(moe, data, *words)
    assert counted == ["model 3 of 4 (base)", "model 4 of 4 (checkpoint-2000)"]
    second = evaluate(moe, data, *words)
    assert len(counted) == 2
    assert second["others"] == first["others"]
    # Another file, other samples, or other products are measured.
    evaluate(moe, data, "--sample", "7", *words[:2])
    evaluate(moe, data, "--compute", "bfloat16", *words[:2])
    weights = next(four.checkpoints[-1].glob("*.safetensors"))
    weights.touch()
    evaluate(moe, data, *words[2:])
    assert len(counted) == 5


def test_the_page_keeps_models_that_were_compared_on_the_same_text(
    moe: Path, four: Family, data: Path
) -> None:
    evaluate(moe, data, "--card", "--against", f"the untouched={four.base}")
    evaluate(moe, data, "--card", "--against", f"the last={four.checkpoints[-1]}")
    card = (moe / "README.md").read_text()
    assert card.index("the untouched") < card.index("the last")
    evaluate(moe, four.seed_file(9, "other.jsonl"), "--card")
    assert "the untouched" not in (moe / "README.md").read_text()
