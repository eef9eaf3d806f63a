#!/usr/bin/env bash
# TRL's SFTTrainer cannot train a GraniteMoE with its load-balancing loss: it asks for another setting.
#
# Versions:  trl 1.16.0, transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: a GraniteMoeConfig has `output_router_logits` and a coefficient for the load-balancing
#            loss, so that SFTTrainer turns the loss on by itself. The forward pass that TRL then puts in
#            the place of the model's own reads `num_experts`, which Mixtral's configuration answers to
#            and GraniteMoE's (`num_local_experts`) does not. The model's own forward pass computes
#            that loss.
# Seen:      Mixtral: one step; GraniteMoE: AttributeError: 'GraniteMoeConfig' object has no attribute
#            'num_experts'; GraniteMoE's own forward pass: a loss and an aux_loss.
# For users: let the configuration answer to that name while it is trained, or train without the loss
#            (router_aux_loss_coef: 0).
#
# Needs Python 3.10 or newer with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install -q trl==1.16.0 transformers==5.24.0 torch==2.13.0 2>"$work/log" ||
  { cat "$work/log" >&2; exit 2; }

cd "$work"
cat >try.py <<'PYTHON'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    bos_token_id=0, eos_token_id=1, pad_token_id=2, router_aux_loss_coef=0.01,
)
words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{number}": number for number in range(3, 64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
)
data = Dataset.from_dict({"text": ["w3 w4 w5 w6 w7 w8"] * 4})
for model in (MixtralForCausalLM(MixtralConfig(**SIZES)), GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES))):
    settings = SFTConfig(output_dir="out", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    name = type(model.config).__name__
    try:
        SFTTrainer(model, settings, train_dataset=data, processing_class=fast).train()
        print(name, "one step")
    except AttributeError as error:
        print(name, "AttributeError:", str(error).splitlines()[0])
own = GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, output_router_logits=True))
ids = torch.tensor([[3, 4, 5, 6]])
found = own(input_ids=ids, labels=ids)
print("own forward pass", bool(found.loss.isfinite()), bool(torch.as_tensor(found.aux_loss) > 0))
PYTHON
"$python" try.py 2>"$work/log" | grep -v '^{' | tee seen || { cat "$work/log" >&2; exit 1; }
grep -q '^MixtralConfig one step$' seen
grep -q "^GraniteMoeConfig AttributeError: 'GraniteMoeConfig' object has no attribute 'num_experts'$" seen
grep -q '^own forward pass True True$' seen
