"""`upit-merge extend` and `shrink` on odd models: others' spellings, damaged files, mistakes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import LLAMA3_ROPE, build_family
from tests.support.commands import done, extend, refused, shrink
from tests.support.crash import contents
from tests.support.loading import is_gate, load
from tests.support.naive import load_model
from upit_merge.io.shards import ShardWriter
from upit_merge.output.staging import EDIT_STAGING

# ---- what fits, and is hardly meant ------------------------------------------------------------


def test_base_as_an_expert(four, moe, caplog) -> None:
    done("extend", moe, "--model", four.base, "--quiet")
    assert f"Checkpoint {four.base} is the base that {moe} was made from" in caplog.text


def test_copy_of_an_expert(four, moe, tmp_path, caplog) -> None:
    """Known by its values, whatever it is called; the mixture is extended all the same."""
    shutil.copytree(four.checkpoints[1], tmp_path / "again")
    done("extend", moe, "--model", tmp_path / "again", "--quiet")
    assert f"has the same FFNs as expert 1 of {moe}; two experts will be identical" in caplog.text


def test_expert_of_another_vocabulary(four, moe, tmp_path, caplog) -> None:
    """Its FFNs are all that is taken, so that they are the checkpoint's to the bit."""
    model = load(four.checkpoints[3])
    model.resize_token_embeddings(264)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    model.save_pretrained(tmp_path / "resized")
    done("extend", moe, "--model", tmp_path / "resized", "--quiet")
    assert "resized has a vocabulary of 264" in caplog.text
    assert "its FFN has learned with another attention" in caplog.text
    tensors = load_model(moe)
    assert torch.equal(
        tensors["model.layers.1.block_sparse_moe.experts.4.w1.weight"],
        model.model.layers[1].mlp.gate_proj.weight,
    )
    assert tensors["model.embed_tokens.weight"].shape[0] == 259


def test_the_usual_expert_needs_no_words(four, moe, caplog) -> None:
    done(*extend(moe, four))
    assert not [r for r in caplog.records if r.name == "upit_merge.commands.extend"]


