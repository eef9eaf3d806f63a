#!/usr/bin/env bash
# transformers 5 reads one and the same tokenizer.model in two ways, by the model_type beside it.
#
# Version:   transformers 5.24.0; 4.57.6 reads it in one way.
# Behaviour: a folder with a sentencepiece model (tokenizer.model, made with Llama 2's settings), no
#            tokenizer.json, and a tokenizer_config.json that names LlamaTokenizer, is read by
#            AutoTokenizer as LlamaTokenizer if config.json says llama or qwen3, and as TokenizersBackend
#            if it says mistral or mixtral. The two give different token ids for the same text, among
#            others at leading spaces and after special tokens.
# Seen:      " the fox", whose marks and words are 276 = a space, 263 = the, 276 272 299 = fox:
#            4.57.6: [1, 276, 263, 276, 272, 299] in all of them
#            5.24.0: [1, 263, 276, 272, 299]      beside llama and qwen3
#                    [1, 276, 263, 276, 272, 299] beside mistral and mixtral
# For users: moving a tokenizer.model from a Llama's folder into a Mixtral's (an upcycled model) silently
#            changes what the model reads. Load it in the old folder and save its tokenizer.json:
#            AutoTokenizer.from_pretrained(OLD).backend_tokenizer.save("NEW/tokenizer.json").
#
# Needs Python 3 with venv, and a package index. Exits with 1 if it is not as described.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install -q "transformers==$version" sentencepiece==0.2.1 \
    protobuf==6.33.0 2>"$work/log" || { cat "$work/log" >&2; exit 2; }
done

cat >"$work/make.py" <<'PYTHON'
import json, pathlib, sys
import sentencepiece

work = pathlib.Path(sys.argv[1])
line = "the capital of France is Paris and the quick brown fox"
(work / "text").write_text("\n".join(f"sample {i} {line}" for i in range(200)))
sentencepiece.SentencePieceTrainer.train(
    input=str(work / "text"), model_prefix=str(work / "m"), vocab_size=310, model_type="bpe",
    byte_fallback=True, hard_vocab_limit=False, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    normalization_rule_name="identity", remove_extra_whitespaces=False,
)
settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "add_bos_token": True}
for kind in ("llama", "qwen3", "mistral", "mixtral"):
    folder = work / kind
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((work / "m.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
PYTHON
"$work/5.24.0/bin/python" "$work/make.py" "$work"

cat >"$work/read.py" <<'PYTHON'
import pathlib, sys
from transformers import AutoTokenizer

work = pathlib.Path(sys.argv[1])
for kind in ("llama", "qwen3", "mistral", "mixtral"):
    tokenizer = AutoTokenizer.from_pretrained(work / kind)
    print(kind, type(tokenizer).__name__, tokenizer(" the fox")["input_ids"])
PYTHON
for version in 4.57.6 5.24.0; do
  echo "transformers $version"
  "$work/$version/bin/python" "$work/read.py" "$work" 2>/dev/null | tee "$work/seen-$version"
done

ways() { cut -d' ' -f3- "$work/seen-$1" | sort -u | wc -l; }
test "$(ways 4.57.6)" -eq 1 || { echo "expected one reading in 4.57.6" >&2; exit 1; }
test "$(ways 5.24.0)" -eq 2 || { echo "expected two readings in 5.24.0" >&2; exit 1; }
echo "as described: 4.57.6 gives the same ids whatever the model_type, 5.24.0 gives two"
