"""benchmarks.paper with a minuscule budget: it runs, goes on, and judges by its rule."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.paper import jobs as paper_jobs
from benchmarks.paper.arms import ARMS, DENSE, UPIT, VANILLA, Arm
from benchmarks.paper.data import (
    Corpus,
    arithmetic_domain,
    heldout_problems,
    last_number,
    mixed_epochs,
    symbol_domain,
    visits,
)
from benchmarks.paper.jobs import Job, claim_folder, jobs_for, run_job
from benchmarks.paper.results import Results
from benchmarks.paper.scales import SCALES, LearningRates, Scale
from benchmarks.paper.schedules import Schedule
from benchmarks.paper.sweep import KINDS, SWEEP_SEED, chosen, sweep_arms, sweep_jobs, sweep_table
from benchmarks.paper.tables import all_tables, marks, print_tables, write_section
from benchmarks.paper.verdicts import CONTRADICTED, HELD, NOT_SEEN, OURS, PAPER, judge
from benchmarks.paper.workers import run_jobs
from upit_merge.errors import UpitError

TINY = Scale(
    name="tiny",
    vocab_size=400,
    hidden_size=64,
    layers=1,
    context=64,
    base_steps=3,
    base_batch=4,
    rows_per_domain=8,
    batch_size=8,
    rates=LearningRates(base=4e-3, stage1=4e-3, dense=2e-3, mixture=2e-3),
    seed_samples=4,
    problems=6,
)
NAMES = ("dense, 2 epochs", DENSE, VANILLA, "vanilla upcycling of the mean", UPIT, "random gates")
TRIED = [arm for arm in ARMS if arm.name in NAMES]
SEEDS = [0, 1]


def small_corpus(num_problems: int) -> Corpus:
    """The quick domains under the names of all four."""
    rng = random.Random(0)
    symbols, arithmetic = symbol_domain(rng), arithmetic_domain(rng)
    domains = [symbols, symbols, arithmetic, symbols]
    return Corpus(
        ["code", "docs", "arithmetic", "symbols"],
        [domain.train[:60] for domain in domains],
        [domain.train[100:160] for domain in domains],
        [domain.heldout[:3] for domain in domains],
        heldout_problems(rng, num_problems),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs of a few arms, done in this process."""
    folder = tmp_path_factory.mktemp("paper")
    claim_folder(folder, TINY)
    jobs = jobs_for(SEEDS, TRIED)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_jobs, "load_corpus", small_corpus)
        done = run_jobs(folder, jobs, partial(run_job, folder, TINY, device="cpu"), 0, quiet=True)
    assert len(done) == len(jobs) == 1 + len(SEEDS) * (1 + len(TRIED))
    return folder


def test_nothing_is_computed_twice(finished: Path) -> None:
    jobs = jobs_for(SEEDS, TRIED)
    assert (
        run_jobs(finished, jobs, partial(run_job, finished, TINY, device="cpu"), 0, quiet=True)
        == []
    )
    lost = next(job for job in jobs if job.seed == 1 and job.name == UPIT)
    before = lost.result(finished)
    lost.result_file(finished).unlink()
    # In a process of its own, as by default, and on a device that is named in full.
    assert run_jobs(
        finished, jobs, partial(run_job, finished, TINY, device="cpu:0"), 1, quiet=True
    ) == [f"seed 1: {UPIT}"]
    after = lost.result(finished)
    assert before
    assert after
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-3)


def test_schedules_start_from_the_mixture_that_is_kept(finished: Path) -> None:
    ours = Results.read(finished, SEEDS).arms[UPIT][0]
    assert [share for share, _ in ours["curve"]][:: len(ours["curve"]) - 1] == [0.0, 1.0]
    assert (finished / "seed-0" / "mixtures" / UPIT / "config.json").is_file()
    held_back = Arm("held back", "moe", kept=UPIT, curve=True, schedule=Schedule(gates_frozen=1.0))
    with torch.random.fork_rng():
        found = run_job(finished, TINY, Job(0, held_back), "cpu")
    assert found["before"] == ours["before"]
    assert found["curve"][0] == tuple(ours["curve"][0])
    assert found["perplexity"] != ours["perplexity"]
    # Of every third document: 1 of 3 here, while before and after are of all.
    assert ours["curve"][0][1] != ours["before"]


def test_data_and_tokens_are_equal_for_all_arms(finished: Path) -> None:
    results = Results.read(finished, SEEDS)
    tokens = {results.arms[name][0]["tokens"] for name in NAMES if name != "dense, 2 epochs"}
    assert tokens == {2 * 4 * TINY.rows_per_domain * TINY.context}
    sizes = {name: results.arms[name][0]["parameters"] for name in NAMES}
    assert sizes[VANILLA] == sizes[UPIT]
    assert sizes[DENSE]["total"] < sizes[UPIT]["active"] < sizes[UPIT]["total"]


def test_a_copied_model_computes_what_it_is_a_copy_of(finished: Path) -> None:
    results = Results.read(finished, SEEDS)
    for copied, dense in zip(results.arms[VANILLA], results.arms["dense, 2 epochs"], strict=True):
        assert copied["before"] == pytest.approx(dense["perplexity"], rel=1e-4)
        assert copied["perplexity"] != pytest.approx(copied["before"], rel=1e-4)