# ---- mistakes ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(four, moe, tmp_path, monkeypatch) -> None:
    before = contents(moe)
    seeds = four.seed_file()
    other = build_family(tmp_path / "other", count=1, intermediate_size=64).base
    deeper = build_family(tmp_path / "deeper", count=1, num_hidden_layers=3).base
    qwen = build_family(tmp_path / "qwen", count=1, kind="qwen3").base
    for words, told in [
        (
            ("extend", moe, "--model", other),
            f"Checkpoint {other} has intermediate_size 64, {moe} has 48",
        ),
        (("extend", moe, "--model", deeper), f"Checkpoint {deeper} has num_hidden_layers 3"),
        (("extend", moe, "--model", qwen), "is a qwen3 model, of which no expert of a Mixtral can"),
        (("extend", moe, "--model", "./nowhere"), "The checkpoint ./nowhere does not exist"),
        (("extend", moe, "--model", moe), "has model_type 'mixtral', a mixture of experts already"),
        (
            ("extend", tmp_path / "no", "--model", four.base, "--data", seeds),
            "does not exist; give",
        ),
        (
            ("extend", four.base, "--model", four.base, "--data", seeds),
            "the router needs a Mixtral",
        ),
        (
            extend(moe, four, "--objective", "softmax"),
            "objective: softmax is for all gates; add --all-gates.",
        ),
        (extend(moe, four, "--refine-steps", "2"), "refine changes all gates; add --all-gates."),
        (extend(moe, four, "--data", "none.jsonl"), "There is no data at 'none.jsonl'"),
        (shrink(moe, four, 4), "has 4 experts per layer, which cannot become 4; give a"),
        (shrink(moe, four, 1), "routes a token to 2 experts, so that 1 would be too few; give "),
        (shrink(four.base, four, 2), "the router needs a Mixtral, Qwen3-MoE, "),
    ]:
        assert told in refused(*words)
        assert contents(moe) == before
        assert not any((moe / folder).exists() for folder in EDIT_STAGING.values())
    (moe / "upit_report.json").unlink()
    assert "is not known (its upit_report.json has none); give some with --data" in refused(
        *extend(moe, four)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`upit-merge shrink` is the work of one process" in refused(*shrink(moe, four, 2))


def test_broken_weights_are_told(four, moe, tmp_path) -> None:
    folder = shutil.copytree(four.checkpoints[-1], tmp_path / "broken")
    tensors = load_model(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = contents(moe)
    told = refused("extend", moe, "--model", folder, "--quiet")
    assert f"Checkpoint {folder} has NaN or infinite weights in model.layers.1.mlp.up_proj" in told
    assert contents(moe) == before


def test_no_room(four, moe, monkeypatch) -> None:
    before = contents(moe)
    monkeypatch.setattr("upit_merge.io.disk.free_bytes", lambda _folder: 1000)
    for words in (extend(moe, four), shrink(moe, four, 2)):
        assert "has 0.00 GB free, but the changed files" in refused(*words)
        assert contents(moe) == before


# ---- what others write -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_that_transformers_saved(tmp_path, merge, kind: str) -> None:
    """Its config.json spells the number of experts otherwise; the result loads all the same."""
    family = build_family(tmp_path / "f", count=3, kind=kind)
    out = merge(family.recipe(parameters={"num_experts": 4}))
    tensors = load_model(out)
    config = json.loads((out / "config.json").read_text())
    load(out).config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(saved | {"num_experts": 4}))
    assert config["torch_dtype"] == saved["dtype"]
    done("extend", out, "--model", family.base, "--data", family.seed_file(), "--quiet")
    assert load(out).config.num_local_experts == 5
    done(*shrink(out, family, 3))
    assert load(out).config.num_local_experts == 3
    after = load_model(out)
    assert all(torch.equal(after[n], t) for n, t in tensors.items() if ".self_attn." in n)


def test_files_of_others_survive_a_later_run(four, moe, tmp_path) -> None:
    (moe / "notes.md").write_text("mine")
    done(*extend(moe, four))
    done(*shrink(moe, four, 3))
    recipe = tmp_path / "again.yml"
    recipe.write_text((moe / "mergekit_config.yml").read_text())
    done("run", recipe, moe, "--overwrite", "--quiet")
    assert (moe / "notes.md").read_text() == "mine"
    assert not list(moe.glob("model-expert*"))
    done("verify", moe)


TRAINED = ["--objective", "upit", "--upit-train-experts", "--upit-epochs", "1"]


@pytest.mark.parametrize("extended_first", [True, False])
def test_trained_experts_are_verified_beside_added_ones(four, moe, extended_first: bool) -> None:
    train = ["router", moe, "--data", four.seed_file(), "--quiet", *TRAINED]
    steps = [extend(moe, four, "--all-gates"), train]
    for words in steps if extended_first else reversed(steps):
        done(*words)
        done("verify", moe)
    report = json.loads((moe / "upit_report.json").read_text())
    assert len(report["router"]["experts_sha256"]) == 4 + extended_first
    assert [extension["expert"] for extension in report["extensions"]] == [4]


def test_scaled_rotary_embeddings_are_left_alone(tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", count=3, rope_parameters=LLAMA3_ROPE)
    out = merge(family.recipe(router={"data": str(family.seed_file())}))
    before = json.loads((out / "config.json").read_text())
    done("extend", out, "--model", family.base, "--quiet")
    after = json.loads((out / "config.json").read_text())
    assert after == before | {"num_local_experts": 4}
    done("verify", out)


def test_gates_in_another_dtype_than_the_experts(tmp_path, merge) -> None:
    family = build_family(tmp_path / "f", count=3, dtype=torch.bfloat16)
    out = merge(family.recipe())
    tensors = {n: t.float() if is_gate(n) else t for n, t in load_model(out).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    done("extend", out, "--model", family.base, "--data", family.seed_file(), "--quiet")
    for name, tensor in load_model(out).items():
        assert tensor.dtype == (torch.float32 if is_gate(name) else torch.bfloat16)


def test_the_card_after_all_of_it(four, moe) -> None:
    done(*extend(moe, four))
    done(*shrink(moe, four, 3))
    done(*extend(moe, four))
    card = (moe / "README.md").read_text()
    assert "A mixture of 4 experts" in card
    assert "\n\nExpert 3 is checkpoint-2000, added later.\n" in card
    before, folded, now = re.split("</?details>", card)
    assert "had 5 experts per layer" in before
    assert "| 4 | checkpoint-2000, added later |" in folded
    assert "| 3 | " not in before + now
    assert "Expert 3 was added later: its gate" in card
    assert "Expert 4" not in card


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "is not a JSON object"),
        ('{"router": [1]}', "is not the report of a upit run (router: "),
        ('{"extensions": 5}', "is not the report of a upit run (extensions: "),
        ('{"extensions": [{}]}', "is not the report of a upit run (extensions.0.expert: "),
        ('{"shrunk": 3}', "is not the report of a upit run (shrunk: "),
        ('{"lineage": {"experts": 3}}', "is not the report of a upit run (lineage.experts: "),
        ('{"router": {"experts_sha256": 5}}', "is not the report of a upit run (router."),
    ],
)
def test_a_damaged_report_is_told_before_the_work(four, moe, text: str, told: str) -> None:
    (moe / "upit_report.json").write_text(text)
    data = ["--data", four.seed_file(), "--quiet"]
    before = contents_without_report(moe)
    for words in (
        ["extend", moe, "--model", four.base, *data],
        shrink(moe, four, 2),
        ["router", moe, *data],
        ["verify", moe],
        ["evaluate", moe, *data, "--control"],
    ):
        assert told in refused(*words)
        assert contents_without_report(moe) == before


