"""The jobs that `merge.py` measures, one per process; not to be run by hand.

    python benchmarks/merge_jobs.py '{"name": "copy", ...}'

Every `prepare_...` imports what its job needs and returns the work. That is done on toy models
first, then on those of the job, which alone is timed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUFFER = 512 << 10
MAX_LAYERS, MIN_LAYERS = 40, 4
CHECKPOINTS, EXPERTS, DENSITY = 4, 8, 0.9
# The two parents of mergekit's children and the share of the first.
CROSSINGS = ((0, 3, 0.3), (0, 2, 0.6), (1, 3, 0.45), (0, 1, 0.8))
PLANNED, PLAN_REPEATS = (8, 64), 5
ITEM = 2  # bytes of a bfloat16

# Done before the clock starts: programs import some modules only when they need them.
TOY_JOB = {"checkpoints": CHECKPOINTS, "experts": EXPERTS}

Work = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Shape:
    """A Llama of usual proportions; below a width of 1024 the vocabulary shrinks with it."""

    hidden: int
    layers: int

    @property
    def config(self) -> dict[str, Any]:
        heads = max(1, self.hidden // 64)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": min(32000, self.hidden * 125 // 4),
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config, width = self.config, self.hidden
        ffn = config["intermediate_size"]
        kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
        yield "model.embed_tokens.weight", (config["vocab_size"], width)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, width)
            yield f"{prefix}.mlp.gate_proj.weight", (ffn, width)
            yield f"{prefix}.mlp.up_proj.weight", (ffn, width)
            yield f"{prefix}.mlp.down_proj.weight", (width, ffn)
            yield f"{prefix}.input_layernorm.weight", (width,)
            yield f"{prefix}.post_attention_layernorm.weight", (width,)
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (config["vocab_size"], width)

    @property
    def ffn_parameters(self) -> int:
        return self.layers * 3 * self.hidden * self.config["intermediate_size"]

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for _name, shape in self.tensors())

    @property
    def largest_tensor(self) -> int:
        return ITEM * max(_product(shape) for _name, shape in self.tensors())

    def moe_bytes(self, experts: int) -> int:
        gates = self.layers * experts * self.hidden
        return ITEM * (self.parameters + (experts - 1) * self.ffn_parameters + gates)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def shape_for(parameters: int) -> Shape:
    """The width first, then as many layers as come closest to the size."""
    hidden = 1024
    while True:
        rest = Shape(hidden, 0).parameters
        layers = round((parameters - rest) / (Shape(hidden, 1).parameters - rest))
        if layers > MAX_LAYERS:
            hidden *= 2
        elif layers < MIN_LAYERS and hidden > 64:
            hidden //= 2
        else:
            return Shape(hidden, max(1, layers))


def model_folders(folder: Path, checkpoints: int) -> list[Path]:
    """The base's, then those of the first checkpoints."""
    return [folder / "base", *(folder / f"checkpoint-{i}" for i in range(1, checkpoints + 1))]


def prepare_make() -> Work:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def work(job: dict[str, Any]) -> None:
        torch.manual_seed(0)
        shape, bf16 = Shape(**job["shape"]), torch.bfloat16
        weights = {
            name: torch.ones(size, dtype=bf16)
            if len(size) == 1
            else torch.randn(size, dtype=bf16).mul_(0.02)
            for name, size in shape.tensors()
        }
        # Nobody reads text with it, but mergekit-moe wants one.
        words = WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        for index, folder in enumerate(model_folders(Path(job["family"]), job["checkpoints"])):
            for tensor in weights.values() if index else ():
                tensor.add_(torch.randn(tensor.shape, dtype=bf16), alpha=0.002)
            folder.mkdir(parents=True)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(shape.config, indent=1))
            tokenizer.save_pretrained(folder)

    return work


def recipe_document(job: dict[str, Any]) -> dict[str, Any]:
    base, *checkpoints = model_folders(Path(job["family"]), job["checkpoints"])
    return {
        "merge_method": "upit",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in checkpoints],
        "parameters": {"num_experts": job["experts"], "density": DENSITY},
    }


def prepare_ours() -> Work:
    import torch

    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    def work(job: dict[str, Any]) -> dict[str, Any]:
        document, out = recipe_document(job), Path(job["out"])
        run_recipe(parse_recipe(document), json.dumps(document), out, RunOptions(quiet=True))
        stages = json.loads((out / "upit_report.json").read_text())["seconds"]
        return {"stages": stages, "threads": torch.get_num_threads()}

    return work