def test_tables_and_plot_are_written(finished: Path, tmp_path: Path, capsys) -> None:
    results = Results.read(finished, SEEDS)
    tables = all_tables(results)
    print_tables(results, tables)
    assert "UpIT beats vanilla upcycling" in capsys.readouterr().out
    readme = tmp_path / "README.md"
    with pytest.raises(FileNotFoundError):
        write_section(results, tables, tmp_path)
    readme.write_text("by hand\n")
    with pytest.raises(UpitError, match="does not have the lines"):
        write_section(results, tables, tmp_path)
    begin, end = marks("benchmarks.paper")
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    for _ in range(2):
        write_section(results, tables, tmp_path)
        text = readme.read_text()
        assert text.startswith(f"above\n{begin}\n")
        assert text.endswith(f"{end}\nbelow\n")
        assert "old" not in text
        assert text.count("UpIT beats vanilla upcycling |") == 1
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_arms_that_are_not_done_for_every_seed_are_left_out(finished: Path) -> None:
    results = Results.read(finished, [*SEEDS, 7])
    assert results.arms == {}
    assert results.stages == {}


def test_other_settings_need_another_folder(finished: Path) -> None:
    claim_folder(finished, TINY)
    with pytest.raises(UpitError, match=r"another replay \(0\.2, now 0\.5\)"):
        claim_folder(finished, replace(TINY, replay=0.5))


def test_a_visit_has_every_row_once_and_mostly_its_own() -> None:
    rows = [torch.full((60, 1), 100 * home) + torch.arange(60).view(-1, 1) for home in range(4)]
    for replay, share in ((0.1, 0.9), (0.75, 0.25)):
        parts = visits(rows, replay, torch.Generator().manual_seed(0))
        assert sorted(torch.cat(parts).flatten().tolist()) == torch.cat(rows).flatten().tolist()
        for home, part in enumerate(parts):
            assert (part // 100 == home).float().mean().item() == pytest.approx(share, abs=0.03)


def test_seeds_have_data_of_their_own_and_the_sweep_text_of_its_own() -> None:
    corpus = small_corpus(6)
    first, second, sweep = (corpus.of_seed(seed) for seed in (0, 1, SWEEP_SEED))
    assert first.tuning != second.tuning
    assert first.heldout == second.heldout == corpus.heldout
    for texts, shuffled in zip(corpus.tuning, first.tuning, strict=True):
        assert sorted(texts) == sorted(shuffled)
    for trained, heldout, others in zip(sweep.tuning, sweep.heldout, corpus.heldout, strict=True):
        assert len(heldout) == len(others)
        assert not set(heldout) & {*trained, *others}


def test_every_epoch_has_every_row_once() -> None:
    rows = [torch.arange(6).view(-1, 1), torch.arange(10, 14).view(-1, 1)]
    found = mixed_epochs(rows, 2, torch.Generator().manual_seed(0)).flatten()
    first, second = found.view(2, -1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == [*range(6), *range(10, 14)]
    assert first.tolist() != second.tolist()


def test_held_out_sums_are_right_and_in_no_training_document() -> None:
    domain = arithmetic_domain(random.Random(3))
    trained = {line.split("=")[0] for text in domain.train for line in text.split("\n")}
    asked = heldout_problems(random.Random(4), 400)
    assert len(asked) >= 200
    for question, answer in asked:
        assert question.removesuffix("=") not in trained
        assert eval(question.removesuffix("=")) == int(answer)
    assert last_number("12\n3+4=7") == "12"
    assert last_number("none\n3") == ""


def test_verdicts_follow_the_rule() -> None:
    # gains by seed: positive where the first arm is better
    assert judge("better", [1.0, 1.1, 0.9]) == HELD
    assert judge("better", [-1.0, -1.1, -0.9]) == CONTRADICTED
    assert judge("better", [1.0, 1.1, -0.1]) == NOT_SEEN  # a seed disagrees
    assert judge("better", [0.1, 0.1, 4.0]) == NOT_SEEN  # mean 1.4, standard error 1.3
    assert judge("better", [1.0]) == NOT_SEEN  # one seed shows nothing
    assert judge("equal", [0.3, 0.31, 0.29]) == HELD  # small, if certain
    assert judge("equal", [1.0, 1.1, 0.9]) == CONTRADICTED
    assert judge("equal", [-1.0, -1.1, -0.9]) == CONTRADICTED
    assert judge("equal", [3.0, -3.0, 0.0]) == HELD


def test_claims_and_sweep_name_arms_that_exist() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert all({claim.better, claim.worse} <= set(names) for claim in (*PAPER, *OURS))
    assert len(sweep_arms()) == sum(map(len, KINDS.values()))
    assert {"cpu", "gpu"} <= SCALES.keys()


def test_the_sweep_takes_the_lowest_of_each_kind(tmp_path: Path) -> None:
    rates = (1e-3, 2e-3, 4e-3)
    scale = replace(TINY, sweep=rates)
    for job in sweep_jobs(scale):
        if isinstance(job.kind, Arm):
            assert job.seed == SWEEP_SEED
            assert job.name.endswith(f"rate {job.rate:g}")
            best = rates[0] if job.kind.name in KINDS["dense"] else rates[-1]
            path = job.result_file(tmp_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"perplexity": [10.0 if job.rate == best else 12.0]}))
    assert chosen(tmp_path, scale).rates == replace(TINY.rates, dense=1e-3, mixture=4e-3)
    table = sweep_table(tmp_path, scale)
    assert [row[1:].index("**10.00**") for row in table.rows] == [0, 2]
    assert sweep_jobs(TINY) == []
    assert chosen(tmp_path, TINY) is TINY
    assert sweep_table(tmp_path, TINY).rows == []
