#!/usr/bin/env bash
# A mixture trained with bf16 (autocast) multiplies its experts in float32, and nothing says so.
#
# Version:   transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: transformers multiplies all experts of a layer by torch.nn.functional.grouped_mm unless
#            told otherwise. torch's autocast has no rule for that function, on any device, so that
#            under it experts with float32 weights (TRL's default) are multiplied in float32, while
#            attention, head and router are in bfloat16. Experts are most of a mixture. The two other
#            ways (a loop of linear layers, a batched product) are of functions that autocast knows.
# Seen:      default is grouped_mm
#            grouped_mm: experts in torch.float32, everything else in torch.bfloat16
#            batched_mm: experts in torch.bfloat16, everything else in torch.bfloat16
#            eager: experts in torch.bfloat16, everything else in torch.bfloat16
# For users: of a trainer with bf16 or fp16, either load the weights in that dtype, or set
#            experts_implementation; a step of training on a CPU with bfloat16 instructions took 1.7
#            times as long as with experts in bfloat16.
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

cat >"$work/products.py" <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM

WIDTH = 48  # of an expert, and of nothing else


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products, below autocast."""

    def __init__(self):
        super().__init__()
        self.seen = {"experts": set(), "everything else": set()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2]
        if name in ("mm", "bmm", "addmm", "_grouped_mm"):
            left, right = [a for a in args if isinstance(a, torch.Tensor) and a.ndim > 1][-2:]
            of_experts = {WIDTH, 2 * WIDTH} & {*left.shape, *right.shape}
            self.seen["experts" if of_experts else "everything else"].add(str(left.dtype))
        return function(*args, **(kwargs or {}))


config = MixtralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=2,
    attn_implementation="eager",
)
model = MixtralForCausalLM(config)
print("default is", model.config._experts_implementation)
for way in ("grouped_mm", "batched_mm", "eager"):
    model.set_experts_implementation(way)
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.arange(10)[None], use_cache=False)
    told = [f"{what} in {' and '.join(sorted(kinds))}" for what, kinds in products.seen.items()]
    print(f"{way}: {', '.join(told)}")
PYTHON

"$python" "$work/products.py" 2>"$work/err" | tee "$work/seen"
sed -n '/^# Seen: /,/^# For users/p' "$0" | sed '$d' | sed 's/^# Seen: *//; s/^# *//' >"$work/expected"
diff "$work/expected" "$work/seen" || { cat "$work/err" >&2; exit 1; }
echo "as described"
