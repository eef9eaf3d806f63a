"""LoRA adapters as inputs: what PEFT makes of them, without a merged model anywhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralForCausalLM

from tests.conftest import Family, build_family
from tests.support.commands import done
from tests.support.lora import save_adapter, with_adapters
from tests.support.naive import PROJECTIONS, load_model
from upit_merge.config.recipe import parse_recipe
from upit_merge.config.references import expand_models
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.hub import OpenOptions, split_reference
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.merge.passes import Merger, measure_similarity
from upit_merge.models.lora.adapter import Adapter, open_model
from upit_merge.models.lora.low_rank import LowRank, factor_gram
from upit_merge.output import journal as resume
from upit_merge.output.journal import has_progress
from upit_merge.output.staging import STAGING

ROOT = Path(__file__).resolve().parents[2]
CPU = (torch.device("cpu"),)
FFN = ["gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "FFN only": {"target_modules": FFN},
    "all linear modules": {"target_modules": "all-linear"},
    "by a regular expression": {"target_modules": r".*\.(up|down)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks of their own": {
        "rank_pattern": {"up_proj": 2, "layers.1.mlp.gate_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\.mlp\.down_proj": 11.5},
    },
    "replaced modules": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embeddings and head": {"target_modules": [*FFN, "embed_tokens", "lm_head"]},
    "replaced and DoRA": {"use_dora": True, "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, list[dict[str, Any]]]:
    """A family with three adapters, and PEFT's merged models; do not write into it."""
    family = build_family(tmp_path_factory.mktemp("lora"), count=2)
    return family, with_adapters(family)


def adapters(family: Family, **extra: Any) -> dict[str, Any]:
    return family.recipe(models=[str(family.root / "lora" / "checkpoint-*")], **extra)


@contextmanager
def opened_inputs(document: dict[str, Any]) -> Iterator[Inputs]:
    with opened(parse_recipe(document), OpenOptions()) as inputs:
        yield inputs


def dense_grams(base: dict[str, Any], models: list[dict[str, Any]]) -> torch.Tensor:
    """Inner products of whole deltas in float64, tensor by tensor."""
    grams = []
    for layer in range(2):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.mlp.{projection}.weight"
            deltas = torch.stack([(m[name].double() - base[name].double()).ravel() for m in models])
            grams.append(deltas @ deltas.T)
    return torch.stack(grams)


def assert_grams(gram: torch.Tensor, expected: torch.Tensor) -> None:
    """Merged models in float32 differ from exact ones by their own rounding."""
    norms = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    assert ((gram - expected).abs() <= 1e-6 * scale).all()


def assert_experts(out: Path, models: list[dict[str, Any]], **tolerance: float) -> None:
    """Expert i is model i's FFN."""
    moe = load_model(out)
    for index, model in enumerate(models):
        for layer in range(2):
            for projection, short in PROJECTIONS.items():
                expert = f"model.layers.{layer}.block_sparse_moe.experts.{index}.{short}.weight"
                dense = model[f"model.layers.{layer}.mlp.{projection}.weight"]
                torch.testing.assert_close(moe[expert], dense, **tolerance)


# ---- one adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_pefts(shared_family: Family, tmp_path: Path, kind: str) -> None:
    merged = save_adapter(shared_family.base, tmp_path / "adapter", **KINDS[kind])
    with (
        closing(Checkpoint("base", shared_family.base, OpenOptions())) as base,
        closing(open_adapter(tmp_path / "adapter", base)) as adapter,
    ):
        assert adapter.specs.keys() == merged.keys()
        changed = 0
        for name in merged:
            ours = adapter.tensor(name)
            torch.testing.assert_close(ours, merged[name], rtol=0, atol=1e-6)
            changed += not torch.equal(ours, base.tensor(name))
            pieces = [adapter.rows(name, i, i + 1) for i in range(adapter.specs[name].shape[0])]
            assert torch.equal(torch.cat(pieces), ours) or KINDS[kind].get("use_dora")
        assert changed >= 3