def prepare_copy() -> Work:
    def reading(models: list[Path], buffer: memoryview) -> Iterator[None]:
        for folder in models:
            with (folder / "model.safetensors").open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    yield

    def work(job: dict[str, Any]) -> None:
        out, buffer = Path(job["out"]), memoryview(bytearray(BUFFER))
        chunks = reading(model_folders(Path(job["family"]), job["checkpoints"]), buffer)
        out.mkdir()
        for name, size in job["files"].items():
            with (out / name).open("wb", buffering=0) as file:
                while size:
                    next(chunks, None)
                    size -= file.write(buffer[:size])
                os.fsync(file.fileno())
        for _ in chunks:  # where more is read than written
            pass

    return work


def prepare_mergekit() -> Work:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    options = MergeOptions(write_model_card=False, quiet=True, random_seed=0)

    def work(job: dict[str, Any]) -> None:
        base, *experts = (str(p) for p in model_folders(Path(job["family"]), job["checkpoints"]))
        out, everyone = Path(job["out"]), list(experts)
        for index, (first, second, alpha) in enumerate(CROSSINGS):
            parents = [
                {"model": experts[i], "parameters": {"weight": weight, "density": DENSITY}}
                for i, weight in ((first, alpha), (second, 1 - alpha))
            ]
            document = {"merge_method": "dare_linear", "base_model": base, "models": parents}
            child = f"{out}-children/{index}"
            run_merge(MergeConfiguration(**document, dtype="bfloat16"), child, options)
            everyone.append(child)
        moe = {"base_model": base, "gate_mode": "random", "dtype": "bfloat16"}
        listed = [{"source_model": path} for path in everyone]
        build(MoEMergeConfig(**moe, experts=listed), str(out), options, device="cpu")
        for path in out.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return work


def prepare_planning() -> Work:
    import torch

    from upit_merge.config.recipe import parse_recipe
    from upit_merge.io.hub import OpenOptions
    from upit_merge.merge.inputs import opened
    from upit_merge.merge.passes import find_lineage, measure_similarity

    def work(job: dict[str, Any]) -> dict[str, Any]:
        times: dict[str, Any] = {str(n): {"plan": [], "lineage": []} for n in PLANNED}
        for _ in range(PLAN_REPEATS):
            for experts in PLANNED:
                recipe = parse_recipe(recipe_document(job | {"experts": experts}))
                started = time.perf_counter()
                with opened(recipe, OpenOptions()) as inputs:
                    gram = measure_similarity(inputs, (torch.device("cpu"),), quiet=True)
                    compared = time.perf_counter()
                    find_lineage(inputs, gram)
                    ended = time.perf_counter()
                times[str(experts)]["plan"].append(ended - started)
                times[str(experts)]["lineage"].append(ended - compared)
        return {"times": times}

    return work


JOBS: dict[str, Callable[[], Work]] = {
    "make": prepare_make,
    "upit-merge": prepare_ours,
    "copy": prepare_copy,
    "mergekit": prepare_mergekit,
    "planning": prepare_planning,
}


def proc(name: str) -> dict[str, int]:
    """The numbers of a file such as /proc/self/status."""
    lines = [line.split() for line in Path("/proc", name).read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[1:] and line[1].isdigit()}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """In the child process: import, try, flush, measure, and count what came out."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    work = JOBS[job["name"]]()
    if toy := job.get("toy"):
        work({**job, "family": toy, "out": job["out"] + "-toy", **TOY_JOB})
    imported = proc("self/status")["VmRSS"] << 10
    os.sync()
    io, used, started = proc("self/io"), cpu(), time.perf_counter()
    extra = work(job)
    wall, used = time.perf_counter() - started, cpu() - used
    moved = {key: value - io[key] for key, value in proc("self/io").items()}
    result = {
        "wall": wall,
        "cpu": used,
        "peak": proc("self/status")["VmHWM"] << 10,
        "after_imports": imported,
        "read": moved["rchar"],
        "written": moved["wchar"],
        **(extra or {}),
    }
    if "out" in job:
        weights = sorted(Path(job["out"]).glob("*.safetensors"))
        result["files"] = {path.name: path.stat().st_size for path in weights}
    if job["name"] in ("upit-merge", "mergekit"):
        result |= contents(weights)
    return result


def contents(weights: list[Path]) -> dict[str, int]:
    """Tensors and their bytes, without the headers."""
    tensors: dict[str, Any] = {}
    for path in weights:
        with path.open("rb") as file:
            tensors |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors.pop("__metadata__", None)
    ends = [entry["data_offsets"] for entry in tensors.values()]
    return {"tensors": len(ends), "tensor_bytes": sum(end - start for start, end in ends)}


if __name__ == "__main__":
    print(json.dumps(run_job(json.loads(sys.argv[1]))))
