"""LoRA on a dense model whose chat template, another model's, brings tokens along.

TRL makes the rows of new tokens trainable, and beside them the whole head. Where the head is the
embeddings PEFT cannot do both: there the rows alone are trained, which are the head's too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from upit_merge.errors import UpitError
from upit_merge.training.settings import FinetuneJob

_TEMPLATE_FILES = (".jinja", ".j2")
_MULTIPLE = 64  # to which TRL fills up the embeddings


def takes_template_of_model(training: Any) -> bool:
    """Return whether `chat_template_path` names a model, whose tokens are added then."""
    path = training.chat_template_path
    return path is not None and not (Path(path).is_file() and path.endswith(_TEMPLATE_FILES))


def vocabulary_with_template(tokenizer_folder: Path, template: str) -> int:
    """Return the size that TRL gives the embeddings for another model's chat template."""
    from transformers import AutoTokenizer

    own = {*AutoTokenizer.from_pretrained(tokenizer_folder).get_vocab()}
    others = AutoTokenizer.from_pretrained(template).added_tokens_decoder.values()
    size = len(own | {token.content for token in others})
    return math.ceil(size / _MULTIPLE) * _MULTIPLE


def model_with_tokens(
    job: FinetuneJob, source: str, tokenizer: Any, lora: Any, quantization: Any
) -> Any | None:
    """Load a model whose head is its embeddings, add the template's tokens, and make them trained.

    Args:
        source: The folder it is loaded from.
        tokenizer: Gets the template and the tokens.
        lora: PEFT's configuration, which is told of the rows that are trained.
        quantization: transformers' configuration, if it is quantised.

    Returns:
        The model; None if TRL can do it itself.

    Raises:
        UpitError: the head alone would be trained whole, which PEFT cannot do beside its rows.
    """
    from transformers import AutoConfig
    from trl import clone_chat_template
    from trl.trainer.utils import create_model_from_path

    if lora is None or not takes_template_of_model(job.training):
        return None
    whole = {name.rpartition(".")[2] for name in lora.modules_to_save or []}
    is_tied = bool(AutoConfig.from_pretrained(source).tie_word_embeddings)
    if not is_tied and "embed_tokens" not in whole:
        return None
    model = create_model_from_path(
        source, **(job.training.model_init_kwargs or {}), quantization_config=quantization
    )
    template = job.training.chat_template_path
    model, _tokenizer, added = clone_chat_template(model, tokenizer, template)
    if added and "embed_tokens" not in whole:
        if "lm_head" in whole:
            raise UpitError(
                "lora_modules_to_save has lm_head, but the chat template adds tokens, whose rows "
                "are the head's too in this model; remove it, or add embed_tokens to train both "
                "tables whole."
            )
        lora.trainable_token_indices = {"embed_tokens": added}
    return model


def complete_head(model: Any) -> None:
    """Give a head with trained rows the `bias` that TRL's loss looks for: none.

    PEFT's wrapper of the head shows its weight, rows replaced, and nothing else of it.
    """
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None