def open_adapter(folder: Path, base: Checkpoint, options: OpenOptions | None = None) -> Adapter:
    model = open_model(str(folder), base, options or OpenOptions(), lambda *_: base)
    assert isinstance(model, Adapter)
    return model


def test_values_are_rounded_once(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """With a base in bfloat16 the sum is rounded, not its parts."""
    family = build_family(tmp_path, count=0, dtype=torch.bfloat16)
    folder = tmp_path / "lora" / "checkpoint-500"
    save_adapter(family.base, folder, target_modules=FFN)
    base, factors = load_model(family.base), load_file(folder / "adapter_model.safetensors")
    out = load_model(merge(adapters(family)))
    name = "model.layers.1.mlp.up_proj.weight"
    prefix = f"base_model.model.{name.removesuffix('.weight')}."
    delta = factors[f"{prefix}lora_B.weight"].double() @ factors[f"{prefix}lora_A.weight"].double()
    expected = (base[name].double() + 1.5 * delta).float().bfloat16()
    ours = out["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert ours.dtype == torch.bfloat16
    assert (ours != expected).float().mean() < 1e-3  # ties of the float32 sum


def test_a_pickled_adapter(family: Family, tmp_path: Path) -> None:
    save_adapter(family.base, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    with closing(Checkpoint("base", family.base, OpenOptions())) as base:
        first = open_adapter(tmp_path / "a", base)
        second = open_adapter(tmp_path / "b", base, OpenOptions(allow_pickle=True))
        for name in first.specs:
            assert torch.equal(first.tensor(name), second.tensor(name))


# ---- how alike adapters are ----------------------------------------------------------------


def test_factors_have_the_inner_products_of_their_products() -> None:
    torch.manual_seed(0)
    deltas = [
        LowRank(scale, torch.randn(37, rank), torch.randn(rank, 23)) if rank else None
        for scale, rank in ((0.5, 3), (2.0, 8), (1.0, 0), (-1.0, 1), (1.0, 0))
    ]
    dense = torch.stack(
        [
            (d.scale * d.up.double() @ d.down.double()).ravel() if d else torch.zeros(37 * 23)
            for d in deltas
        ]
    )
    gram = factor_gram(deltas)
    torch.testing.assert_close(gram, dense @ dense.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.T)
    assert not factor_gram([None, None]).any()


def test_comparing_adapters_does_not_read_the_base(lora: Any, monkeypatch: Any) -> None:
    """Nor any other checkpoint's rows; the result is that of the merged models."""
    family, merged = lora
    with opened_inputs(adapters(family)) as inputs:
        monkeypatch.setattr(Checkpoint, "rows", None)
        monkeypatch.setattr(Adapter, "rows", None)
        gram = measure_similarity(Merger(inputs, CPU, quiet=True))
    assert_grams(gram, dense_grams(load_model(family.base), merged))


@pytest.mark.parametrize("kind", ["DoRA", "one layer", "ranks of their own"])
def test_gram_of_other_kinds(family: Family, kind: str) -> None:
    merged = with_adapters(family, 2, **KINDS[kind])
    with opened_inputs(adapters(family)) as inputs:
        gram = measure_similarity(Merger(inputs, CPU, quiet=True))
    assert_grams(gram, dense_grams(load_model(family.base), merged))


def test_one_pass_finds_the_same_gram(lora: Any, tmp_path: Path, merge: Any) -> None:
    """As many experts as adapters: they are compared while they are written."""
    family, _merged = lora
    document = adapters(family)
    journal: dict[int, torch.Tensor] = {}
    append = resume.Journal.append

    def spy(self: Any, grams: Any, written: Any) -> None:
        journal.update(grams)
        append(self, grams, written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Journal, "append", spy)
        merge(document)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(Merger(inputs, CPU, quiet=True))
    assert torch.equal(torch.stack([journal[i] for i in range(len(journal))]), gram)


# ---- whole runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "DoRA", "rank-stabilised", "replaced modules"])
def test_experts_are_the_merged_adapters(family: Family, merge: Any, kind: str) -> None:
    merged = with_adapters(family, **KINDS[kind])
    out = merge(adapters(family, dtype="float32"))
    assert_experts(out, merged, rtol=0, atol=1e-6)
    moe = load_model(out)
    for name in merged[-1]:  # what the last adapter did to attention and embeddings is kept
        if ".mlp." not in name:
            torch.testing.assert_close(moe[name], merged[-1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["average", "base", "named", "by folder"])
def test_backbone(lora: Any, merge: Any, backbone: str) -> None:
    family, merged = lora
    first, base = family.root / "lora" / "checkpoint-500", load_model(family.base)
    setting = {"named": f"{family.base}+{first}", "by folder": str(first)}.get(backbone, backbone)
    document = family.recipe(
        models=[f"{family.base}+{family.root}/lora/checkpoint-*"], parameters={"backbone": setting}
    )
    moe = load_model(merge(document))
    name = "model.layers.1.self_attn.q_proj.weight"
    average = torch.stack([model[name] for model in merged]).mean(0)
    expected = {"average": average, "base": base[name]}.get(backbone, merged[0][name])
    torch.testing.assert_close(moe[name], expected, rtol=0, atol=1e-6)


def test_adapters_and_checkpoints_in_one_list(lora: Any, merge: Any) -> None:
    family, merged = lora
    first = family.root / "lora" / "checkpoint-500"
    models = [family.checkpoints[0], first, family.checkpoints[1], f"{family.base}+{first}"]
    tensors = [load_model(family.checkpoints[0]), merged[0], load_model(family.checkpoints[1])]
    document = family.recipe(models=list(map(str, models)))
    assert_experts(merge(document), [*tensors, merged[0]], rtol=0, atol=1e-6)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(Merger(inputs, CPU, quiet=True))
    assert_grams(gram, dense_grams(load_model(family.base), [*tensors, merged[0]]))


def test_an_adapter_on_another_base(lora: Any, merge: Any) -> None:
    """Deltas are measured against the recipe's base, whatever the adapter was trained on."""
    family, _merged = lora
    other, folder = family.checkpoints[0], family.root / "other-adapter"
    tensors = [save_adapter(other, folder, seed=7), load_model(family.checkpoints[1])]
    document = family.recipe(models=[f"{other}+{folder}", str(family.checkpoints[1])])
    assert_experts(merge(document), tensors, rtol=0, atol=1e-6)
    with opened_inputs(document) as inputs:
        gram = measure_similarity(Merger(inputs, CPU, quiet=True))
    assert_grams(gram, dense_grams(load_model(family.base), tensors))


def test_threads_files_and_blocks_do_not_change_a_byte(lora: Any, merge: Any) -> None:
    family, _merged = lora
    document = adapters(family, dtype="bfloat16", parameters={"num_experts": 6})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = load_model(merge(document, "one"))
        torch.set_num_threads(4)
        four = load_model(merge(document, "four", max_shard_bytes=20_000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("upit_merge.merge.experts._BLOCK_ELEMENTS", {"cpu": 100})
            small = load_model(merge(document, "small"))
    finally:
        torch.set_num_threads(threads)
    for name, tensor in one.items():
        assert torch.equal(four[name], tensor)
        assert torch.equal(small[name], tensor)


def test_a_run_that_failed_goes_on(lora: Any, merge: Any, tmp_path: Path) -> None:
    family, _merged = lora
    document = adapters(family, parameters={"num_experts": 6})
    whole = merge(document, "whole", max_shard_bytes=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_BYTES", 0)
        write, left = resume.Journal.append, [3]

        def full(self: Any, grams: Any, written: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, grams, written)

        patch.setattr(resume.Journal, "append", full)
        with pytest.raises(Exception, match="is full"):
            merge(document, "out", max_shard_bytes=20_000)
    assert has_progress(tmp_path / "out" / STAGING)
    again = merge(document, "out", max_shard_bytes=20_000)
    for path in whole.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("changed", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changed_is_noticed(family: Family, changed: str) -> None:
    with_adapters(family, 1)
    with opened_inputs(adapters(family)) as inputs:
        files = {path.resolve() for path in inputs.checkpoints[0].files()}
    folder = family.root / "lora" / "checkpoint-500"
    assert (folder / changed).resolve() in files
    assert {family.base / "config.json", family.base / "model.safetensors"} <= files


def test_verify_agrees(family: Family) -> None:
    """And tells an adapter that was trained on since."""
    with_adapters(family)
    document = adapters(
        family,
        parameters={"num_experts": 5},
        router={"data": str(family.seed_file()), "objective": "ridge"},
    )
    recipe, out = family.write_recipe(document), family.root / "out"

    def invoke(*args: object) -> Any:
        return invoke(*map(str, args))

    done("plan", recipe, out, "--quiet", "--data", family.seed_file())
    done("run", recipe, out, "--quiet")
    verified = done("verify", out)
    assert "differ" not in verified.stdout
    path = family.root / "lora" / "checkpoint-1000" / "adapter_model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    verified = invoke("verify", out)
    assert verified.exit_code == 1
    assert "experts.1." in verified.stderr


def test_mergekit_yaml(lora: Any, merge: Any, tmp_path: Path) -> None:
    """mergekit writes adapters as `BASE+ADAPTER`, too."""
    family, _merged = lora
    document = family.recipe(models=[f"{family.base}+{family.root}/lora/checkpoint-*"])
    recipe, out = family.write_recipe(document, "mergekit.yml"), tmp_path / "by-mergekit"
    result = CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    ours = merge(document)
    assert (out / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert (merge(adapters(family), "plain") / "model.safetensors").read_bytes() == (
        ours / "model.safetensors"
    ).read_bytes()


def test_the_output_loads_and_generates(lora: Any, merge: Any) -> None:
    family, _merged = lora
    document = adapters(
        family, parameters={"num_experts": 5}, router={"data": str(family.seed_file())}
    )
    out = merge(document)
    model, info = MixtralForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(out)("sample 1", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] > 8


_written: set[str] = set()
_watching = False


def _note_written(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event != "open" or not isinstance(args[0], (str, Path)):
        return
    path, mode, flags = args
    if set("wax+") & set(mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
        _written.add(str(Path(path).absolute()))


def test_nothing_is_written_beside_the_output(lora: Any, merge: Any, tmp_path: Path) -> None:
    """No merged model on the disk: what is opened for writing is in `out/`, and no larger."""
    global _watching
    family, _merged = lora
    sys.addaudithook(_note_written)
    document = adapters(family, parameters={"num_experts": 5})
    before = {path for path in family.root.rglob("*") if path.is_file()}
    _watching = True
    try:
        out = merge(document)
    finally:
        _watching = False
    assert any(path.endswith(".safetensors") for path in _written)
    beside = {path for path in _written if not Path(path).is_relative_to(out)}
    assert {path for path in beside if not path.startswith("/dev/")} == set()
    assert {path for path in family.root.rglob("*") if path.is_file()} == before
    weights = {Path(path).name for path in _written if path.endswith((".safetensors", ".bin"))}
    assert weights == {path.name for path in out.glob("*.safetensors")}


# ---- what an adapter's folder gives and what its base does ---------------------------------


def test_tokenizer_settings_and_card(family: Family, merge: Any) -> None:
    """The tokenizer may be the adapter's; settings and what else it has not are the base's."""
    with_adapters(family, 2)
    (family.base / "generation_config.json").write_text('{"temperature": 0.5}')
    last = family.root / "lora" / "checkpoint-1000"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(family.base / name, last / name)
    (last / "chat_template.jinja").write_text("{{ messages }}")
    out = merge(adapters(family))
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1
    card = (out / "README.md").read_text()
    assert "| 1 | checkpoint-1000 |" in card
    (last / "generation_config.json").write_text('{"temperature": 0.7}')
    out = merge(adapters(family), "other")
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.7}'


def test_hub_ids(family: Family, merge: Any, monkeypatch: Any) -> None:
    """A Hub id may turn out to be an adapter; both parts may have a revision."""
    with_adapters(family, 2)
    folders = {
        ("me/base", None): family.base,
        ("me/base", "v1"): family.base,
        ("me/code", None): family.root / "lora" / "checkpoint-500",
        ("me/maths", "r2"): family.root / "lora" / "checkpoint-1000",
    }
    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: Any, **_: Any) -> str:
        asked.append((repo, revision))
        assert "adapter_model.safetensors" in allow_patterns
        return str(folders[repo, revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    out = merge(
        family.recipe(models=["me/code", "me/base@v1+me/maths@r2"]) | {"base_model": "me/base"}
    )
    assert set(asked) == set(folders)
    metadata = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert metadata["base_model"] == ["me/base", "me/code", "me/maths"]
    assert json.loads((out / "upit_report.json").read_text())["checkpoints"] == [
        "me/code",
        "me/base@v1+me/maths@r2",
    ]


def test_unlike_adapters_are_told_once(family: Family, caplog: Any) -> None:
    with_adapters(family, 3)
    save_adapter(family.base, family.root / "lora" / "checkpoint-1000", r=2)
    with opened_inputs(adapters(family)):
        pass
    warnings = [r.getMessage() for r in caplog.records if "differ in" in r.getMessage()]
    assert len(warnings) == 1
    assert "checkpoint-1000 differ in rank (4 and 2)" in warnings[0]


# ---- how references are read ---------------------------------------------------------------


def names(tmp_path: Path, pattern: str) -> list[str]:
    document = {"merge_method": "upit", "base_model": "b", "models": [{"model": pattern}]}
    entries = expand_models(parse_recipe(document).models)
    return [entry.model.replace(f"{tmp_path}/", "") for entry in entries]


def test_globs_and_folders_with_a_plus(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a+b", "a+c", "lora/checkpoint-1000", "lora/checkpoint-500", "x+y/z+w"):
        (tmp_path / name).mkdir(parents=True)
    expected = ["base+lora/checkpoint-500", "base+lora/checkpoint-1000"]
    assert names(tmp_path, "base+lora/checkpoint-*") == expected
    assert names(tmp_path, "me/base@main+lora/checkpoint-*") == [
        name.replace("base+", "me/base@main+") for name in expected
    ]
    assert names(tmp_path, "a+?") == ["a+b", "a+c"]
    assert names(tmp_path, "a+b") == ["a+b"]
    assert split_reference("a+b") == ("a+b", None)
    assert split_reference("a+b+x+y") == ("a+b", "x+y")
    assert split_reference("a+b+x+y/z+w") == ("a+b", "x+y/z+w")
    assert split_reference("me/base+me/a+b") == ("me/base", "me/a+b")
    assert split_reference("me/base") == ("me/base", None)


def test_a_checkpoint_in_a_folder_with_a_plus(family: Family, merge: Any) -> None:
    family.checkpoints[0].rename(family.root / "base+sft")
    out = merge(family.recipe(models=[str(family.root / "base+sft")]))
    assert_experts(out, [load_model(family.root / "base+sft")], rtol=0, atol=0)


# ---- the recipe ----------------------------------------------------------------------------


def test_self_moe(family: Family, merge: Any, monkeypatch: Any) -> None:
    """recipes/self-moe.yml on tiny models: base + scale · B @ A, and the base's everything else."""
    for seed, name in enumerate(("code", "maths", "prose")):
        save_adapter(family.base, family.root / "adapters" / name, seed=seed)
    family.seed_file()
    monkeypatch.chdir(family.root)
    document = yaml.safe_load((ROOT / "recipes" / "self-moe.yml").read_text())
    assert document["parameters"]["backbone"] == "base"
    out = merge(document | {"dtype": "float32"})
    base, moe = load_model(family.base), load_model(out)
    for index, name in enumerate(("code", "maths", "prose")):
        factors = load_file(family.root / "adapters" / name / "adapter_model.safetensors")
        for layer in range(2):
            for projection, short in PROJECTIONS.items():
                module = f"model.layers.{layer}.mlp.{projection}"
                b, a = (factors[f"base_model.model.{module}.lora_{f}.weight"].numpy() for f in "BA")
                expected = base[f"{module}.weight"].numpy() + 6 / 4 * (b @ a)
                ours = moe[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{short}.weight"]
                torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-6)
    for name in base:
        assert ".mlp." in name or torch.equal(moe[name], base[name])
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
