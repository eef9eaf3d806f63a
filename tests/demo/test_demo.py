"""The demo in small: its text, its training, and that its table is what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.perplexity import document_losses, perplexity
from upit_merge.demo import run, stages, training
from upit_merge.demo.corpus import Domain, load_domains
from upit_merge.demo.progress import DemoFolder, open_demo
from upit_merge.demo.run import run_demo
from upit_merge.demo.training import TrainingBudget, train_demo_models
from upit_merge.errors import UpitError

SMALL = TrainingBudget(
    vocab_size=400, hidden_size=64, layers=1, context=64, base_steps=6, sft_rounds=1, sft_steps=4
)


@pytest.fixture(scope="module", autouse=True)
def domains() -> Iterator[list[Domain]]:
    """Their text, read once: that takes seconds, and every demo begins with it."""
    loaded = load_domains()
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, stages):
            patch.setattr(module, "load_domains", lambda seed=0: loaded)
        yield loaded


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(folder, quiet=True, budget=SMALL)
    return folder


def test_domains_have_text_to_train_on_and_other_text_to_measure(domains: list[Domain]) -> None:
    assert [domain.name for domain in domains] == ["code", "docs", "arithmetic"]
    for domain in domains:
        assert len(domain.heldout) == 100
        assert len(domain.train) > 1000
        assert not set(domain.heldout) & set(domain.train)
        assert all(50 < len(text) <= 600 for text in domain.heldout)
    assert domains == load_domains()


def test_arithmetic_is_right(domains: list[Domain]) -> None:
    checked = 0
    for text in domains[2].heldout:
        for line in text.splitlines():
            if line.startswith("Question: ") and " + " in line.split("?")[0]:
                a, b = map(int, line.removeprefix("Question: ").split("?")[0].split(" + "))
                assert line.endswith(f"Answer: {a + b}.")
                checked += 1
    assert checked > 50


def test_training_can_be_repeated(tmp_path: Path, domains: list[Domain]) -> None:
    models = [train_demo_models(tmp_path / n, domains, quiet=True, budget=SMALL) for n in "ab"]
    first, second = (AutoModelForCausalLM.from_pretrained(m.checkpoints[-1]) for m in models)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize("saved", [0, 1, 2, 3])
def test_training_that_was_cut_off_goes_on_to_the_same_models(
    tmp_path: Path, domains: list[Domain], monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    """`saved` of the four models are there when it is cut off, and half of the next."""
    domains = [replace(domain, train=domain.train[:40]) for domain in domains]
    whole = train_demo_models(tmp_path / "whole", domains, quiet=True, budget=SMALL)
    folder = open_demo(tmp_path / "cut", seed=0)
    original, names = training.save, []

    def failing(path, *args):
        names.append(path.name)
        if len(names) > saved:
            path.mkdir(parents=True)
            raise KeyboardInterrupt
        return original(path, *args)

    monkeypatch.setattr(training, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        train_demo_models(folder.root, domains, quiet=True, budget=SMALL, progress=folder)
    names.clear()
    monkeypatch.setattr(
        training, "save", lambda path, *args: names.append(path.name) or original(path, *args)
    )
    again = train_demo_models(folder.root, domains, quiet=True, budget=SMALL, progress=folder)
    assert len(names) == 4 - saved
    for one, other in zip(whole.checkpoints, again.checkpoints, strict=True):
        assert (one / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()


def test_a_demo_that_is_finished_says_so_and_one_of_another_seed_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run_demo(finished, quiet=True, budget=SMALL)
    told = capsys.readouterr().out
    assert "nothing was computed" in told
    assert "MoE as built" in told
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    with pytest.raises(UpitError, match="seed was 0 and is 1"):
        run_demo(finished, seed=1, quiet=True, budget=SMALL)


def test_a_demo_that_was_cut_off_after_its_merge_only_measures(finished: Path) -> None:
    results, report = finished / "results.json", finished / "moe" / "upit_report.json"
    before, merged = results.read_bytes(), report.stat().st_mtime_ns
    results.unlink()
    names = sorted((p.name for p in (finished / "sft").iterdir()), key=lambda n: int(n[11:]))
    base = AutoModelForCausalLM.from_pretrained(finished / "base")
    written = ["base", *(f"sft/{name}" for name in names)]
    optimizer = training.adamw(base).state_dict()
    DemoFolder(finished).keep_training({"written": written, "optimizer": optimizer})
    run_demo(finished, quiet=True, budget=SMALL)
    assert results.read_bytes() == before
    assert report.stat().st_mtime_ns == merged


def test_perplexity_is_that_of_transformers(finished: Path, domains: list[Domain]) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "base")
    tokenizer = AutoTokenizer.from_pretrained(finished / "base")
    texts = domains[0].heldout[:7]
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:50]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        total += loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    nll, targets = document_losses(model, tokenizer, texts, max_length=50, batch_size=3)
    assert nll.sum().item() == pytest.approx(total, rel=1e-5)
    assert targets.sum() == count
    assert perplexity(model, tokenizer, texts, 50) == pytest.approx(
        math.exp(total / count), rel=1e-5
    )


def test_demo_leaves_what_it_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    files = {"seed.jsonl", "held-out.jsonl", "demo.yml", "results.json", ".demo.json"}
    assert names == {"base", "sft", "moe", *files}
    results = json.loads((finished / "results.json").read_text())
    rows = {row["model"]: row["perplexities"] for row in results["rows"]}
    assert list(rows)[-2:] == ["MoE, random gate (mean of 3)", "MoE as built"]
    checkpoints = len(list((finished / "sft").iterdir()))
    average, *others = list(rows)[1 + checkpoints : -2]
    assert average == "average of checkpoints"
    assert [name.startswith("base + ") for name in others] in ([], [True])
    assert results["verdict"].split(":")[0] in ("Worth it", "Not worth it") or results[
        "verdict"
    ].startswith("Too few samples")
    report = json.loads((finished / "moe" / "upit_report.json").read_text())
    assert len(report["lineage"]["experts"]) == 8
    assert report["router"]["settings"]["objective"] == "one_vs_rest"


def test_demo_measures_the_model_as_it_is_on_disk(finished: Path, domains: list[Domain]) -> None:
    results = json.loads((finished / "results.json").read_text())
    moe = AutoModelForCausalLM.from_pretrained(finished / "moe")
    tokenizer = AutoTokenizer.from_pretrained(finished / "moe")
    for domain, stated in zip(domains, results["rows"][-1]["perplexities"], strict=True):
        assert perplexity(moe, tokenizer, domain.heldout) == pytest.approx(stated, rel=1e-5)


def test_seed_data_and_held_out_text_are_apart(finished: Path, domains: list[Domain]) -> None:
    rows = [json.loads(line) for line in (finished / "seed.jsonl").read_text().splitlines()]
    assert len(rows) == 600
    heldout = {text for domain in domains for text in domain.heldout}
    assert not heldout & {row["text"] for row in rows}


def test_all_stages_runs_a_pipeline_on_text_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training itself takes minutes: it is in benchmarks/pipeline.py."""
    import subprocess

    from upit_merge.pipeline.config import load_pipeline
    from upit_merge.training.settings import load_job

    calls = []

    def note(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(stages.subprocess, "run", note)
    folder = tmp_path / "demo"
    stages.run_all_stages(folder, seed=2, quiet=True, budget=SMALL)
    ((command, options),) = calls
    assert command[3:] == ["pipeline", "pipeline.yml", "--quiet"]
    assert options["cwd"] == folder
    texts = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    kinds = [text["domain"] for text in texts]
    assert kinds == sorted(kinds, key=["code", "docs", "arithmetic"].index)
    held_out = [json.loads(line)["text"] for line in (folder / "held-out.jsonl").open()]
    assert not {text["text"] for text in texts} & set(held_out)

    monkeypatch.chdir(folder)
    pipeline = load_pipeline(Path("pipeline.yml"))
    assert pipeline.parsed_recipe().seed == 2
    settings = pipeline.prepare_settings()
    (folder / "prepare.yml").write_text(json.dumps(settings))
    job = load_job(folder / "prepare.yml")
    assert job.training.train_sampling_strategy == "sequential"
    # A checkpoint after every kind of text of both epochs.
    steps = len(texts) // job.training.per_device_train_batch_size
    assert math.ceil(job.training.save_steps * 2 * steps) == steps // 3
