"""Warnings of other libraries are for those who call them: no user of ours can act on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import build_family
from tests.support.lora import save_adapter

# All commands in one process, as a shell would start them; a warning is shown once per place.
DRIVER = """
import json, sys
from upit_merge.cli.main import main
for arguments in json.loads(sys.argv[1]):
    print("$", *arguments, file=sys.stderr, flush=True)
    main(arguments, standalone_mode=False)
"""


def test_no_library_warns(tmp_path: Path) -> None:
    # A sliding window takes the other one of transformers' two ways to a mask.
    family = build_family(tmp_path / "llama")
    windowed = build_family(tmp_path / "mistral", kind="mistral", count=2, sliding_window=8)
    save_adapter(family.base, tmp_path / "lora")
    data, out, other = str(family.seed_file()), str(tmp_path / "out"), str(tmp_path / "other")
    router = {"data": data}
    recipe = str(family.write_recipe(family.recipe(router=router)))
    rival = f"{family.base}+{tmp_path / 'lora'}"
    commands = [
        ["plan", recipe, "--data", data],
        ["run", recipe, out, "--quiet"],
        ["run", str(windowed.write_recipe(windowed.recipe(router=router))), other],
        ["verify", out],
        ["evaluate", other, "--data", data],
        ["evaluate", out, "--data", data, "--control", "--against", rival],
        ["router", out, "--data", data, "--objective", "softmax", "--refine-steps", "1"],
        ["router", out, "--data", data, "--objective", "upit"],
        ["shrink", out, "--experts", "2", "--data", data],
        ["extend", out, "--model", str(family.checkpoints[0]), "--data", data],
        # Last: what it silences stays silent in its process.
        *(["finetune", str(path)] for path in trainings(tmp_path, str(family.base), out, data)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Python's own word for it, then what loggers of transformers and torch say.
    said = (done.stdout + done.stderr).replace("\r", "\n").splitlines()
    assert not [line for line in said if "Warning" in line or "deprecated" in line]
    assert not [line for line in said if line.startswith(("[transformers]", "[rank"))]
    # bitsandbytes, of a kernel on the Hub, where the CPU has AVX512-BF16.
    assert not [line for line in said if "kernels-community" in line]


def trainings(folder: Path, dense: str, mixture: str, data: str) -> list[Path]:
    """A dense model's, an adapter's and a mixture's, of two steps each."""
    written = []
    for name, model, extra in [
        ("dense", dense, {}),
        ("adapter", dense, {"use_peft": True, "lora_target_modules": ["q_proj"]}),
        ("mixture", mixture, {}),
    ]:
        document = {
            "model_name_or_path": model,
            "output_dir": str(folder / name),
            "data": data,
            "max_steps": 2,
            "save_steps": 1,
            "max_length": 32,
            **extra,
        }
        written.append(folder / f"{name}.yml")
        written[-1].write_text(yaml.safe_dump(document))
    return written
