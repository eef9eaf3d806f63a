"""`upit-merge evaluate` against whole transformers models, one sample at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.conftest import Family, byte_tokenizer
from tests.support.commands import done, invoke, refused
from tests.support.naive import load_model
from tests.support.pictures import really_drawn
from tests.support.seeds import KINDS, held_out
from upit_merge.commands.evaluate import EvaluateOptions, evaluate_output
from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.router.evaluation import Evaluation, Groups, Routing


@pytest.fixture
def out(shared_family: Family, merge) -> Path:
    router = {"data": str(shared_family.seed_file())}
    return merge(shared_family.recipe(parameters={"num_experts": 4}, router=router))


def evaluated(out: Path, data: Path, **options) -> Evaluation:
    settings = RouterSettings(data=str(data), batch_tokens=50)
    return evaluate_output(out, settings, EvaluateOptions(quiet=True, **options))


def test_numbers_are_those_of_the_whole_model(out: Path, tmp_path: Path) -> None:
    data = held_out(tmp_path)
    evaluation = evaluated(out, data, group_by="kind")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = byte_tokenizer()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    nll = dict.fromkeys(KINDS, 0.0)
    targets = dict.fromkeys(KINDS, 0)
    counts = {kind: torch.zeros(2, 4) for kind in KINDS}
    first_right = chosen_right = tokens = 0
    entropies = []
    for row, own in zip(rows, evaluation.buckets.assigned.tolist(), strict=True):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"][:64]])
        with torch.no_grad():
            output = model(ids, labels=ids, output_router_logits=True)
            loss = F.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum")
        nll[row["kind"]] += loss.item()
        targets[row["kind"]] += ids.shape[1] - 1
        for layer, logits in enumerate(output.router_logits):
            top = logits.topk(2).indices
            counts[row["kind"]][layer] += torch.bincount(top.flatten(), minlength=4)
            first_right += (top[:, 0] == own).sum().item()
            chosen_right += (top == own).sum().item()
            tokens += len(top)
            p = logits.softmax(1)
            entropies += (-(p * p.log()).sum(1) / math.log(4)).tolist()
    for kind in KINDS:
        members = evaluation.groups.members[kind]
        assert evaluation.perplexity(members) == pytest.approx(
            math.exp(nll[kind] / targets[kind]), rel=1e-4
        )
        expected = counts[kind] / counts[kind].sum(1, keepdim=True)
        torch.testing.assert_close(evaluation.shares(members), expected.double())
    everything = evaluation.groups.members["all"]
    overall = math.exp(sum(nll.values()) / sum(targets.values()))
    assert evaluation.perplexity(everything) == pytest.approx(overall, rel=1e-4)
    agreement = evaluation.agreement()
    assert agreement["first"] == pytest.approx(first_right / tokens)
    assert agreement["chosen"] == pytest.approx(chosen_right / tokens)
    assert evaluation.entropy(everything)["token"] == pytest.approx(
        sum(entropies) / len(entropies), rel=1e-4
    )
    total = sum(counts.values())
    dead = {
        (layer, e) for layer, e in (total / total.sum(1, keepdim=True) < 0.025).nonzero().tolist()
    }
    assert set(evaluation.dead()) == dead


def test_experts_alone_are_the_dense_models(shared_family: Family, merge, tmp_path: Path) -> None:
    out = merge(shared_family.recipe())
    evaluation = evaluated(out, held_out(tmp_path))
    dense = AutoModelForCausalLM.from_pretrained(shared_family.checkpoints[-1]).eval()
    for expert, folder in enumerate(shared_family.checkpoints):
        ffn = {n: t for n, t in load_model(folder).items() if ".mlp." in n}
        dense.load_state_dict(ffn, strict=False)
        nll = targets = 0
        for sample in evaluation.samples:
            ids = torch.tensor([sample.input_ids])
            with torch.no_grad():
                nll += dense(ids, labels=ids).loss.item() * sample.num_targets
            targets += sample.num_targets
        (members,) = evaluation.groups.members.values()
        alone = evaluation.experts_alone(members)[expert]
        assert alone == pytest.approx(math.exp(nll / targets), rel=1e-4)


def test_the_control_is_a_router_of_shuffled_buckets(out: Path, tmp_path: Path, merge) -> None:
    data = held_out(tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    evaluation = evaluated(out, data, control=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    settings = json.loads((out / "upit_report.json").read_text())["router"]["settings"]
    done("router", out, "--data", settings["data"], "--assign", "shuffled", "--quiet")
    shuffled = evaluated(out, data, experts=False)
    torch.testing.assert_close(evaluation.control, shuffled.sums, rtol=1e-6, atol=1e-6)
    assert not torch.equal(evaluation.sums, evaluation.control)
    assert shuffled.buckets is None
    assert shuffled.agreement() is None


def test_command_writes_table_json_and_picture(out: Path, tmp_path: Path) -> None:
    data = held_out(tmp_path)
    command = ["evaluate", str(out), "--data", str(data), "--group-by", "kind", "--control"]
    command += ["--json", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png")]
    with really_drawn():
        result = done(*command)
    for word in (
        "letters",
        "digits",
        "all",
        "mixture",
        "gates fitted to shuffled buckets",
        "the best expert of each sample",
    ):
        assert word in result.stdout
    report = json.loads((tmp_path / "e.json").read_text())
    assert list(report["groups"]) == ["letters", "digits", "all"]
    whole = report["groups"]["all"]
    assert whole["samples"] == 20
    assert all(sum(shares) == pytest.approx(1) for shares in whole["routing"])
    assert len(whole["routing"]) == 2
    assert whole["perplexity"] > 1
    assert report["agreement"]["first"] <= report["agreement"]["chosen"] <= 1
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "e.png").shape
    assert height > 200
    assert width > 400


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_copies_of_samples_are_told_and_change_nothing(
    command: str, out: Path, tmp_path: Path
) -> None:
    data, numbers = held_out(tmp_path), tmp_path / "numbers.json"
    words = (command, out, "--data", data, "--json", numbers)
    assert "\nData: 20 samples, " in "\n" + done(*words).stdout
    before = numbers.read_bytes()
    data.write_text(data.read_text() * 3)
    assert "; 40 samples dropped as the same as an earlier one.\n" in done(*words).stdout
    assert numbers.read_bytes() == before


@pytest.mark.parametrize("kinds", [("all", "[/x]"), ("$x$ \x1b[2J", "[bold]"), ("only", "only")])
def test_any_name_will_do_for_a_kind(out: Path, tmp_path: Path, kinds) -> None:
    data = tmp_path / "kinds.jsonl"
    rows = [{"text": "abcdefg" * 3 + "uvwxyz"[i], "kind": kinds[i % 2]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", str(out), "--data", str(data), "--group-by", "kind", "--no-experts"]
    words += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    result = done(*words)
    groups = json.loads((tmp_path / "e.json").read_text())["groups"]
    if kinds[0] == kinds[1]:
        assert {name: group["samples"] for name, group in groups.items()} == {"only": 6}
    else:
        assert [group["samples"] for group in groups.values()] == [3, 3, 6]
        assert all(kind in result.stdout for kind in kinds if "\x1b" not in kind)
        assert "\x1b" not in result.stdout


def test_weights_that_overflow_are_told(out: Path, tmp_path: Path) -> None:
    path = out / "model.safetensors"
    tensors = load_model(out)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    for command in (["evaluate", "--no-experts"], ["router", "--assign", "shuffled"]):
        words = [command[0], str(out), "--data", str(held_out(tmp_path)), *command[1:], "--quiet"]
        assert "NaN or infinite" in refused(*words)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts_per_tok": 5}, "routes a token to 5 of 4 experts"),
        ("bias", "has the tensor model.layers.0.self_attn.q_proj.bias, which a Mixtral has not"),
        ("rotary", ""),
    ],
    ids=str,
)
def test_foreign_folders_are_looked_at(out: Path, tmp_path: Path, change, sentence: str) -> None:
    if isinstance(change, dict):
        config = json.loads((out / "config.json").read_text()) | change
        (out / "config.json").write_text(json.dumps(config))
    else:
        name = {"bias": "q_proj.bias", "rotary": "rotary_emb.inv_freq"}[change]
        tensors = load_model(out) | {f"model.layers.0.self_attn.{name}": torch.zeros(4)}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    words = ["evaluate", str(out), "--data", str(held_out(tmp_path)), "--quiet"]
    result = invoke(*words)
    assert result.exit_code == (1 if sentence else 0), result.output
    assert sentence in result.stderr


def test_a_refined_control_is_refined_too(shared_family: Family, merge, tmp_path: Path) -> None:
    router = {"data": str(shared_family.seed_file()), "objective": "hidden"}
    found = []
    for name, refine in (("plain", None), ("refined", {"steps": 3, "tokens": 300, "lr": 0.3})):
        settings = router if refine is None else {**router, "refine": refine}
        out = merge(shared_family.recipe(router=settings), name)
        found.append(evaluated(out, held_out(tmp_path), control=True, experts=False).control)
    assert not torch.equal(*found)


def test_a_dead_expert_is_found() -> None:
    """An even share of four experts is a quarter; a tenth of that is the limit."""
    samples = [TokenizedSample([1] * 100, 1, "") for _ in range(2)]
    routing = Routing(2, 2, 4)
    routing.chosen[0] = torch.tensor([[80, 80, 35, 5], [100, 100, 0, 0]])
    routing.chosen[1] = torch.tensor([[80, 80, 36, 4], [100, 90, 10, 0]])
    evaluation = Evaluation(samples, Groups.of(samples), torch.ones(2), routing)
    assert evaluation.dead() == [(0, 3), (1, 3)]
    assert evaluation.shares([0])[1].tolist() == [0.5, 0.5, 0, 0]
    first = -sum(p * math.log(p) for p in (0.4, 0.4, 0.175, 0.025)) / math.log(4)
    assert evaluation.entropy([0])["load"] == pytest.approx((first + 0.5) / 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--group-by", "nothing"], "has no column `nothing`"),
        (["--json", "no/where.json"], "The folder of no/where.json does not exist"),
        (["--max-length", "1"], "--max-length is 1, expected"),
        (["--device", "tpu"], "The device 'tpu' does not exist"),
        (["--plot", "routing.txt"], "The picture routing.txt is none of .png, .pdf, .svg, .jpg"),
    ],
)
def test_mistakes_are_told(out: Path, tmp_path: Path, arguments, sentence: str) -> None:
    data = held_out(tmp_path)
    assert sentence in refused("evaluate", out, "--data", data, *arguments)


@pytest.mark.parametrize(
    "report",
    [None, {"router": None}, {"router": {"settings": {"data": "x", "objective": "random"}}}],
)
def test_no_control_without_a_record(out: Path, tmp_path: Path, report) -> None:
    path = out / "upit_report.json"
    path.unlink() if report is None else path.write_text(json.dumps(report))
    assert "leave out --control" in refused(
        "evaluate", out, "--data", held_out(tmp_path), "--control"
    )
