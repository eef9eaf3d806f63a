"""Router pre-training against plain transformers models, from the command line too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import Family, build_family, train_on
from tests.support.commands import done, refused
from tests.support.naive import load_model
from tests.support.seeds import some_samples
from upit_merge.engine.hidden_states import MEAN, PackedStates, Stream, token_batches
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.errors import UpitError
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.router_gain import SampleLosses

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["llama", "tied", "sliding window", "qwen3", "bfloat16"])
def test_losses_are_those_of_the_dense_models(tmp_path, merge, variant: str) -> None:
    """Layer by layer, packed and batched, against AutoModelForCausalLM one sample at a time."""
    config = {
        "llama": {},
        "tied": {"tie_word_embeddings": True},
        "sliding window": {"kind": "mistral", "sliding_window": 5},
        "qwen3": {"kind": "qwen3"},
        "bfloat16": {"dtype": torch.bfloat16},
    }[variant]
    # With the backbone of the base everywhere, expert i's stream is checkpoint i on that backbone.
    family = build_family(tmp_path, count=3, **config)
    out = merge(family.recipe())
    samples = some_samples()
    with opened_mixture(out) as moe:
        model = LayerwiseMixture(moe, CPU)
        lengths = [len(s.input_ids) for s in samples]
        states = PackedStates(lengths, 32, torch.float32, scratch=tmp_path, budget_bytes=1e9)
        for expert, folder in enumerate(family.checkpoints):
            batches = tuple(token_batches(range(len(samples)), lengths, 64))
            model.sweep(samples, [Stream(expert, batches)], states, on_progress=lambda _: None)
            losses = SampleLosses.of(samples, [model.losses(samples, states)]).means
            dense = AutoModelForCausalLM.from_pretrained(
                family.checkpoints[-1], dtype=torch.float32
            ).eval()
            ffn = {n: t for n, t in load_model(folder).items() if ".mlp." in n}
            dense.load_state_dict(ffn, strict=False)
            for sample, loss in zip(samples, losses, strict=True):
                ids = torch.tensor([sample.input_ids])
                labels = ids.clone()
                labels[0, : sample.loss_start] = -100
                with torch.no_grad():
                    expected = dense(ids, labels=labels).loss
                assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("budget", [1e9, 0])
def test_router_inputs_are_what_the_gates_see(shared_family, merge, tmp_path, budget) -> None:
    """Against hooks on a dense model; in memory, and spilled to a scratch file."""
    out = merge(shared_family.recipe())
    samples = some_samples(6)
    lengths = [len(s.input_ids) for s in samples]
    streams = [Stream(0, ((0, 3),)), Stream(1, ((4,), (1, 5))), Stream(2, ((2,),))]
    collected: list[torch.Tensor] = []
    with opened_mixture(out) as moe:
        model = LayerwiseMixture(moe, CPU)
        states, inputs = (
            PackedStates(lengths, 32, torch.float32, scratch=tmp_path, budget_bytes=budget)
            for _ in range(2)
        )
        assert bool(list(tmp_path.glob("hidden-*"))) == (budget == 0)
        model.sweep(
            samples,
            streams,
            states,
            router_inputs=inputs,
            after_layer=lambda _layer: collected.append(inputs.rows.clone()),
            on_progress=lambda _count: None,
        )
        spans = [inputs.span(index) for index in range(len(samples))]
        states.close()
        inputs.close()
    assert not list(tmp_path.glob("hidden-*"))
    for stream in streams:
        dense = AutoModelForCausalLM.from_pretrained(shared_family.checkpoints[-1]).eval()
        source = load_model(shared_family.checkpoints[stream.expert])
        dense.load_state_dict({n: t for n, t in source.items() if ".mlp." in n}, strict=False)
        seen: list[torch.Tensor] = []
        for layer in dense.model.layers:
            layer.post_attention_layernorm.register_forward_hook(
                lambda _m, _i, output, seen=seen: seen.append(output[0])
            )
        for index in stream.samples:
            seen.clear()
            with torch.no_grad():
                dense(torch.tensor([samples[index].input_ids]))
            for layer, expected in enumerate(seen):
                torch.testing.assert_close(
                    collected[layer][spans[index]], expected, rtol=0, atol=1e-5
                )


def test_mean_stream_uses_the_mean_of_the_experts(shared_family, merge) -> None:
    with opened_mixture(merge(shared_family.recipe())) as moe:
        means = LayerwiseMixture(moe, CPU).ffn(1, MEAN)
    models = [load_model(path) for path in shared_family.checkpoints]
    for projection, mean in means.items():
        name = f"model.layers.1.mlp.{projection}.weight"
        torch.testing.assert_close(mean, torch.stack([m[name] for m in models]).mean(0))


def report_of(out: Path) -> dict:
    return json.loads((out / "upit_report.json").read_text())["router"]


def test_router_settings_reach_their_stages(shared_family, merge) -> None:
    """Each setting alone changes what it should, against the run without it."""
    seeds = str(shared_family.seed_file())

    def run(**settings) -> tuple[dict, dict[str, torch.Tensor]]:
        name = "-".join(f"{key}{value}" for key, value in settings.items()) or "plain"
        out = merge(shared_family.recipe(router={"data": seeds, **settings}), name)
        return report_of(out), gates(out)

    plain, plain_gates = run()
    assert plain["data"]["max_length"] == 64  # the model's context; 512 is the default
    assert plain["data"]["samples"] == 24
    _, warm = run(temperature=2.0)
    for name, gate in warm.items():
        torch.testing.assert_close(gate * 2, plain_gates[name])
    short, _ = run(max_length=12)
    assert short["data"]["max_length"] == 12
    assert short["data"]["truncated_samples"] > 0
    assert run(sample=10)[0]["data"]["samples"] == 10
    assert run(sample=0.5)[0]["data"]["samples"] == 12
    balanced, _ = run(assign="balanced")
    sizes = [expert["samples"] for expert in balanced["buckets"]["experts"]]
    assert sizes == [8, 8, 8]
    buckets = plain["buckets"]
    assert buckets["loss_of_assigned_expert"] == pytest.approx(
        buckets["loss_of_best_expert_per_sample"]
    )
    assert balanced["buckets"]["loss_of_assigned_expert"] > buckets["loss_of_assigned_expert"]
    _, other = run(objective="ridge")
    assert not any(torch.equal(gate, plain_gates[name]) for name, gate in other.items())
    _, other = run(stream="expert")
    for name, gate in other.items():
        # Before the first layer's gate there is no FFN in which streams could differ.
        # In other batches all is rounded differently, and the solver stops at its own tolerance.
        is_same = torch.allclose(gate, plain_gates[name], rtol=0, atol=0.01)
        assert is_same == (".layers.0." in name)
    for settings in ({"batch_tokens": 1}, {"memory_gb": 1e-9}):
        _, same = run(**settings)
        for name, gate in same.items():
            torch.testing.assert_close(gate, plain_gates[name], rtol=0, atol=0.01)


def test_sample_choice_follows_the_seed(shared_family, merge) -> None:
    router = {"data": str(shared_family.seed_file()), "sample": 5}

    def losses(name: str, seed: int) -> float:
        out = merge(shared_family.recipe(router=router, parameters={"seed": seed}), name)
        return report_of(out)["buckets"]["loss_of_best_single_expert"]

    assert losses("a", 1) == losses("b", 1)
    assert losses("a2", 1) != losses("c", 2)


def test_chat_template_of_the_recipe_serves_the_seed_data(family, merge) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(6)]
    path = family.root / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    out = merge(family.recipe(chat_template=template, router={"data": str(path)}))
    assert report_of(out)["data"]["tokens"] == 6 * len("<user>Hello 0")


def test_router_refuses_an_incomplete_or_misshapen_model(family, merge) -> None:
    out = merge(family.recipe())
    tensors = load_model(out)
    name = "model.layers.1.self_attn.q_proj.weight"
    for change, sentence in [
        (lambda t: t.pop(name), f"has no tensor {name}"),
        (lambda t: t.update({name: t[name][:8].clone()}), f"has {name} of shape [8, 32]"),
    ]:
        broken = dict(tensors)
        change(broken)
        save_file(broken, out / "model.safetensors", metadata={"format": "pt"})
        before = (out / "model.safetensors").read_bytes()
        assert sentence in refused("router", out, "--data", family.seed_file(), "--quiet")
        assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("assign", ["balanced", "lowest"])
def test_experts_that_overflow_are_named(family, merge, assign: str) -> None:
    """Finite weights of 1e25 pass the check of the weights but not the forward pass."""
    path = family.checkpoints[1] / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".mlp." in name:
            tensors[name] *= 1e25
    save_file(tensors, path, metadata={"format": "pt"})
    router = {"data": str(family.seed_file()), "assign": assign}
    with pytest.raises(UpitError, match="Expert 1 gives NaN or infinite losses"):
        merge(family.recipe(router=router))


def test_empty_buckets_are_told(shared_family, merge, caplog) -> None:
    merge(shared_family.recipe(router={"data": str(shared_family.seed_file()), "sample": 2}))
    assert "No seed sample belongs to expert(s)" in caplog.text


def test_spill_file_is_not_a_hole(tmp_path) -> None:
    """A hole in a mapped file would kill the process on a full disk."""
    states = PackedStates([100], 64, torch.float32, scratch=tmp_path, budget_bytes=0)
    (path,) = tmp_path.glob("hidden-*")
    assert path.stat().st_blocks * 512 >= 100 * 64 * 4
    states.close()


def test_spill_needs_room(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(UpitError, match="the router's hidden states"):
        PackedStates([100], 64, torch.float32, scratch=tmp_path, budget_bytes=0)
    assert not list(tmp_path.iterdir())


def gates(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_model(folder).items() if n.endswith("moe.gate.weight")}


@pytest.mark.parametrize(
    "objective", ["one_vs_rest", "softmax", "ridge", "hidden", "upit", "random"]
)
@pytest.mark.parametrize("assign", ["balanced", "lowest"])
def test_every_objective_gives_a_model_that_loads(shared_family, merge, objective, assign) -> None:
    router = {"data": str(shared_family.seed_file()), "objective": objective, "assign": assign}
    out = merge(shared_family.recipe(parameters={"num_experts": 4}, router=router))
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.isfinite().all()
        assert layer.mlp.gate.weight.norm(dim=1).min() > 0


def test_without_router_the_gates_are_random_and_it_says_so(shared_family, merge, caplog) -> None:
    merge(shared_family.recipe())
    assert "no router: block, so the gates are random" in caplog.text


def test_router_command_gives_what_the_recipe_would_have(family: Family, merge) -> None:
    seeds = family.seed_file()
    for size in (5_000_000, 50_000):
        whole = merge(family.recipe(router={"data": str(seeds)}), f"a{size}", max_shard_bytes=size)
        later = merge(family.recipe(), f"b{size}", max_shard_bytes=size)
        before = load_model(later)
        done("router", later, "--data", seeds, "--quiet")
        expected, got = load_model(whole), load_model(later)
        changed = {name for name in got if not torch.equal(got[name], before[name])}
        assert changed == set(gates(later))
        for name in got:
            assert torch.equal(got[name], expected[name])
        assert report_of(later)["settings"]["objective"] == "one_vs_rest"
        assert report_of(later)["settings"]["data"] == str(seeds)
        card = (later / "README.md").read_text()
        assert "random" not in card
        assert "pre-trained layer by layer on 24 seed samples" in card
        assert not (later / ".upit-staging").exists()


def test_experts_are_routed_to_their_own_kind(tmp_path, merge) -> None:
    """Two checkpoints trained on different text: the gates send each text to its checkpoint."""
    family = build_family(tmp_path, count=1, seed=3)
    texts = {"one": "abcabcabc" * 3, "two": "987654321" * 3}
    tokenizer = train_on(family, texts)
    folders = [family.root / name for name in texts]
    seeds = tmp_path / "both.jsonl"
    seeds.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts.values()] * 4))
    out = merge(family.recipe(models=[str(f) for f in folders], router={"data": str(seeds)}))
    moe = AutoModelForCausalLM.from_pretrained(out).eval()
    for expert, text in enumerate(texts.values()):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = moe(ids, output_router_logits=True)
        for layer_logits in output.router_logits:
            assert (layer_logits.argmax(-1)[1:] == expert).float().mean() > 0.9


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--objective", "ridge", "--memory-gb", "0.00001"),
        ("--objective", "softmax", "--stream", "expert"),
        ("--objective", "hidden", "--refine-steps", "3", "--refine-tokens", "200"),
        ("--objective", "upit", "--upit-train-experts", "--upit-epochs", "1"),
    ],
    ids=lambda words: words[1],
)
def test_cuda_finds_the_gates_of_the_cpu(tmp_path, merge, dtype: str, arguments) -> None:
    """The same numbers in another order; in bfloat16, no more than its rounding apart."""
    family = build_family(tmp_path / "family", dtype=getattr(torch, dtype))
    out = {device: merge(family.recipe(), device) for device in ("cpu", "cuda")}
    for device, folder in out.items():
        words = ["router", str(folder), "--data", str(family.seed_file()), "--device", device]
        done(*words, *arguments, "--quiet")
    for name, gate in gates(out["cpu"]).items():
        difference = (gates(out["cuda"])[name].float() - gate.float()).norm() / gate.float().norm()
        assert difference < (0.01 if dtype == "float32" else 0.3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_what_the_cpu_does(shared_family, tmp_path, merge) -> None:
    out = merge(shared_family.recipe())
    found = []
    for device in ("cpu", "cuda"):
        words = ["evaluate", str(out), "--data", str(shared_family.seed_file()), "--quiet"]
        path = tmp_path / f"{device}.json"
        done(*words, "--device", device, "--json", path)
        found.append(json.loads(path.read_text())["groups"]["all"]["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
