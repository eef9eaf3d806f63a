"""Seed examples as token ids: chat templates, where the loss starts, what had to be cut."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upit_merge.data.conversations import Messages
from upit_merge.data.records import SeedExample
from upit_merge.errors import UpitError, counted, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids, and where the loss starts.

    `loss_start` (at least 1: nothing predicts the first token) is the index of the first token
    whose prediction counts in the loss; for prompt and completion, the first completion token.
    `label` is the example's.
    """

    input_ids: list[int]
    loss_start: int
    source: str
    label: str | int | None = None

    @property
    def num_targets(self) -> int:
        """How many tokens count in the loss."""
        return len(self.input_ids) - self.loss_start

    def digest(self) -> bytes:
        """Return SHA-256 of what the sample is: tokens, where the loss starts, label."""
        numbers = array("q", [self.loss_start, *self.input_ids])
        return hashlib.sha256(numbers.tobytes() + repr(self.label).encode()).digest()

    @property
    def halves(self) -> tuple[int, int]:
        """How many of them are in the first and in the second half."""
        return self.num_targets // 2, self.num_targets - self.num_targets // 2


@dataclass(frozen=True)
class SeedSet:
    """The tokenized seed data, and what was cut on the way.

    `truncated` counts the kept samples that were cut to `max_length` tokens, `tokens_cut` the
    tokens they lost; `too_short` and `prompt_too_long` count the samples left out because
    nothing remained to predict, `repeated` those that are an earlier one once more: no second
    observation, so that a standard error that counted them would be too small, and what is held out
    would be known. `readings` tells how records were read whose columns do not say it.
    """

    samples: list[TokenizedSample]
    max_length: int
    truncated: int = 0
    tokens_cut: int = 0
    too_short: int = 0
    prompt_too_long: int = 0
    repeated: int = 0
    readings: tuple[str, ...] = ()

    @property
    def num_targets(self) -> int:
        """How many tokens of all samples count in the loss."""
        return sum(sample.num_targets for sample in self.samples)

    def digest(self) -> str:
        """Return SHA-256 of what the samples are: tokens, where the loss starts, labels."""
        content = [(s.input_ids, s.loss_start, s.label) for s in self.samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def summary(self, name: str = "Seed data") -> str:
        """Return what there is and what was cut, in one sentence for the log."""
        kept = (
            f"{counted(len(self.samples), 'sample')}, {counted(self.num_targets, 'target token')}"
        )
        return f"{name}: {'; '.join([kept, *self.readings, *self._what_was_cut()])}."

    def to_report(self) -> dict[str, int]:
        """Return the same as plain numbers, for `upit_report.json`."""
        return {
            "samples": len(self.samples),
            "tokens": sum(len(sample.input_ids) for sample in self.samples),
            "target_tokens": self.num_targets,
            "max_length": self.max_length,
            "truncated_samples": self.truncated,
            "tokens_cut": self.tokens_cut,
            "dropped_too_short": self.too_short,
            "dropped_prompt_too_long": self.prompt_too_long,
            "dropped_repeated": self.repeated,
        }

    def _what_was_cut(self) -> list[str]:
        limit = f"{self.max_length} tokens"
        counts = {
            f"cut to {limit} ({counted(self.tokens_cut, 'token')} lost)": self.truncated,
            "dropped as too short": self.too_short,
            f"dropped because the prompt alone fills {limit}": self.prompt_too_long,
            "dropped as the same as an earlier one": self.repeated,
        }
        return [f"{counted(number, 'sample')} {what}" for what, number in counts.items() if number]


def tokenize_seed_data(
    examples: Sequence[SeedExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int,
    vocab_size: int,
    shortest: int = 2,
    prompts: str | None = None,
) -> SeedSet:
    """Turn examples into token ids of at most `min(max_length, context)` tokens; cuts the end.

    Args:
        context: the model's own limit (`max_position_embeddings`).
        vocab_size: rows of the model's embedding; every token id must be below it.
        shortest: tokens that a sample must have: one alone has nothing to predict.
        prompts: what messages call them, if all examples are prompts of a user's own.

    Raises:
        UpitError: a conversation without (or against) the chat template, a token id that the
            model does not have, or no sample left.
    """
    max_length = min(max_length, context)
    if max_length < 2:
        raise UpitError(
            f"`max_length` is {max_length}; give 2 or more, one token predicts the next."
        )
    samples: list[TokenizedSample] = []
    seen: set[bytes] = set()
    truncated = tokens_cut = too_short = prompt_too_long = repeated = 0
    for example in with_known_calls(examples, tokenizer):
        input_ids, loss_start = _encode(example, tokenizer)
        if len(input_ids) < loss_start + shortest - 1:
            too_short += 1
            continue
        if loss_start >= max_length:
            prompt_too_long += 1
            continue
        kept = input_ids[:max_length]
        if max(kept) >= vocab_size:
            raise UpitError(
                f"{example.source} gives the token id {max(kept)}, but the model's vocabulary has "
                f"{vocab_size} entries (the tokenizer has {len(tokenizer)}); use the tokenizer "
                "that belongs to the checkpoints."
            )
        sample = TokenizedSample(kept, loss_start, example.source, example.label)
        if (content := sample.digest()) in seen:
            repeated += 1
            continue
        seen.add(content)
        samples.append(sample)
        if len(input_ids) > max_length:
            truncated += 1
            tokens_cut += len(input_ids) - max_length
    has_template = bool(tokenizer.chat_template)
    seed_set = SeedSet(
        samples,
        max_length,
        truncated,
        tokens_cut,
        too_short,
        prompt_too_long,
        repeated,
        readings(examples, has_template=has_template),
    )
    if not samples:
        why = "; ".join(seed_set._what_was_cut()) or "there was none to begin with"
        if prompts is not None:
            raise UpitError(
                f"No prompt of {prompts} is left ({why}); give longer ones or raise `max_length`."
            )
        raise UpitError(
            f"No seed sample is left ({why}); give longer samples or raise `max_length`."
        )
    return seed_set


def readings(examples: Iterable[SeedExample], *, has_template: bool) -> tuple[str, ...]:
    """Return how examples were read whose columns do not say it, each way once.

    Args:
        has_template: Whether the tokenizer has a chat template.
    """
    found: dict[str, None] = {}
    for example in examples:
        if example.reading is not None:
            plain = example.is_plain(has_template=has_template)
            way = ", in Alpaca's prompt (there is no chat template)" if plain else ""
            found[example.reading + way] = None
    return tuple(found)


def with_known_calls(
    examples: Iterable[SeedExample], tokenizer: PreTrainedTokenizerBase
) -> Iterator[SeedExample]:
    """Yield the examples; warn, once, of tools and calls that the chat template leaves out.

    Raises:
        UpitError: nothing would be left of a message, which is a call alone.
    """
    warned = False
    for example in examples:
        unread = _unread(example, tokenizer) if tokenizer.chat_template else None
        if unread is None:
            yield example
            continue
        alone = any(m["content"] is None for m in example.turns if m.get("tool_calls"))
        if alone and unread == "tool_calls":
            raise UpitError(
                f"{example.source} has a message that is a call of a tool, which the tokenizer's "
                "chat template does not know; set another `chat_template` in the recipe, or leave "
                "the record out."
            )
        if not warned:
            LOG.warning(
                "%s has %s, which the tokenizer's chat template leaves out; set a `chat_template` "
                "that knows them, or leave such records out.",
                example.source,
                unread,
            )
        warned = True
        yield example


def _unread(example: SeedExample, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what of an example its chat template never speaks of."""
    has = {
        "tool_calls": any(message.get("tool_calls") for message in example.turns),
        "tools": example.tools is not None,
    }
    if not any(has.values()):
        return None
    template = _template(tokenizer, example.tools)
    return next((what for what, there in has.items() if there and what not in template), None)


def _template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError:  # of several templates none is the default: applying it will say so
        return "tools tool_calls"


def _encode(example: SeedExample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids without any limit, and the index of the first one that counts in the loss."""
    prompt, completion = example.prompt, example.completion
    if example.plain and example.is_plain(has_template=bool(tokenizer.chat_template)):
        prompt, completion = example.plain
    if example.messages is not None:
        return _chat_ids(example.messages, tokenizer, example), 1
    if isinstance(prompt, list) and isinstance(completion, list):
        full = _chat_ids(prompt + completion, tokenizer, example)
        asked = _chat_ids(prompt, tokenizer, example, add_generation_prompt=True)
        # Where the two part, and not len(asked): a token may span the boundary, and some
        # templates end the generation prompt with what an answer need not have ("<think>").
        same = 0
        while same < min(len(asked), len(full)) and asked[same] == full[same]:
            same += 1
        return full, max(1, same)
    if isinstance(prompt, str) and isinstance(completion, str):
        start = _prompt_ids(prompt, tokenizer)
        answer = _ids(completion, tokenizer, add_special_tokens=False)
        eos = tokenizer.eos_token_id
        if eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        return start + answer, max(1, len(start))
    return _ids(example.text or "", tokenizer), 1


def _ids(
    text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True
) -> list[int]:
    # Not verbose: we cut to the model's context ourselves and need no warning about it.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt with its special tokens, but without the EOS that some tokenizers put last."""
    ids = _ids(prompt, tokenizer)
    if len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        return ids
    bare = _ids(prompt, tokenizer, add_special_tokens=False)
    written = bare and ids[-len(bare) :] == bare  # the EOS stands in the prompt's own text
    return ids if written else ids[:-1]


def _chat_ids(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    example: SeedExample,
    add_generation_prompt: bool = False,
) -> list[int]:
    if not tokenizer.chat_template:
        raise UpitError(
            f"{example.source} is a conversation, but the tokenizer has no chat template; use a "
            "`text` column, or set `chat_template` in the recipe."
        )
    options = dict(example.template_options or {})
    if example.tools is not None:
        options["tools"] = example.tools
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False, **options
        )
    except Exception as error:  # templates raise what they like
        raise UpitError(
            f"{example.source} does not fit the tokenizer's chat template ({first_line(error)}); "
            "change the conversation, or set another `chat_template` in the recipe."
        ) from error
    return list(ids)
