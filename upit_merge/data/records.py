"""One record of a data set -> one example: which of its columns are read, and as what.

The forms that are told apart: `messages`; `prompt` with `completion`; `text`; conversations under
other names (ShareGPT's); an instruction with its answer (Alpaca's, GSM8K's and others).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

from upit_merge.data.conversations import (
    Messages,
    as_messages,
    check_string,
    from_json,
    is_chat,
    kind_of,
)
from upit_merge.errors import UpitError

_CONVERSATIONS = ("conversations", "conversation")
# An instruction and its answer, by the names that data sets have for them, in this order.
_PAIRS = {
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "prompt": ("response",),
    "input": ("output",),
}
# What the instruction is about, which follows it.
_CONTEXTS = {"instruction": ("input", "context"), "question": ("context",)}
_SYSTEM = ("system", "system_prompt")
_SHAREGPT_ROLES = ("human", "gpt")
# What a conversation or an instruction may have besides.
_BESIDES = (*_SYSTEM, "history", "tools", "chat_template_kwargs")
# Arguments of `apply_chat_template` that data must not set.
_OURS = frozenset(
    [
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)

REMEDY = (
    "give each record `text`, `messages` (a list of {role, content}) or `prompt` and `completion`"
)

# The prompt of Stanford Alpaca, whose data the form of instruction, input and output is from.
_ALPACA = (
    "Below is an instruction that describes a task{about}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


@dataclass(frozen=True)
class SeedExample:
    """One raw record: `text`, or `messages`, or `prompt` with `completion`; the rest is None.

    Attributes:
        source: Where the record came from, for error messages: "seed.jsonl line 17".
        prompt, completion: Both strings or both lists of messages.
        label: The value of the column that was asked for, such as the sample's domain.
        plain: Prompt and completion for a tokenizer without a chat template.
        tools, template_options: What the chat template is given besides.
        reading: What was read as what, where the columns' names do not say it.
    """

    source: str
    text: str | None = None
    messages: Messages | None = None
    prompt: str | Messages | None = None
    completion: str | Messages | None = None
    label: str | int | None = None
    plain: tuple[str, str] | None = None
    tools: list[Any] | None = None
    template_options: dict[str, Any] | None = None
    reading: str | None = field(default=None, compare=False)

    @property
    def turns(self) -> Messages:
        """All messages there are."""
        parts = (self.messages, self.prompt, self.completion)
        return [message for part in parts if isinstance(part, list) for message in part]

    def is_plain(self, *, has_template: bool) -> bool:
        """Whether the example is written without a chat template, though it could have one."""
        return self.plain is not None and not has_template


def to_example(
    record: Any, source: str, column: str | None = None, text: str = "text"
) -> SeedExample:
    """Read a record.

    Args:
        source: Where it is from.
        column: Whose value becomes the label.
        text: Which column is the text.

    Raises:
        UpitError: naming the source, and what is wrong with it.
    """
    if not isinstance(record, dict):
        raise UpitError(f"{source} is {kind_of(record)}, not a JSON object; {REMEDY}.")
    label = None if column is None else _label(record, column, source)
    # Tables have every column in every row, so an absent value arrives as None.
    found = {name: value for name, value in record.items() if value is not None}
    if "messages" in found:
        return _messages(found, source, label)
    if "prompt" in found and "completion" in found:
        return _prompt_and_completion(found, source, label)
    if text in found:
        check_string(found[text], f"`{text}`", source)
        return SeedExample(source, text=found[text], label=label)
    for name in _CONVERSATIONS:
        if name in found:
            return _conversation(found, name, source, label)
    for name, answers in _PAIRS.items():
        for answer in answers:
            if name in found and answer in found:
                return _instruction(record, found, (name, answer), source, label)
    raise no_usable_column(source, list(found))


def _messages(found: Mapping[str, Any], source: str, label: str | int | None) -> SeedExample:
    messages = as_messages(found["messages"], "messages", source)
    reading = None
    if any(message["role"] in _SHAREGPT_ROLES for message in messages):
        messages = as_messages(found["messages"], "messages", source, other_roles=True)
        reading = "ShareGPT's roles in `messages` read as user and assistant"
    messages, system = _with_system(messages, found, source)
    reading = reading or (f"{system}`messages` read as messages" if system else None)
    return SeedExample(
        source, messages=messages, label=label, reading=reading, **_options(found, source)
    )


def _with_system(messages: Messages, found: Mapping[str, Any], source: str) -> tuple[Messages, str]:
    """Put what a column has for the system first, unless a message has it; return what to say."""
    system, column = _system(found, source)
    if not system or (messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages, ""
    if messages[0]["role"] == "system":
        return messages, f"`{column}` left out beside the system's message, "
    return [{"role": "system", "content": system}, *messages], f"`{column}` and "


def _prompt_and_completion(
    found: Mapping[str, Any], source: str, label: str | int | None
) -> SeedExample:
    prompt, completion = found["prompt"], found["completion"]
    reading = None
    if isinstance(prompt, str) and is_chat(prompt) and is_chat(completion):
        prompt, completion = (
            from_json(found[n], f"`{n}`", source) for n in ("prompt", "completion")
        )
        reading = "JSON in `prompt` and `completion` read as messages"
    if isinstance(prompt, list) != isinstance(completion, list):
        raise UpitError(
            f"{source} has {kind_of(prompt)} as `prompt` and {kind_of(completion)} as "
            "`completion`; make both strings, or both lists of {role, content}."
        )
    if not isinstance(prompt, list):
        for name in ("prompt", "completion"):
            check_string(found[name], f"`{name}`", source)
        return SeedExample(source, prompt=prompt, completion=completion, label=label)
    asked, told = (as_messages(found[name], name, source) for name in ("prompt", "completion"))
    return SeedExample(
        source,
        prompt=asked,
        completion=told,
        label=label,
        reading=reading,
        **_options(found, source),
    )


def _conversation(
    found: Mapping[str, Any], name: str, source: str, label: str | int | None
) -> SeedExample:
    messages = as_messages(found[name], name, source, other_roles=True)
    messages, system = _with_system(messages, found, source)
    options = _options(found, source, bare_tools=True)
    reading = f"{system}`{name}` read as messages"
    return SeedExample(source, messages=messages, label=label, reading=reading, **options)


def _instruction(
    record: Mapping[str, Any],
    found: Mapping[str, Any],
    columns: tuple[str, str],
    source: str,
    label: str | int | None,
) -> SeedExample:
    """Read an instruction and its answer, as a chat or, without a template, in Alpaca's prompt."""
    asked, answered = columns
    for name in columns:
        check_string(found[name], f"`{name}`", source)
    instruction, context = found[asked], ""
    about = next((name for name in _CONTEXTS.get(asked, ()) if name in record), None)
    if about is not None and about in found:
        context = found[about]
        check_string(context, f"`{about}`", source)
    system, system_column = _system(found, source)
    history = _history(found.get("history"), source)
    turns: Messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    question = "\n".join(part for part in (instruction, context) if part.strip())
    turns.append({"role": "user", "content": question})
    plain = None
    if not (system or history):
        plain = _alpaca_prompt(instruction, context), found[answered]
    named = [system_column if system else None, "history" if history else None, asked, about]
    *firsts, last = [f"`{name}`" for name in (*named, answered) if name]
    return SeedExample(
        source,
        prompt=turns,
        completion=[{"role": "assistant", "content": found[answered]}],
        label=label,
        plain=plain,
        reading=f"{', '.join(firsts)} and {last} read as prompt and completion",
        **_options(found, source, bare_tools=True),
    )


