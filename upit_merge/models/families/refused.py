"""Models that no format can express, and why: what they have that no published mixture has."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from upit_merge.errors import UpitError

_NO_GATE = "their FFN has no gate, as the experts of all formats have"
_POST_NORMS = "normalise what attention and FFN give"

# The reason of each `model_type`, as a clause of which the models are what is spoken of.
REFUSED: Mapping[str, str] = {
    "gemma": "their FFN has another activation and embeddings are scaled, which not every reader "
    "of the one format that has both (granitemoe) is known to compute",
    "gemma2": f"they cap attention scores and {_POST_NORMS}, and no format has both",
    "gemma3": f"they {_POST_NORMS}, and the one format that does too (gemma4) normalises the "
    "values of attention besides",
    "gemma3_text": f"they {_POST_NORMS}, and the one format that does too (gemma4) normalises the "
    "values of attention besides",
    "gemma3n": "they predict and correct four streams beside the one",
    "exaone4": f"they {_POST_NORMS}, and queries and keys head by head; no format does both",
    "exaone": "their tensors have names of their own (transformer.h), which are not translated yet",
    "glm": "their rotary embedding turns neighbouring dimensions, that of glm4_moe halves of a "
    "head; rows of queries and keys are not reordered yet",
    "glm4": f"they {_POST_NORMS}, which glm4_moe does not",
    "apertus": "their FFN has no gate, and an activation that is learned",
    "arcee": _NO_GATE,
    "nemotron": f"{_NO_GATE}, and their norms have biases",
    "olmo": "their norms have no weights",
    "olmo3": "some of their layers have a window and another rotary embedding; flex_olmo has "
    "neither",
    "phi": f"{_NO_GATE}; attention and FFN are side by side and have biases",
    "starcoder2": f"{_NO_GATE}, and has biases",
    "stablelm": "their norms have biases, and the weights of the experts of the one such format "
    "(phimoe) do not sum to 1",
    "gpt2": _NO_GATE,
    "gpt_neo": _NO_GATE,
    "gpt_neox": _NO_GATE,
    "gptj": _NO_GATE,
    "opt": _NO_GATE,
    "bloom": _NO_GATE,
    "falcon": _NO_GATE,
    "internlm3": "their FFN has biases",
    "mistral3": "they are a language model beside a vision tower; save the language model alone, "
    "as AutoModelForImageTextToText.from_pretrained(…).language_model",
}
# What is a mixture already; those that can be an output are known from the formats.
MIXTURES = frozenset(
    {
        "dbrx",
        "deepseek_v2",
        "deepseek_v3",
        "exaone_moe",
        "gpt_oss",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "jamba",
        "mellum",
        "minimax",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_next",
    }
)


def refusal(
    label: str, model_type: object, families: Sequence[str], outputs: Container[str]
) -> UpitError:
    """Return the error for a checkpoint of no family, with the reason if it is known.

    Args:
        label: The checkpoint's.
        families: All `model_type`s that there is a family for.
        outputs: Those that an output can have.
    """
    if str(model_type) in MIXTURES or str(model_type) in outputs:
        return UpitError(
            f"Checkpoint {label} has model_type {model_type!r}, a mixture of experts already; give "
            "dense checkpoints (upit-merge extend adds one to a mixture)."
        )
    if reason := REFUSED.get(str(model_type)):
        return UpitError(
            f"Checkpoint {label} has model_type {model_type!r}, of which no mixture can be made: "
            f"{reason}; docs/families.md has those of which one can."
        )
    return UpitError(
        f"Checkpoint {label} has model_type {model_type!r}; use {', '.join(families[:-1])} or "
        f"{families[-1]} checkpoints."
    )
