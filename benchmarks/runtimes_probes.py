"""What one reader makes of a model: ids, logprobs, greedy tokens, a chat. Run by benchmarks/runtimes.py.

python runtimes_probes.py READER MODEL JOB.json OUT.json

Runs inside the reader's own environment, so nothing of ours is imported and each library where it
is used. What fails is reported by its name, and the rest is tried all the same. The JOB has the text, the turns of a
chat, the text's token ids and the tokens that follow it in the reference (none, for the reference
itself). Logprobs are those of every token of the vocabulary after each of these ids, (positions,
vocabulary) float32 in OUT.npy, where the reader gives them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NEW_TOKENS = 16
CHAT_TOKENS = 24  # at most; the reference ends its turn before that
CONTEXT = 256
MANY = 1000  # logprobs of a position, where all of them take minutes


class Findings:
    """What was found so far, written after each step: a reader may take the process with it."""

    def __init__(self, job: dict[str, Any], path: Path) -> None:
        self.job, self.path = job, path
        self.found: dict[str, Any] = {"errors": {}}

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """Keep what a step returns, or why there is none."""
        try:
            value = make()
        except BaseException as error:  # Rust's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            self.found["errors"][name] = described(error)
            value = None
        else:
            if value is not None:
                self.keep(name, value)
        self.path.write_text(json.dumps(self.found))
        return value

    def keep(self, name: str, value: Any) -> None:
        if name == "logprobs":
            import numpy

            numpy.save(self.path.with_suffix(".npy"), value.astype("float32"))
        else:
            self.found[name] = value

    @property
    def ids(self) -> list[int]:
        """Of the text: the reference's, for comparing models; how others read it is a step."""
        return self.job["ids"] or self.found["ids"]

    @property
    def all_ids(self) -> list[int]:
        """The text's ids and the reference's tokens."""
        return self.ids + (self.job["tokens"] or self.found["tokens"])


def described(error: BaseException) -> str:
    """Return an error on one line, without the frames that Rust's have."""
    text = re.split(r"Stack backtrace|\n\s*\d+: ", str(error))[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"[:600]


def log_softmax(logits: Any) -> Any:
    """Of (positions, vocabulary), in float64: no reader's own rounding is added to."""
    import numpy

    logits = numpy.asarray(logits, "float64")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))


def transformers(folder: str, findings: Findings) -> None:
    import torch
    import transformers as library
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    findings.keep("version", library.__version__)
    loaded: dict[str, Any] = {}

    def load() -> None:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        amiss = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if amiss:
            raise ValueError(f"{len(amiss)} tensors amiss, {amiss[0]} first")
        loaded["model"] = model.eval()

    def greedy(ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        made = loaded["model"].generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
        )
        return made[0, len(ids) :].tolist()

    def endless() -> list[int]:
        settings = loaded["model"].generation_config
        ends, settings.eos_token_id = settings.eos_token_id, None
        try:
            return greedy(findings.ids, NEW_TOKENS)
        finally:
            settings.eos_token_id = ends

    def logprobs() -> Any:
        with torch.no_grad():
            logits = loaded["model"](torch.tensor([findings.all_ids]), use_cache=False).logits[0]
        return log_softmax(logits.numpy())

    def chat() -> dict[str, Any]:
        tokenizer = loaded["tokenizer"]
        turns = findings.job["turns"]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = greedy(ids, CHAT_TOKENS)
        ends = ends_of(loaded["model"].generation_config.eos_token_id)
        stopped = tokens[-1] in ends
        said = tokens[:-1] if stopped else tokens
        with torch.no_grad():
            logits = loaded["model"](torch.tensor([ids + tokens]), use_cache=False).logits[0]
        rows = log_softmax(logits[len(ids) - 1 : -1].numpy())
        return {
            "ids": ids,
            "text": tokenizer.decode(said),
            "stopped": stopped,
            "tokens": tokens,
            "logprobs": [float(row[token]) for row, token in zip(rows, tokens, strict=True)],
        }

    def read_tokenizer() -> list[int]:
        loaded["tokenizer"] = AutoTokenizer.from_pretrained(folder)
        return loaded["tokenizer"](findings.job["text"])["input_ids"]

    findings.step("ids", read_tokenizer)
    findings.step("load", load)
    findings.step("tokens", endless)
    findings.step(
        "pieces", lambda: [loaded["tokenizer"].decode([i]) for i in findings.found["tokens"]]
    )
    findings.step("logprobs", logprobs)
    findings.step("eos", lambda: ends_of(loaded["model"].generation_config.eos_token_id))
    findings.step("chat", chat)