def _alpaca_prompt(instruction: str, context: str) -> str:
    if not context.strip():
        return _ALPACA.format(about="", instruction=instruction, context="")
    return _ALPACA.format(
        about=", paired with an input that provides further context",
        instruction=instruction,
        context=f"### Input:\n{context}\n\n",
    )


def _system(found: Mapping[str, Any], source: str) -> tuple[str, str]:
    """Return the system's message, if a column has it, and that column."""
    for name in _SYSTEM:
        if name in found:
            check_string(found[name], f"`{name}`", source)
            return found[name], name
    return "", ""


def _history(value: Any, source: str) -> list[list[str]]:
    """Return earlier questions and answers, as Alpaca's data has them."""
    rounds = from_json(value, "`history`", source) or []
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in rounds
    ):
        raise UpitError(
            f"{source} has {kind_of(rounds)} as `history`; make it a list of [question, answer]."
        )
    for pair in rounds:
        for part in pair:
            check_string(part, "a part of `history`", source)
    return rounds


def _options(found: Mapping[str, Any], source: str, *, bare_tools: bool = False) -> dict[str, Any]:
    """Return what the chat template is given besides the messages.

    Args:
        bare_tools: The tools may be functions alone, as in ShareGPT's data.
    """
    tools = from_json(found.get("tools"), "`tools`", source) or None
    if tools is not None and not isinstance(tools, list):
        raise UpitError(f"{source} has {kind_of(tools)} as `tools`; make it a list of functions.")
    for index, tool in enumerate(tools or [], 1):
        if not isinstance(tool, dict):
            raise UpitError(
                f"{source} has {kind_of(tool)} as tool {index} of `tools`; make it an object."
            )
    if tools is not None and bare_tools:
        tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    name = "chat_template_kwargs"
    options = from_json(found.get(name), f"`{name}`", source) or None
    if options is not None and (not isinstance(options, dict) or _OURS & options.keys()):
        raise UpitError(
            f"{source} has {kind_of(options)} as `chat_template_kwargs` that is none, or sets what "
            "is not the data's business; make it an object of the template's own settings."
        )
    return {"tools": tools, "template_options": options}


