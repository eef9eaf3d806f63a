#!/usr/bin/env bash
# accelerate 1.15.0 says fp16 and computes in float32 where there is no GPU, without a word.
#
# Version:   accelerate 1.15.0, torch 2.13.0 (CPU).
# Behaviour: with mixed_precision="fp16" on a CPU no autocast is entered and no warning given, but
#            Accelerator.mixed_precision, and what a trainer writes into its settings and cards,
#            still is "fp16". "bf16" on the same CPU is honoured. So a run with fp16 takes the
#            memory and time of float32, and its numbers are not those of the same settings on a
#            GPU; torch itself can autocast to float16 on a CPU.
# Seen:      fp16: mixed_precision is fp16, matrix products in torch.float32, 0 warnings
#            bf16: mixed_precision is bf16, matrix products in torch.bfloat16, 0 warnings
# For users: on a CPU leave fp16 out; bf16 is computed as asked (slowly, where the processor has
#            no instructions for it).
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q torch==2.13.0 accelerate==1.15.0 numpy \
  2>"$work/log" || { cat "$work/log" >&2; exit 2; }

cat >"$work/products.py" <<'PYTHON'
import sys
import warnings

import torch
from accelerate import Accelerator

mode = sys.argv[1]
seen = []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, mixed_precision=mode)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    # Of the layer inside: what leaves the whole model is turned into float32 in any case.
    model[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    accelerator.prepare(model)(torch.ones(1, 4))
told = [w for w in told if "fp16" in str(w.message) or "float16" in str(w.message)]
print(
    f"{mode}: mixed_precision is {accelerator.mixed_precision}, "
    f"matrix products in {seen[0]}, {len(told)} warnings"
)
PYTHON

{
  "$python" "$work/products.py" fp16
  "$python" "$work/products.py" bf16
} 2>"$work/err" | tee "$work/seen"
sed -n 's/^# Seen: *//p; s/^#            \(bf16: .*\)/\1/p' "$0" >"$work/expected"
diff "$work/expected" "$work/seen" || { cat "$work/err"; exit 1; }
echo "as described"