def ends_of(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return sorted(value) if isinstance(value, list) else [value]


def llama_cpp(gguf: str, findings: Findings) -> None:
    import ctypes

    if libraries := os.environ.get("LLAMA_CPP_LIB_PATH"):  # a prebuilt one finds no CPU by itself
        [ggml] = Path(libraries).glob("libggml.v*.so")
        ctypes.CDLL(str(ggml)).ggml_backend_load_all_from_path(libraries.encode())
    import llama_cpp as library
    import numpy

    findings.keep("version", os.environ.get("LLAMA_CPP_VERSION", library.__version__))
    loaded: dict[str, Any] = {}

    def load() -> None:
        loaded["model"] = library.Llama(
            gguf,
            n_ctx=CONTEXT,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
            type_k=0,  # float32: the cache is float16 by default
            type_v=0,
        )

    def logprobs() -> Any:
        model = loaded["model"]
        model.reset()
        model.eval(findings.all_ids)
        return log_softmax(model.scores[: len(findings.all_ids)])

    def greedy() -> list[int]:
        model = loaded["model"]
        model.reset()
        made, ids = [], findings.ids
        while len(made) < NEW_TOKENS:
            model.eval(ids)
            made.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
            ids = made[-1:]
        return made

    def eos() -> list[int]:
        vocabulary = library.llama_model_get_vocab(loaded["model"].model)
        count = library.llama_vocab_n_tokens(vocabulary)
        return [i for i in range(count) if library.llama_vocab_is_eog(vocabulary, i)]

    def chat() -> dict[str, Any]:
        model = loaded["model"]
        turns = findings.job["turns"]
        made = model.create_chat_completion(
            turns, max_tokens=CHAT_TOKENS, temperature=0.0, repeat_penalty=1.0
        )
        [choice] = made["choices"]
        return {
            "count": made["usage"]["prompt_tokens"],
            "text": choice["message"]["content"],
            "stopped": choice["finish_reason"] == "stop",
        }

    findings.step("load", load)
    findings.step(
        "ids", lambda: loaded["model"].tokenize(findings.job["text"].encode(), special=True)
    )
    findings.step("tokens", greedy)
    findings.step("logprobs", logprobs)
    findings.step("eos", eos)
    findings.step("chat", chat)


def vllm(folder: str, findings: Findings) -> None:
    import vllm as library

    findings.keep("version", library.__version__)
    loaded: dict[str, Any] = {}

    def load() -> None:
        loaded["model"] = library.LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=CONTEXT,
            max_num_seqs=2,
            max_logprobs=-1,
            limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
            enable_prefix_caching=False,
        )

    def ask(ids: list[int], **options: Any) -> Any:
        parameters = library.SamplingParams(temperature=0.0, **options)
        prompt = {"prompt_token_ids": ids}
        return loaded["model"].generate([prompt], parameters, use_tqdm=False)[0]

    def logprobs() -> Any:
        """Of the likeliest tokens, not a number for others, and of all but the last position."""
        import numpy

        answer = ask(findings.all_ids, max_tokens=1, prompt_logprobs=MANY, detokenize=False)
        rows = answer.prompt_logprobs[1:]
        made = numpy.full((len(rows), 1 + max(map(max, rows))), numpy.nan)
        for row, given in zip(made, rows, strict=True):
            for token, entry in given.items():
                row[token] = entry.logprob
        return made

    def tokens() -> list[int]:
        answer = ask(findings.ids, max_tokens=NEW_TOKENS, ignore_eos=True)
        return list(answer.outputs[0].token_ids)

    def chat() -> dict[str, Any]:
        parameters = library.SamplingParams(temperature=0.0, max_tokens=CHAT_TOKENS)
        [answer] = loaded["model"].chat(findings.job["turns"], parameters, use_tqdm=False)
        [made] = answer.outputs
        stopped = made.finish_reason == "stop"
        return {"ids": list(answer.prompt_token_ids), "text": made.text, "stopped": stopped}

    def eos() -> list[int]:
        parameters = loaded["model"].get_default_sampling_params()
        own = loaded["model"].get_tokenizer().eos_token_id
        return sorted({own, *(parameters.stop_token_ids or ())})

    findings.step("load", load)
    findings.step("ids", lambda: loaded["model"].get_tokenizer()(findings.job["text"])["input_ids"])
    findings.step("tokens", tokens)
    findings.step("logprobs", logprobs)
    findings.step("eos", eos)
    findings.step("chat", chat)


