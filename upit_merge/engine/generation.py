"""Answers, token by token: transformers generates, what each token took is recorded beside it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upit_merge.engine.choices import Choices
from upit_merge.engine.routed import Recording, RoutedModel

# Told of text as soon as there is some: the text, and what its token took if that is recorded.
PieceCallback = Callable[[str, Choices | None], object]
# What stands for a character of which some bytes are missing.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """What a model has said.

    Attributes:
        ids: Its tokens, without the one that ends it.
        pieces: The text of each token; a character in several belongs to the last of them.
        choices: What the tokens took, if that was recorded; of one that was cut off, the last
            tokens may be missing.
        is_complete: The model has ended it, not a limit nor Ctrl-C.
        is_interrupted: Ctrl-C has ended it.
    """

    ids: list[int]
    pieces: list[str]
    choices: Choices | None
    is_complete: bool
    is_interrupted: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Speaker:
    """A model that answers.

    Args:
        model: transformers' model, with its generation settings.
        tokenizer: Its tokenizer.
        routed: The same model, if it is a mixture whose experts can be watched.
    """

    def __init__(self, model: Any, tokenizer: Any, routed: RoutedModel | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.routed = routed
        # Keys and values of what was read and said last.
        self._cache: Any = None
        self._cached: list[int] = []
        self._cached_for: int | None = None

    @torch.no_grad()
    def answer(
        self,
        ids: Sequence[int],
        on_piece: PieceCallback,
        *,
        recorded: bool = False,
        expert: int | None = None,
        **settings: Any,
    ) -> Answer:
        """Continue `ids`; Ctrl-C ends the answer, which is what was said until then.

        Args:
            on_piece: Called for every piece of text.
            recorded: Record what the tokens took.
            expert: Let all tokens take this expert.
            settings: Of `generate`, instead of the model's own.
        """
        named = _cache_argument(self.model)
        known = self._known(ids, expert)
        self._cache = None  # unless this call comes to its end
        with contextlib.ExitStack() as stack:
            recording = None
            if self.routed is not None and expert is not None:
                stack.enter_context(self.routed.alone(expert))
            elif self.routed is not None and recorded:
                recording = stack.enter_context(self.routed.recorded())
            said = _Said(self.tokenizer, self._ends(settings), on_piece, recording)
            inputs = torch.tensor([[*ids]], device=self.model.device)
            try:
                output = self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    streamer=said,
                    return_dict_in_generate=True,
                    **({} if known is None else {named: known}),
                    **settings,
                )
                cache, cached = getattr(output, named), [*ids, *said.ids]
                if recording is not None and said.ids and not said.is_ended:
                    # What the last token takes would show only when the next one was asked for.
                    last = torch.tensor([said.ids[-1:]], device=self.model.device)
                    self.model(input_ids=last, use_cache=True, **{named: cache})
                else:
                    cached.pop()  # which was not read
                self._cache, self._cached, self._cached_for = cache, cached, expert
                return said.finish()
            except KeyboardInterrupt:
                return said.finish(is_interrupted=True)

    def forget(self) -> None:
        """Free what is kept of the conversation."""
        self._cache, self._cached = None, []

    def _ends(self, settings: Mapping[str, Any]) -> set[int]:
        ends = settings.get("eos_token_id", self.model.generation_config.eos_token_id)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _known(self, ids: Sequence[int], expert: int | None) -> Any:
        """Return the keys and values of an earlier call, if all of that is what `ids` begins with.

        Nothing is ever cut off them, so that this holds for windows, too. States of linear attention
        and convolutions are not gone on from with several tokens, which `generate` itself never does.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        known, cache = len(self._cached), self._cache
        if cache is None or expert != self._cached_for or self._cached != [*ids[:known]]:
            return None
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        layers = getattr(cache, "layers", [None])
        return cache if known < len(ids) and all(type(x) in plain for x in layers) else None


def _cache_argument(model: Any) -> str:
    """Return what a model calls keys and values: transformers 5 has given them another name."""
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class _Said:
    """Takes tokens from `generate`, as transformers' streamers do, and tells the text of each.

    The pieces of transformers' own `TextStreamer` are of several tokens, and wait for a space.

    Args:
        tokenizer: Decodes them.
        ends: Tokens that end an answer.
        on_piece: Told of every piece, as soon as it is known what its token took.
        recording: Of the experts, if they are watched.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: set[int],
        on_piece: PieceCallback,
        recording: Recording | None,
    ) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._on_piece, self._recording = on_piece, recording
        self.ids: list[int] = []
        self._pieces: list[str] = []
        self._has_prompt = False
        self._told = 0
        # The text of ids[start:stop] is known and complete: the next piece is what follows it.
        self._start = self._stop = 0

    @property
    def is_ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self._ends

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then token by token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        # The pass that gave this token has read the one before.
        self._tell()
        self.ids += value.flatten().tolist()
        if not self.is_ended:
            self._pieces.append(self._next())
            if self._recording is None:
                self._tell()

    def end(self) -> None:
        """`generate` is done."""

    def finish(self, *, is_interrupted: bool = False) -> Answer:
        """Tell what is left, and return the whole."""
        rest = self._next(at_end=True)
        is_told = self._told == len(self._pieces)
        if rest:
            self._pieces[-1] += rest
        self._tell()
        if rest and is_told:
            self._on_piece(rest, None)
        choices = self._recording.answered() if self._recording else None
        ids = self.ids[: len(self._pieces)]
        return Answer(ids, self._pieces, choices, self.is_ended, is_interrupted)

    def _next(self, *, at_end: bool = False) -> str:
        """Return the text that the latest tokens add; none in the middle of a character."""
        known = self._decoded(self.ids[self._start : self._stop])
        text = self._decoded(self.ids[self._start : len(self._pieces) + (not at_end)])
        if not at_end and (text.endswith(_INCOMPLETE) or len(text) <= len(known)):
            return ""
        self._start, self._stop = self._stop, len(self.ids)
        return text[len(known) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _tell(self) -> None:
        for number in range(self._told, len(self._pieces)):
            choices = self._recording.of_token(number) if self._recording else None
            self._on_piece(self._pieces[number], choices)
        self._told = len(self._pieces)
