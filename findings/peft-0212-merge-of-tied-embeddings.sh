#!/usr/bin/env bash
# PEFT 0.21.2 merges LoRA on tied embeddings twice, with ensure_weight_tying too.
#
# Version:   PEFT 0.21.2, transformers 5.24.0, torch 2.13.0.
# Behaviour: where head and embeddings are one tensor (tie_word_embeddings), LoRA on embed_tokens
#            with ensure_weight_tying=True puts the same factors on both, as documented, and the
#            model computes table + delta in both places. merge_and_unload adds the delta to the
#            one tensor once for each: the merged model has table + 2 * delta. Without
#            ensure_weight_tying the adapter's model has a head without the delta, the merged
#            one with it. Both merges warn only that there "can be complications".
# Seen:      ensure_weight_tying=True: merged = table + 2.00 * delta, logits differ
#            ensure_weight_tying=False: merged head = table + 1.00 * delta, logits differ
# For users: load the base with tie_word_embeddings=False and give its head a copy of the
#            embeddings before the adapter is loaded; that merges right.
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 \
  2>"$work/log" || { cat "$work/log" >&2; exit 2; }

cat >"$work/merge.py" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
ensure = sys.argv[1] == "True"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, tie_word_embeddings=True,
)
base = LlamaForCausalLM(config)
table = base.model.embed_tokens.weight.detach().clone()
lora = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=ensure)
model = get_peft_model(base, lora).eval()
layer = model.get_input_embeddings()
torch.nn.init.normal_(layer.lora_embedding_B["default"])
torch.nn.init.normal_(layer.lora_embedding_A["default"])
if ensure:  # the head's are made when it is wrapped
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.lora_A["default"].weight.copy_(layer.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(layer.lora_embedding_A["default"].T)
delta = layer.get_delta_weight("default").detach()
ids = torch.arange(10)[None]
with torch.no_grad():
    before = model(ids).logits
    merged = model.merge_and_unload()
    after = merged(ids).logits
share = ((merged.lm_head.weight - table) * delta).sum() / delta.square().sum()
print(f"{share.item():.2f}", "logits differ" if (after - before).abs().max() > 1 else "logits equal")
PYTHON

expect() { # ensure_weight_tying, what it prints
  seen=$("$python" "$work/merge.py" "$1" 2>"$work/log") || { cat "$work/log" >&2; exit 2; }
  echo "ensure_weight_tying=$1: $seen"
  test "$seen" = "$2" || { echo "expected $2" >&2; exit 1; }
}

expect True "2.00 logits differ"
expect False "1.00 logits differ"
echo "as described: merging LoRA on tied embeddings changes the model"