def contents_without_report(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if path.name != "upit_report.json"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_local_experts": 10**8}, "has num_local_experts 100000000, but the model has only"),
        ({"num_hidden_layers": 10**8}, "has num_hidden_layers 100000000, but the model has only"),
        ({"num_experts_per_tok": 0}, "routes a token to 0 of 4 experts"),
        ({"num_experts_per_tok": -1}, "routes a token to -1 of 4 experts"),
        ({"hidden_act": "exec"}, "is not a valid Mixtral configuration (hidden_act 'exec' is"),
        ({"rope_theta": "x"}, "is not a valid Mixtral configuration ("),
        ({"quantization_config": {"bits": 4}}, "is quantised (quantization_config); use the"),
    ],
)
def test_a_damaged_configuration_is_told(four, moe, changes: dict[str, Any], told: str) -> None:
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(config | changes))
    for words in (extend(moe, four), shrink(moe, four, 2)):
        assert told in refused(*words)


def test_words_for_small_mistakes(four, moe, tmp_path) -> None:
    for words, told in [
        (["extend", "nope", "--model", four.base], "The folder nope does not exist"),
        (["extend", moe, "--model", f"{four.base}+"], "The adapter has an empty name"),
        (["extend", moe, "--model", ""], "The checkpoint has an empty name"),
        (extend(moe, four, "--split", "validation"), "--split is of the data; name that with"),
    ]:
        assert told in refused(*words)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    shutil.copy(moe / "config.json", pickled)
    told = refused("extend", pickled, "--model", four.base, "--data", four.seed_file())
    assert told == f"{pickled} has its weights in .bin files; convert it to safetensors first."


def test_a_full_disk_leaves_no_copy(four, moe, monkeypatch) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = contents_without_report(moe)
    for words in (extend(moe, four), shrink(moe, four, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write", full)
            assert "is full; free some space" in refused(*words)
        left = contents_without_report(moe)
        assert not [name for name in left if ".upit-" in name and "/model/" in name]
        assert {n: data for n, data in left.items() if ".upit-" not in n} == before
        done(*words)
        before = contents_without_report(moe)
