"""benchmarks.real, with a tiny model in place of SmolLM2: every job, and what is read out of them."""

import gzip
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.paper.tables import marks, replace_section
from benchmarks.paper.verdicts import HELD
from benchmarks.paper.workers import run_jobs
from benchmarks.real import measure, stages
from benchmarks.real.arms import (
    ARMS,
    DENSE,
    FINISHED,
    HEAD_START,
    MIXTURES,
    RUN_MIXED,
    SITUATIONS,
    SWEEP,
)
from benchmarks.real.jobs import (
    Job,
    arm_jobs,
    best_rates,
    results_of,
    run_job,
    sweep_jobs,
    with_needs,
)
from benchmarks.real.stages import MIXED, STAGES
from benchmarks.real.tables import BEST_DENSE, CLAIMS, MIXTURE, Results, all_tables, rivals
from benchmarks.real.text import (
    CONTEXT,
    HELD_OUT_ROWS,
    KINDS,
    PASSAGE,
    ROWS_PER_FILE,
    Rows,
    manual_pages,
    parts_of,
    plain,
)
from benchmarks.real.training import ROWS, Schedule, arithmetic, in_batches, load, losses, train
from benchmarks.real.verdicts import SAMPLES, VERDICTS
from upit_merge.demo.training import TrainingBudget, save, train_tokenizer
from upit_merge.demo.training import model_config as demo_config

