"""What was said so far, and the tokens that a model is given of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from upit_merge.commands.dialogue.voices import Voice
from upit_merge.errors import UpitError, counted, first_line, one_line

LOG = logging.getLogger(__name__)

Message = dict[str, str]


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_system(name: str, tokenizer: Any, system: str | None) -> None:
    """Refuse a system message that has no place.

    Raises:
        UpitError: the model of that name has no chat template.
    """
    if system is not None and not has_template(tokenizer):
        raise UpitError(
            f"{name} has no chat template, so that a system message has no place; leave out "
            "--system, and begin the first message with it."
        )


@dataclass
class Conversation:
    """The turns of a conversation with one model.

    Without a chat template it is one text that the model continues: what is said and answered, each
    new message on a line of its own.

    Args:
        voice: The model.
        system: A system message, if there is one; see `check_system`.
    """

    voice: Voice
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        return has_template(self.voice.speaker.tokenizer)

    def ids(self, text: str, room: int) -> list[int]:
        """Add what the user says, and return the tokens that the model is to continue.

        The oldest turns go where the conversation is too long for the model, with a warning.

        Args:
            room: Tokens to leave for the answer, if the model's context is not smaller than that.

        Raises:
            UpitError: the message alone is too long, or the template does not take it; then the
                conversation is as it was.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            return self._fitting(room)
        except UpitError:
            self.messages = before
            raise

    def add(self, answer: str) -> None:
        """Add what the model says."""
        self.messages.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = []
        self.voice.speaker.forget()

    def document(self) -> dict[str, Any]:
        """Return the conversation as a record of training data."""
        return {"messages": [*self._opening(), *self.messages]}

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _fitting(self, room: int) -> list[int]:
        ids, context, dropped = self._encoded(), self.voice.context, 0
        if context is None:
            return ids
        limit = context - min(room, context // 4)
        while len(ids) > limit and len(self.messages) > 1:
            self.messages = self.messages[2:]
            dropped += 1
            ids = self._encoded()
        if len(ids) >= context:
            raise UpitError(
                f"The message has {counted(len(ids), 'token')}, {self.voice.name} can read "
                f"{context:,}; shorten it."
            )
        if dropped:
            LOG.warning(
                "The conversation is longer than the %s tokens that %s can read; the oldest %s "
                "left out (/reset begins a new one).",
                f"{context:,}",
                self.voice.name,
                "turn is" if dropped == 1 else f"{dropped} turns are",
            )
        return ids

    def _encoded(self) -> list[int]:
        tokenizer = self.voice.speaker.tokenizer
        try:
            if not self.has_template:
                ids = tokenizer(self._running_text())["input_ids"]
            else:
                ids = tokenizer.apply_chat_template(
                    [*self._opening(), *self.messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )["input_ids"]
        except Exception as error:  # a template raises whatever it likes
            what = "the system message or the message" if self.system else "the message"
            raise UpitError(
                f"The chat template of {self.voice.name} does not take {what} "
                f"({one_line(first_line(error))}); mend the template, or talk to a model with "
                "another."
            ) from error
        if not ids:
            raise UpitError("The message has no tokens; write something.")
        return list(ids)

    def _running_text(self) -> str:
        text = ""
        for message in self.messages:
            is_new_line = text and message["role"] == "user" and not text.endswith("\n")
            text += ("\n" if is_new_line else "") + message["content"]
        return text