def mlx(folder: str, findings: Findings) -> None:
    import importlib.metadata

    import mlx.core
    import mlx_lm
    import numpy
    from mlx_lm.generate import generate_step

    versions = [importlib.metadata.version(name) for name in ("mlx-lm", "mlx")]
    findings.keep("version", f"{versions[0]} on mlx {versions[1]}")
    loaded: dict[str, Any] = {}

    def load() -> None:
        loaded["model"], loaded["tokenizer"] = mlx_lm.load(folder)

    def logprobs() -> Any:
        logits = loaded["model"](mlx.core.array([findings.all_ids]))
        return log_softmax(numpy.array(logits.astype(mlx.core.float32))[0])

    def greedy() -> list[int]:
        given = mlx.core.array(findings.ids)
        made: Iterable[tuple[int, Any]] = generate_step(
            given, loaded["model"], max_tokens=NEW_TOKENS
        )
        return [int(token) for token, _logprobs in made]

    def chat() -> dict[str, Any]:
        tokenizer = loaded["tokenizer"]
        ids = tokenizer.apply_chat_template(findings.job["turns"], add_generation_prompt=True)
        made = list(mlx_lm.stream_generate(loaded["model"], tokenizer, ids, CHAT_TOKENS))
        text = "".join(piece.text for piece in made)
        return {"ids": list(ids), "text": text, "stopped": made[-1].finish_reason == "stop"}

    findings.step("load", load)
    findings.step("ids", lambda: loaded["tokenizer"].encode(findings.job["text"]))
    findings.step("tokens", greedy)
    findings.step("logprobs", logprobs)
    findings.step("eos", lambda: sorted(loaded["tokenizer"].eos_token_ids))
    findings.step("chat", chat)


def mistralrs(folder: str, findings: Findings) -> None:
    import importlib.metadata

    import mistralrs as library

    findings.keep("version", importlib.metadata.version("mistralrs"))
    loaded: dict[str, Any] = {}

    def load() -> None:
        settings = {"model_id": folder, "dtype": library.ModelDType.F32}
        kinds = library.Which.Plain, library.Which.MultimodalPlain
        config = json.loads(Path(folder, "config.json").read_text())
        which = kinds["text_config" in config](**settings)
        loaded["model"] = library.Runner(which=which, token_source="none")

    def said() -> str:
        """It tells no ids of tokens here, and no logprobs."""
        request = library.CompletionRequest(
            prompt=findings.job["text"],
            model="default",
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            ignore_eos=True,
        )
        return loaded["model"].send_completion_request(request).choices[0].text

    def chat() -> dict[str, Any]:
        request = library.ChatCompletionRequest(
            messages=findings.job["turns"],
            model="default",
            max_tokens=CHAT_TOKENS,
            temperature=0.0,
            logprobs=True,
            top_logprobs=1,
        )
        made = loaded["model"].send_chat_completion_request(request)
        [choice] = made.choices
        entries = choice.logprobs.content
        return {
            "text": choice.message.content,
            "stopped": choice.finish_reason == "stop",
            "count": made.usage.prompt_tokens,
            "tokens": [entry.top_logprobs[0].token for entry in entries],
            "logprobs": [entry.logprob for entry in entries],
        }

    findings.step("load", load)
    findings.step("said", said)
    findings.step("chat", chat)


READERS = {
    "transformers": transformers,
    "transformers4": transformers,
    "llama.cpp": llama_cpp,
    "llama.cpp-q8_0": llama_cpp,
    "vllm": vllm,
    "mlx": mlx,
    "mistralrs": mistralrs,
}


if __name__ == "__main__":
    reader, model, job, out = sys.argv[1:]
    READERS[reader](model, Findings(json.loads(Path(job).read_text()), Path(out)))
