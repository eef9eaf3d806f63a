#!/usr/bin/env bash
# A Gemma 4 config.json that transformers 5.24 has saved is read as another model by earlier ones.
#
# Version:   transformers 5.24.0 saves; 5.5.0, which knows Gemma 4 as well, reads.
# Behaviour: published configurations name the sizes of layers with full attention `global_head_dim`
#            and `num_global_key_value_heads`. 5.24.0 takes both, but keeps them by layer: what it
#            saves has `per_layer_config` instead, and no longer the two keys. 5.5.0 (as whatever else
#            reads the published keys) does not look there, and takes its defaults, 512 and the
#            `num_key_value_heads` of the other layers, without an error or a warning.
# Seen:      published, read by 5.5.0:               16 1
#            saved again by 5.24.0, read by 5.5.0:   512 None
# For users: a model that is loaded and saved (fine-tuned, merged, converted to another dtype) has
#            tensors that its own config.json gives other shapes by the published keys. Write both
#            keys back into config.json; 5.24.0 reads a file with both spellings.
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

for version in 5.24.0 5.5.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install -q "transformers==$version" 2>"$work/log" ||
    { cat "$work/log" >&2; exit 2; }
done

mkdir "$work/published"
cat >"$work/published/config.json" <<'JSON'
{
  "architectures": ["Gemma4ForCausalLM"],
  "model_type": "gemma4_text",
  "num_hidden_layers": 2,
  "layer_types": ["sliding_attention", "full_attention"],
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "attention_k_eq_v": true,
  "global_head_dim": 16,
  "num_global_key_value_heads": 1
}
JSON

"$work/5.24.0/bin/python" - "$work" <<'PYTHON'
import sys

from transformers import AutoConfig

work = sys.argv[1]
config = AutoConfig.from_pretrained(f"{work}/published")
layer = config.per_layer_config[1]
assert (layer.head_dim, layer.num_key_value_heads) == (16, 1)
config.save_pretrained(f"{work}/saved")
PYTHON

"$work/5.5.0/bin/python" - "$work" <<'PYTHON'
import sys

from transformers import AutoConfig

work, found = sys.argv[1], {}
for name in ("published", "saved"):
    config = AutoConfig.from_pretrained(f"{work}/{name}")
    found[name] = (config.global_head_dim, config.num_global_key_value_heads)
    print(f"{name}, read by 5.5.0:", *found[name])
sys.exit(found != {"published": (16, 1), "saved": (512, None)})
PYTHON
