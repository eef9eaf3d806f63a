#!/usr/bin/env bash
# transformers 4 and 5 load one and the same checkpoint as two different models, if its config.json
# ties head and embeddings and its file has both.
#
# Version:   transformers 4.57.6, against 5.24.0; torch 2.13.0.
# Behaviour: `tie_word_embeddings: true` beside an `lm_head.weight` that differs from
#            `model.embed_tokens.weight` is what stays when an adapter that has trained both tables
#            (modules_to_save) is merged into a tied model. 5.24.0 compares the two tensors, warns,
#            and keeps the trained head. 4.57.6 says nothing and puts the embeddings in its place.
# Seen:      4.57.6: head == embeddings True, head == trained False, warned False
#            5.24.0: head == embeddings False, head == trained True, warned True
# For users: a model that is good where it was trained is worse wherever the older one reads it,
#            converters that pin it among them, without an error. Write `tie_word_embeddings: false`
#            into such a config.json: then both load the trained head.
#
# Needs Python 3.10 or later with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

cat >"$work/make.py" <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)).save_pretrained(sys.argv[1])
path = sys.argv[1] + "/model.safetensors"
tensors = load_file(path)
tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
save_file(tensors, path, metadata={"format": "pt"})
PYTHON

cat >"$work/read.py" <<'PYTHON'
import contextlib, io, logging, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

heard = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(heard))
with contextlib.redirect_stderr(io.StringIO()):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
trained = load_file(sys.argv[1] + "/model.safetensors")["lm_head.weight"]
head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
print(
    f"{transformers.__version__}: head == embeddings {torch.equal(head, embeddings)},",
    f"head == trained {torch.equal(head, trained)}, warned {'lm_head' in heard.getvalue()}",
)
PYTHON

for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install -q torch==2.13.0 "transformers==$version" 2>"$work/log" ||
    { cat "$work/log" >&2; exit 2; }
done
"$work/4.57.6/bin/python" "$work/make.py" "$work/model"

expect() { # version, what it prints
  seen=$("$work/$1/bin/python" "$work/read.py" "$work/model" 2>/dev/null)
  echo "$seen"
  test "$seen" = "$1: $2" || { echo "expected $1: $2" >&2; exit 1; }
}

expect 4.57.6 "head == embeddings True, head == trained False, warned False"
expect 5.24.0 "head == embeddings False, head == trained True, warned True"
echo "as described: 4.57.6 drops the trained head, 5.24.0 keeps it"
