#!/usr/bin/env bash
# A mixture whose experts are no multiple of 8 wide cannot be run by transformers as it is saved.
#
# Version:   transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: transformers makes and saves a Mixtral in bfloat16 with experts of any width, and loads
#            it again, but its first pass ends in torch's error about strides: the grouped product,
#            which is what it takes unless told otherwise, wants rows of a multiple of 16 bytes. The
#            same model with a loop over the experts, or with a batched product, computes. Dense
#            models of such widths, as those whose FFNs were pruned, run everywhere.
# Seen:      48 wide: as it is: runs; eager: runs; batched_mm: runs
#            44 wide: as it is: RuntimeError; eager: runs; batched_mm: runs
#            44 wide, with the key in config.json: as it is: runs
# For users: "experts_implementation": "eager" in config.json, which transformers does not write by
#            itself, or as an argument of from_pretrained.
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q torch==2.13.0 transformers==5.24.0 numpy \
  2>"$work/log" || { cat "$work/log" >&2; exit 2; }

cat >"$work/widths.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

root = Path(sys.argv[1])


def outcome(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    try:
        model(input_ids=torch.arange(10)[None])
    except RuntimeError as error:
        assert "multiple of 16 bytes" in str(error), error
        return "RuntimeError"
    return "runs"


for width in (48, 44):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    folder = root / str(width)
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    told = {"as it is": outcome(folder)}
    for way in ("eager", "batched_mm"):
        told[way] = outcome(folder, experts_implementation=way)
    print(f"{width} wide: {'; '.join(f'{way}: {how}' for way, how in told.items())}")
settings = json.loads((folder / "config.json").read_text())
assert "experts_implementation" not in settings
(folder / "config.json").write_text(json.dumps(settings | {"experts_implementation": "eager"}))
print(f"{width} wide, with the key in config.json: as it is: {outcome(folder)}")
PYTHON

"$python" "$work/widths.py" "$work" 2>"$work/err" | tee "$work/seen"
sed -n '/^# Seen: /,/^# For users/p' "$0" | sed '$d' | sed 's/^# Seen: *//; s/^# *//' >"$work/expected"
diff "$work/expected" "$work/seen" || { cat "$work/err" >&2; exit 1; }
echo "as described"
