#!/usr/bin/env bash
# How experts are multiplied cannot be told in the part of a larger model's config.json.
#
# Version:   transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: "experts_implementation" in config.json decides how a mixture's experts are multiplied.
#            Of a model of several parts (Qwen3.5) whose text part is the mixture it is read from the
#            top of the file only: in text_config, where all else about the experts is, it is
#            replaced by the default without a word. The text part's own config.json, read alone,
#            heeds it.
# Seen:      Qwen3_5MoeForCausalLM, in text_config: grouped_mm
#            Qwen3_5MoeForCausalLM, at the top: eager
#            Qwen3_5MoeForCausalLM, in both: eager
#            the text part alone: eager
# For users: write it at the top, and in text_config too if that part is taken out.
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

cat >"$work/parts.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

KEY = {"experts_implementation": "eager"}
TEXT = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 48,
    "num_experts": 2,
    "num_experts_per_tok": 2,
}


def implementation(settings):
    folder = Path(sys.argv[1]) / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    (experts,) = {
        module.config._experts_implementation
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }
    return type(model).__name__, experts


whole = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
for where, settings in {
    "in text_config": {**whole, "text_config": TEXT | KEY},
    "at the top": {**whole, **KEY, "text_config": TEXT},
    "in both": {**whole, **KEY, "text_config": TEXT | KEY},
}.items():
    name, experts = implementation(settings)
    print(f"{name}, {where}: {experts}")
print(f"the text part alone: {implementation(TEXT | KEY)[1]}")
PYTHON

"$python" "$work/parts.py" "$work" 2>"$work/err" | tee "$work/seen"
sed -n '/^# Seen: /,/^# For users/p' "$0" | sed '$d' | sed 's/^# Seen: *//; s/^# *//' >"$work/expected"
diff "$work/expected" "$work/seen" || { cat "$work/err" >&2; exit 1; }
echo "as described"