def _label(record: Mapping[str, Any], column: str, source: str) -> str | int:
    value = record.get(column)
    if isinstance(value, str) or type(value) is int:
        return value
    if value is None:
        names = [name for name in record if record[name] is not None and name != column]
        raise _no_such_column(source, column, names)
    raise UpitError(
        f"{source} has {kind_of(value)} in the column `{column}`; make it a text or a whole number."
    )


# ---- columns -------------------------------------------------------------------------------


def columns_read(column: str | None, text: str = "text") -> list[str]:
    """Return all columns of which some are read, if a record has them; `column` is the label."""
    usable = ["messages", "prompt", "completion", text, *_CONVERSATIONS]
    for name, answers in _PAIRS.items():
        usable += [name, *answers, *_CONTEXTS.get(name, ())]
    return list(dict.fromkeys([*usable, *_BESIDES, *([] if column is None else [column])]))


def usable_columns(
    names: Sequence[str], where: str, column: str | None, text: str = "text"
) -> list[str]:
    """Return the columns to read of a table, whose others may be large.

    Raises:
        UpitError: none can be used, or `column` is missing.
    """
    usable = [name for name in columns_read(None, text) if name in names]
    blank = dict.fromkeys(usable, "")
    complete = (
        {"messages", text, *_CONVERSATIONS} & blank.keys()
        or {"prompt", "completion"} <= blank.keys()
        or any(name in blank and blank.keys() & {*answers} for name, answers in _PAIRS.items())
    )
    if not complete:
        raise no_usable_column(where, names)
    if column is not None and column not in names:
        raise _no_such_column(where, column, names)
    return usable if column is None or column in usable else [*usable, column]


def _no_such_column(where: str, column: str, names: Sequence[str]) -> UpitError:
    found = shorten(", ".join(f"`{name}`" for name in names) or "nothing", 200)
    return UpitError(f"{where} has no column `{column}` (it has {found}); name one that is there.")


def no_usable_column(where: str, names: Sequence[str]) -> UpitError:
    """Return the error that a record, or a table, has nothing to read."""
    found = shorten(", ".join(f"`{name}`" for name in names) or "nothing", 200)
    return UpitError(f"{where} has {found} and no usable column; {REMEDY}.")
