#!/usr/bin/env bash
# Also as a notebook, colab.ipynb, which docs/generate.py makes of this file.
set -euo pipefail

# %% [markdown]
# # Checkpoints to a mixture of experts, on a small machine
#
# Fine-tunes a 0.6B model on three kinds of data, makes 8 experts of the checkpoints, fits a router,
# and measures what came out. Meant for 2 cores, 12 GB of RAM, 15 GB of GPU memory and 30 GB of disk;
# the sizes are from [hardware.md](hardware.md). It has not been run on such a machine as a whole:
# `python benchmarks/notebook.py` runs all of it on a tiny model, and it runs without a GPU, slowly.
#
# With checkpoints of your own, skip the training and name them in the recipe, or let `upit-merge init`
# write it.

# %% [markdown]
# ## Install
#
# From a clone, uploaded as the folder `upit-merge`. A torch that is there is kept.

# %%
pip install -q './upit-merge[train]'

# %% [markdown]
# ## Data
#
# Three public sets, one jsonl file each to train on; a few hundred samples of all three for the router,
# and others to measure with. Your own: columns `prompt` and `completion`, or `messages`, or `text`.

# %%
python - <<'PYTHON'
import json
from datasets import load_dataset

def code(row):
    return f"{row['instruction']}\n{row['input']}".strip(), row["output"]

def math(row):
    return row["question"], row["answer"]

def chat(row):
    return f"{row['context']}\n{row['instruction']}".strip(), row["response"]

SETS = {
    "code": (load_dataset("sahil2801/CodeAlpaca-20k", split="train"), code),
    "math": (load_dataset("openai/gsm8k", "main", split="train"), math),
    "chat": (load_dataset("databricks/databricks-dolly-15k", split="train"), chat),
}

def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

seed, held_out = [], []
for domain, (rows, parts) in SETS.items():
    rows = [dict(zip(("prompt", "completion"), parts(row))) for row in rows.shuffle(seed=0)]
    rows = [{**row, "domain": domain} for row in rows if row["prompt"] and row["completion"]]
    held_out += rows[:100]
    seed += rows[100:400]
    write(f"train-{domain}.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in rows[400:5000]])
write("seed.jsonl", seed)
write("held-out.jsonl", held_out)
PYTHON

# %% [markdown]
# ## Train
#
# One LoRA run per kind of data, two checkpoints each. The keys are those of `trl sft --config`. A GPU
# older than Ampere (a T4) has no bfloat16: hence `fp16`, which a CPU has not.

# %%
cat > finetune.yml <<'YAML'
model_name_or_path: Qwen/Qwen3-0.6B-Base
data: train-code.jsonl
output_dir: sft/code
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
learning_rate: 2.0e-4
max_steps: 250
save_steps: 125
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
max_length: 512
fp16: true
gradient_checkpointing: true
logging_steps: 25
report_to: none
YAML
on_cpu=$(python -c 'import torch; print("" if torch.cuda.is_available() else "--fp16 false --use_cpu true")')
for domain in code math chat; do
  upit-merge finetune finetune.yml --data "train-$domain.jsonl" --output_dir "sft/$domain" $on_cpu
done

# %% [markdown]
# ## Recipe
#
# Six adapters become experts as they are, two children are grown. The runs were apart, so the
# attention is their average.

# %%
cat > recipe.yml <<'YAML'
merge_method: upit
base_model: Qwen/Qwen3-0.6B-Base
models:
  - model: ./sft/code/checkpoint-*
  - model: ./sft/math/checkpoint-*
  - model: ./sft/chat/checkpoint-*
dtype: float16
parameters:
  num_experts: 8
  experts_per_token: 2
  backbone: average
  seed: 42
router:
  data: ./seed.jsonl
YAML

# %% [markdown]
# ## Is it worth it?
#
# How alike the checkpoints are, what the merge will need, and whether choosing among them would be
# better than the best dense model that can be made of them.

# %%
upit-merge plan recipe.yml out/ --data seed.jsonl --device auto

# %% [markdown]
# ## Merge
#
# If the machine goes away in between: the same command goes on, as long as the disk is there.

# %%
upit-merge run recipe.yml out/ --device auto

# %% [markdown]
# ## Measure
#
# Perplexity by kind of data, beside the best single expert and a router of shuffled buckets; what the
# router sends where is in `routing.png`.

# %%
upit-merge evaluate out/ --data held-out.jsonl --group-by domain --control --plot routing.png --device auto

# %% [markdown]
# ## Use it, publish it
#
# Log in first, with `hf auth login`.

# %%
python - <<'PYTHON'
from transformers import pipeline

generate = pipeline("text-generation", "out", dtype="auto", device_map="auto")
print(generate("Write a Python function that reverses a string.", max_new_tokens=80)[0]["generated_text"])
PYTHON
# hf upload my-name/my-moe out/
