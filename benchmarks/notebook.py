"""docs/colab.ipynb run whole, without a head, a GPU or the Hub: every cell, as it is in the file.

    pip install nbclient ipykernel && python benchmarks/notebook.py --folder F

F gets an environment of its own, in which the notebook's first cell installs this checkout (from
the package registry only what this environment has not), and, by the names that the notebook has for
them, a tiny model and small data sets of the same columns: transformers and datasets take a folder
of that name first. Of the cells' text only what is in `SMALLER` is changed. `F/executed.ipynb` has
what they printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "colab.ipynb"

# Steps and lengths for a minute's training; each is in the notebook once.
SMALLER = {
    "max_steps: 250": "max_steps: 8",
    "save_steps: 125": "save_steps: 4",
    "gradient_accumulation_steps: 4": "gradient_accumulation_steps: 1",
    "max_length: 512": "max_length: 64",
    "logging_steps: 25": "logging_steps: 4",
}
MODEL = "Qwen/Qwen3-0.6B-Base"
ROWS = 430  # of a data set: the notebook takes 400 away before it trains
WORDS = [
    "the",
    "a",
    "one",
    "two",
    "red",
    "blue",
    "runs",
    "sits",
    "adds",
    "gives",
    "list",
    "string",
    "number",
    "sum",
    "cat",
    "sun",
    "of",
    "to",
    "in",
    "is",
]


def write_data(folder: Path) -> None:
    """Write data sets of the columns that the notebook reads."""
    rng = random.Random(0)

    def text(least: int = 3) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 12)))

    sets: dict[str, list[dict[str, str]]] = {
        "sahil2801/CodeAlpaca-20k": [
            {"instruction": text(), "input": "", "output": f"def f(): return {n}"}
            for n in range(ROWS)
        ],
        "openai/gsm8k": [
            {"question": f"{n} + {n}?", "answer": f"{n} + {n} = {2 * n}"} for n in range(ROWS)
        ],
        "databricks/databricks-dolly-15k": [
            {"instruction": text(), "context": text(0), "response": text(), "category": "open_qa"}
            for _ in range(ROWS)
        ],
    }
    for name, rows in sets.items():
        place = folder / name
        place.mkdir(parents=True)
        (place / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    card = "configs:\n- config_name: main\n  data_files: train.jsonl\n"
    (folder / "openai/gsm8k/README.md").write_text(f"---\n{card}---\n")


def write_model(folder: Path) -> None:
    """Write a tiny model of the notebook's family, with a tokenizer of bytes."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from upit_merge.demo.training import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    tokenizer.save_pretrained(folder / MODEL)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / MODEL)


def environment(folder: Path) -> dict[str, str]:
    """Make an environment that sees what is installed in this one; return its variables."""
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    [site] = folder.glob("**/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in sys.path if "-packages" in path]
    (site / "installed.pth").write_text("\n".join(lines) + "\n")
    return {
        "PATH": os.pathsep.join([str(scripts), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def smaller(notebook: Any) -> Any:
    """Return the notebook with less to do.

    Raises:
        ValueError: it does not say what is to be changed, or says it twice.
    """
    for old, new in SMALLER.items():
        cells = [cell for cell in notebook.cells if old in cell.source]
        if len(cells) != 1:
            raise ValueError(f"{old!r} is in {len(cells)} cells of the notebook, expected one")
        cells[0].source = cells[0].source.replace(old, new)
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="new, or of an earlier run")
    folder = parser.parse_args().folder.absolute()

    import nbformat
    from nbclient import NotebookClient

    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_data(work)
    write_model(work)
    (work / "upit-merge").symlink_to(ROOT, target_is_directory=True)
    os.environ |= environment(folder / "environment")
    notebook = smaller(nbformat.read(NOTEBOOK, as_version=4))
    started: dict[int, float] = {}

    def begin(cell: Any, cell_index: int) -> None:
        started[cell_index] = time.perf_counter()

    def end(cell: Any, cell_index: int, **_: Any) -> None:
        if cell.cell_type == "code":
            seconds = time.perf_counter() - started[cell_index]
            title = notebook.cells[cell_index - 1].source.partition("\n")[0].lstrip("# ")
            print(f"{title}: {seconds:.0f} s", flush=True)

    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
        on_cell_start=begin,
        on_cell_executed=end,
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")


if __name__ == "__main__":
    main()