STEPS, POST_ROWS = 4, 8
SMALL = TrainingBudget(vocab_size=300, hidden_size=64, layers=1, context=CONTEXT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs of one seed, done in this process."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = train_tokenizer(["a few words, again and again"] * 20, SMALL.vocab_size)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        base = LlamaForCausalLM(demo_config(SMALL, tokenizer)).to(torch.bfloat16)
        save(folder / "base", base, tokenizer)
        counts = {
            "trained": 2 * STEPS * ROWS + POST_ROWS,
            "test": 4,
            "validation": 2,
            "verdict": 32,
        }
        ids = {
            name: [torch.randint(3, len(tokenizer), (count, CONTEXT)) for _ in KINDS]
            for name, count in counts.items()
        }
        torch.save(ids, folder / "rows.pt")
        patch.setattr(stages, "STAGE_ROWS", STEPS * ROWS)
        patch.setattr(measure, "STAGE_ROWS", STEPS * ROWS)
        patch.setattr(measure, "POST_ROWS", POST_ROWS)
        patch.setattr(measure, "SEED_SAMPLES", 4)
        first = [Job(0, verdict) for verdict in VERDICTS] + sweep_jobs()
        work = partial(run_job, folder)
        unmet = with_needs(folder, first)
        swept = {Job(0, kind).label for kind in (*STAGES[:4], MIXED, FINISHED, RUN_MIXED)}
        assert {job.label for job in unmet} == swept | {job.label for job in first}
        assert len(run_jobs(folder, unmet, work, 0, quiet=True)) == len(unmet)
        rest = arm_jobs(0, best_rates(folder))
        assert len(rest) == len(ARMS)
        rest += [Job(0, situation) for situation in SITUATIONS]
        done = run_jobs(folder, with_needs(folder, rest), work, 0, quiet=True)
        # Two arms were swept, two situations looked at; a run in order was not needed until now.
        assert len(done) == len(ARMS) - 2 + len(SITUATIONS) - 2 + 1
        assert with_needs(folder, first + rest) == []
    return folder


def test_best_rates_are_those_of_the_lowest_validation_loss(finished: Path) -> None:
    rates = best_rates(finished)
    for arm in (DENSE, MIXTURES[0]):
        results = [Job(0, arm, rate).result(finished) for rate in SWEEP]
        values = [sum(result["losses"]["validation"]) for result in results if result]
        assert rates[arm.rates_of] == SWEEP[values.index(min(values))]


def test_rivals_are_what_a_model_made_by_hand_computes(finished: Path) -> None:
    result = Job(0, FINISHED).result(finished)
    assert result is not None
    rows = Rows(**torch.load(finished / "rows.pt", weights_only=True))
    checkpoints = FINISHED.checkpoints(finished, 0)
    dense = [AutoModelForCausalLM.from_pretrained(c, dtype=torch.float32) for c in checkpoints]
    by_hand = AutoModelForCausalLM.from_pretrained(finished / "base", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            weight.copy_(sum(dict(model.named_parameters())[name] for model in dense) / 3)
    look = dict(rivals(result))
    found = look["average of the checkpoints"]
    for kind, test in enumerate(rows.test):
        with arithmetic():
            logits = by_hand(input_ids=test).logits[:, :-1].float().log_softmax(-1)
        nll = -logits.gather(2, test[:, 1:, None]).mean()
        assert found[kind] == pytest.approx(float(nll.detach()), rel=2e-5)
    best = []
    for kind in range(len(KINDS)):
        _loss, best_model = min(
            ((losses(model, rows.validation)[kind], model) for model in dense),
            key=lambda found: found[0],
        )
        best.append(losses(best_model, rows.test)[kind])
    assert look["every kind by its best checkpoint"] == pytest.approx(best, rel=1e-5)
    # Of all that is dense, by other rows than it is told of.
    every = [found for found in result["losses"].values() if "validation" in found]
    assert len(every) == 1 + len(checkpoints) + len(measure.SCALES)
    best_dense = min(every, key=lambda found: sum(found["validation"]))
    assert look[BEST_DENSE] == best_dense["test"]


def test_only_the_first_seed_is_looked_at_while_it_trains(finished: Path, tmp_path: Path) -> None:
    rate = best_rates(finished)["dense"]
    first, look = Job(0, DENSE, rate).result(finished), Job(0, RUN_MIXED).result(finished)
    assert first is not None
    assert look is not None
    shutil.copytree(finished / "seed-0" / "mixed", tmp_path / "seed-1" / "mixed")
    for name in ("base", "rows.pt"):
        (tmp_path / name).symlink_to(finished / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "STAGE_ROWS", STEPS * ROWS)
        patch.setattr(measure, "POST_ROWS", POST_ROWS)
        other = measure.post_train(tmp_path, DENSE, rate, 1, look)
    assert [share for share, _losses in first["curve"]] == [0.25, 0.5]  # of three steps
    assert set(first["losses"]) == {"test", "validation"}
    assert other["curve"] == []
    assert set(other["losses"]) == {"test"}


def test_only_ffns_and_gates_are_trained(finished: Path) -> None:
    moe, _choice = measure.mixture_of(finished, FINISHED, 0)
    model = load(moe)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    rows = torch.randint(3, 200, (2 * ROWS, CONTEXT))
    seen: list[bool] = []

    def look(step: int) -> None:
        gate = model.model.layers[0].mlp.gate.weight
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        seen.append(torch.equal(gate, before["model.layers.0.mlp.gate.weight"]))
        seen.append(torch.equal(experts, before["model.layers.0.mlp.experts.gate_up_proj"]))

    train(model, in_batches([rows]), Schedule(1e-3, gates_alone=0.5), after_step=look)
    assert seen == [False, True, False, False]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (".mlp." not in name), name


def test_schedule_rises_and_falls_to_zero() -> None:
    factors = [Schedule(1.0, warmup=3).factor(step, 10) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(0.0)


def test_visits_in_order_see_every_row_once() -> None:
    drawn = [torch.arange(1000 * kind, 1000 * kind + 384) for kind in range(3)]
    seen = torch.cat([stages.visited(drawn, visit % 3, visit // 3) for visit in range(6)])
    assert sorted(seen.tolist()) == sorted(torch.cat(drawn).tolist())
    first = stages.visited(drawn, 0, 0)
    assert mean((first < 1000).double().tolist()) == pytest.approx(0.8, abs=0.01)


def test_seeds_draw_other_rows_and_parts_that_do_not_overlap() -> None:
    rows = Rows(*([torch.arange(100).view(-1, 1)] * 3 for _ in range(4)))
    first, second = rows.drawn(0, 0, 40), rows.drawn(0, 40, 40)
    assert not set(first[0].flatten().tolist()) & set(second[0].flatten().tolist())
    assert not torch.equal(first[0], rows.drawn(1, 0, 40)[0])
    with pytest.raises(ValueError, match="too few"):
        rows.drawn(0, 90, 40)


def test_nothing_that_is_held_out_is_trained_on() -> None:
    def tokens(count: int) -> Tensor:
        return torch.randint(1000, (count, CONTEXT))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        files = [[*tokens(4)] for _ in range(200)]
    licence = files[0][0][:PASSAGE]
    for rows in files[::2]:
        rows[0][:PASSAGE] = licence  # which half of all files say
    files[150][2][5:] = files[3][1][:-5]
    parts = parts_of(iter(files), random.Random(0))
    assert {name: len(parts[name]) for name in HELD_OUT_ROWS} == HELD_OUT_ROWS
    held_out = torch.stack([row for name in HELD_OUT_ROWS for row in parts[name]])
    seen = {tuple(part.tolist()) for part in held_out.unfold(1, PASSAGE, 1).flatten(0, 1)}
    assert tuple(licence.tolist()) in seen
    used = sum(HELD_OUT_ROWS.values()) // ROWS_PER_FILE  # files
    assert 3 * (200 - used) < len(parts["trained"]) < 4 * (200 - used)
    for row in parts["trained"]:
        assert not any(tuple(part.tolist()) in seen for part in row.unfold(0, PASSAGE, 1))


def test_pages_under_several_names_are_one(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/man/de/man1"
    folder.mkdir(parents=True)
    page = ".SH NAME\n" + "ein Wort und noch eins\n" * 100 + ".SH ÜBERSETZUNG\nvon jemandem\n"
    (folder / "a.1.gz").write_bytes(gzip.compress(page.encode()))
    (folder / "b.1.gz").symlink_to("a.1.gz")
    (folder / "c.1.gz").write_bytes(gzip.compress(page.encode()))
    (found,) = manual_pages(tmp_path)
    assert "jemandem" not in found


def test_manual_pages_lose_what_formats_them() -> None:
    page = ".TH X 1\n.SH NAME\nx \\- macht \\fBetwas\\fP\n.TP\n\\(bu eins\n'\\\" Kommentar\n"
    assert list(plain(page)) == ["NAME", "x - macht etwas", "* eins"]


def test_tables_say_what_the_results_do(finished: Path, tmp_path: Path) -> None:
    results = Results(finished, [0], best_rates(finished))
    tables = [table for table in all_tables(results) if table.rows]
    assert len(tables) == 2 + len(SITUATIONS) + 2
    assert len(tables[1].rows) == len(VERDICTS) * len(SAMPLES)
    claims = tables[0].rows
    assert len(claims) == len(CLAIMS)
    assert {row[1] for row in claims} == {"one seed"}
    trained = {row[0]: row for row in tables[-2].rows}
    result = Job(0, DENSE, results.rates["dense"]).result(finished)
    assert result is not None
    value = math.exp(mean(result["losses"]["test"]))
    assert trained[DENSE.name][1 + len(KINDS)] == f"{value:.2f}"
    assert {arm.name for arm in HEAD_START} <= {row[0] for row in tables[-1].rows}
    page = tmp_path / "README.md"
    begin, end = marks("benchmarks.real")
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    replace_section(page, "benchmarks.real", tables)
    assert "old" not in page.read_text()
    assert page.read_text().endswith(f"{end}\nbelow\n")


def test_a_claim_is_held_where_all_seeds_agree(finished: Path, tmp_path: Path) -> None:
    for seed, gain in enumerate((0.05, 0.06, 0.07)):
        folder = results_of(tmp_path) / f"seed-{seed}"
        folder.mkdir(parents=True)
        for arm, loss in ((DENSE, 2.0), (MIXTURES[1], 2.0 - gain)):
            path = folder / f"{arm.name}, rate {SWEEP[0]:g}.json"
            path.write_text(json.dumps({"losses": {"test": [loss] * 3}, "parameters": {}}))
    results = Results(tmp_path, [0, 1, 2], dict.fromkeys(("dense", "mixture"), SWEEP[0]))
    (claim,) = [c for c in CLAIMS if "the paper's regime" in c.text and "dense" in c.text]
    assert claim.gains(results) == pytest.approx([5.0, 6.0, 7.0])
    from benchmarks.real.tables import claim_table

    (row,) = [row for row in claim_table(results).rows if row[0] == claim.text]
    assert row[1] == HELD


def test_few_samples_are_too_few(finished: Path) -> None:
    for verdict in VERDICTS:
        result = Job(0, verdict).result(finished)
        assert result is not None
        few = result["verdicts"][str(min(SAMPLES))]
        assert few["outcome"] == "too_few"
        assert few["samples"] < 20
        assert str(finished) not in Job(0, verdict).result_file(finished).read_text()


def test_results_without_their_checkpoints_are_made_again_only_if_needed(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(results_of(finished), results_of(tmp_path))
    rates = best_rates(tmp_path)
    assert with_needs(tmp_path, arm_jobs(0, rates)) == []
    job = Job(0, DENSE, rates["dense"])
    job.result_file(tmp_path).unlink()
    assert with_needs(tmp_path, [job]) == [Job(0, MIXED), job]


def test_mixtures_are_measured_as_they_are_made(finished: Path) -> None:
    """The defaults are found by undoing what was chosen; the tool's own folder says the same."""
    result = Job(0, FINISHED).result(finished)
    assert result is not None
    moe, choice = measure.mixture_of(finished, FINISHED, 0)
    assert choice == result["chosen"]
    rows = Rows(**torch.load(finished / "rows.pt", weights_only=True))
    found = measure.setting(choice["temperature"], choice["experts_per_token"])
    assert losses(load(moe), rows.test) == pytest.approx(result["losses"][found]["test"])
    assert dict(rivals(result))[MIXTURE] == result["losses"][found]["test"]
    model = load(moe)
    measure.with_temperature(model, 1 / choice["temperature"])
    measure.with_experts_per_token(model, 2)
    expected = result["losses"]["temperature 1, top-2"]["test"]
    assert losses(model, rows.test) == pytest.approx(expected, rel=1e-6)
