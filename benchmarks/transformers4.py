"""Do transformers 4 and 5 read the same out of an output? Token ids, chats, logits, generated text.

python benchmarks/transformers4.py [--folder F] [--python PATH] [--version 4.57.6]

Makes small outputs with the transformers that is installed (both formats, tied and untied; donors
saved by transformers 5, without tokenizer.json, of sentencepiece; named and lent chat templates;
what `upit-merge finetune` leaves), then reads them with it and with the older one, and fails if
anything differs. Without --python an environment for the older one is made in F, with the torch that
is installed; that takes a few minutes, the rest one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (
    "The  capital xyz\n é</s>the<|im_end|> fox ab",
    " leading, trailing \n\n",
    "<|im_start|>user\n2+2?<|im_end|>\n",
    "日本 🦙",
    "",
)
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TOLERANCE = 1e-5  # of logits: experts are summed in another order
NAMED = "{{ tools }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def probe(folder: Path) -> dict[str, Any]:
    """Return what the transformers of this interpreter reads out of a folder.

    Nothing of ours is imported, for ours needs transformers 5.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, Any] = {"ids": [tokenizer(text)["input_ids"] for text in TEXTS]}
    found["special"] = sorted({*tokenizer.all_special_tokens} - {None})
    found["eos"] = [tokenizer.eos_token, tokenizer.eos_token_id]
    found["decoded"] = [tokenizer.decode(ids) for ids in found["ids"]]
    templates = tokenizer.chat_template or {}
    for name in sorted(templates) if isinstance(templates, dict) else ["default"]:
        options = {"chat_template": name} if isinstance(templates, dict) else {}
        text = tokenizer.apply_chat_template(TURNS, tokenize=False, **options)
        found[f"chat {name}"] = [text, tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not (folder / "config.json").is_file():  # an adapter
        return found
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    found["amiss"] = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    found["use_cache"] = [model.config.use_cache, model.generation_config.use_cache]
    ids = torch.tensor([found["ids"][0]])
    with torch.no_grad():
        found["logits"] = model.eval()(ids).logits.flatten().tolist()
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    found["generated"] = made[0].tolist()
    return found


def make_outputs(folder: Path) -> dict[str, Path]:
    """Make the outputs; returns them by what they are."""
    from transformers import AutoTokenizer

    from tests.conftest import Family, build_family, byte_tokenizer
    from tests.support import tokenizers as kinds
    from tests.support.training import trainer_in
    from upit_merge.commands.run import RunOptions, run_recipe
    from upit_merge.config.recipe import parse_recipe

    Donor = Callable[[Family], None]
    model = kinds.train_sentencepiece(folder / "sentencepiece.model")

    def sentencepiece(add_bos_token: bool) -> Donor:
        return lambda f: kinds.sentencepiece(f.checkpoints[-1], model, add_bos_token=add_bos_token)

    def saved_again(family: Family) -> None:
        """A slow Llama tokenizer that adds no start token, as transformers 5 saves it."""
        last = family.checkpoints[-1]
        kinds.sentencepiece(last, model, add_bos_token=False)
        tokenizer = AutoTokenizer.from_pretrained(last, local_files_only=True)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            (last / name).unlink()
        tokenizer.save_pretrained(last)

    def named(family: Family) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {"default": kinds.CHATML, "tool_use": NAMED}
        tokenizer.save_pretrained(family.checkpoints[-1])

    def lent(family: Family) -> None:
        kinds.add_chat_tokens(family.base)
        kinds.add_chat_tokens(family.checkpoints[-1], None)
        (family.checkpoints[-1] / "generation_config.json").unlink()

    donors: dict[str, Donor] = {
        "as the tests have it": lambda _family: None,
        "saved by transformers 5, chat tokens": lambda f: kinds.add_chat_tokens(f.checkpoints[-1]),
        "vocab.json and merges.txt": lambda f: kinds.slow(f.checkpoints[-1]),
        "tokenizer.model": sentencepiece(add_bos_token=True),
        "tokenizer.model, no start token": sentencepiece(add_bos_token=False),
        "the same, saved by transformers 5": saved_again,
        "named templates": named,
        "template and settings of the base": lent,
    }
    cannot = {("mistral", "vocab.json and merges.txt")}  # transformers 5 reads none of a Mistral
    made = {}
    for kind, tied in (
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("qwen3", True),
        ("qwen3", False),
    ):
        for name, give in donors.items():
            if (kind, name) in cannot:
                continue
            root = folder / f"{len(made)}"
            family = build_family(
                root / "family", kind=kind, count=2, vocab_size=320, tie_word_embeddings=tied
            )
            give(family)
            document = family.recipe()
            label = f"{kind}{', tied' if tied else ''}: {name}"
            run_recipe(parse_recipe(document), "", root / "out", RunOptions(quiet=True))
            made[label] = root / "out"
    trained = folder / "trained"
    trained.mkdir()
    train = trainer_in(trained)
    mixture = made["llama: saved by transformers 5, chat tokens"]
    made["finetune: a mixture"] = train(mixture, "mixture", train_modules="router")
    base = mixture.parent / "family" / "sft" / "checkpoint-1000"
    dense = train(base, "dense", train_modules="ffn", save_steps=1.0)
    made["finetune: a dense checkpoint"] = next(dense.glob("checkpoint-*"))
    lora = train(base, "lora", use_peft=True, lora_target_modules=["gate_proj"], save_steps=1.0)
    made["finetune: an adapter"] = next(lora.glob("checkpoint-*"))
    return made


def older_python(folder: Path, version: str) -> Path:
    """Make an environment with an older transformers; returns its interpreter."""
    import torch

    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = [f"transformers=={version}", f"torch=={torch.__version__.partition('+')[0]}"]
    packages += ["sentencepiece", "protobuf", "jinja2", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def read_with(python: str | Path, made: dict[str, Path]) -> dict[str, Any]:
    """Return the version and the findings of an interpreter's transformers, by output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONPATH", None)
    folders = [str(path) for path in made.values()]
    done = subprocess.run(
        [python, __file__, "--probe", *folders], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    version, *results = (json.loads(line) for line in done.stdout.splitlines())
    return {"version": version, **dict(zip(made, results, strict=True))}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what two versions read differently out of an output."""
    for found in (old, new):
        if "error" in found:
            return [found["error"]]
    faults = [key for key in {**old, **new} if key != "logits" and old.get(key) != new.get(key)]
    faults += ["a tensor is amiss"] * bool(new.get("amiss"))
    faults += [f"logits by {gap(old, new):.1e}"] * (gap(old, new) > TOLERANCE)
    return faults


def gap(old: dict[str, Any], new: dict[str, Any]) -> float:
    pair = old.get("logits", []), new.get("logits", [])
    if len({*map(len, pair)}) > 1:  # of other token ids
        return inf
    return max((abs(a - b) for a, b in zip(*pair, strict=True)), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--version", default="4.57.6")
    parser.add_argument("--probe", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        import transformers

        print(json.dumps(transformers.__version__))
        for folder in options.probe:
            try:
                print(json.dumps(probe(folder)))
            except Exception as error:  # that an output cannot be read is a result
                print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
        return
    sys.path.insert(0, str(ROOT))
    logging.getLogger("upit_merge").setLevel(logging.ERROR)  # what is lent is lent on purpose
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        python = options.python or older_python(folder / "older", options.version)
        made = make_outputs(Path(tempfile.mkdtemp(dir=folder)))
        old, new = read_with(python, made), read_with(sys.executable, made)
        print(f"transformers {old['version']} against {new['version']}, {len(made)} outputs")
        faults = {label: differences(old[label], new[label]) for label in made}
        for label, found in faults.items():
            print(f"  {label}: {'; '.join(found) or 'equal'}")
        if any(faults.values()):
            raise SystemExit("They differ.")
        largest = max(gap(old[label], new[label]) for label in made)
        print(f"All equal; logits within {largest:.1e}.")


if __name__ == "__main__":
    main()
