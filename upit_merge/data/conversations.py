"""Conversations as data sets have them -> messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from upit_merge.data.json_text import decode
from upit_merge.errors import UpitError, shown

Messages = list[dict[str, Any]]

# Who speaks, by the names that ShareGPT's data and its kind have for them.
_ROLES = {
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")


def as_messages(value: Any, column: str, source: str, *, other_roles: bool = False) -> Messages:
    """Return a conversation as messages of {role, content}, and what else those have.

    Args:
        value: A list of {role, content} or of ShareGPT's {from, value}, or such a list as JSON.
        column, source: Where it is from, for error messages.
        other_roles: Roles may have ShareGPT's names beside role and content, too.

    Raises:
        UpitError: naming the source, the message and what is wrong with it.
    """
    value = from_json(value, f"`{column}`", source)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else kind_of(value)
        raise UpitError(f"{source} has {kind} as `{column}`; make it a list of {{role, content}}.")
    for index, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UpitError(
                f"{source} has {kind_of(message)} as message {index} of `{column}`; make it an "
                "object with `role` and `content`."
            )
    is_from_value = value[0].get("from") is not None and value[0].get("role") is None
    read = _from_value if is_from_value else _message
    return [
        read(message, f"message {index} of `{column}`", source, other_roles)
        for index, message in enumerate(value, 1)
    ]


def _message(
    message: dict[str, Any], what: str, source: str, other_roles: bool = False
) -> dict[str, Any]:
    """Check a message; it is returned as it is, but for what templates cannot read."""
    check_string(message.get("role"), f"`role` of {what}", source)
    # Tables have every key in every message.
    message = {k: v for k, v in message.items() if v is not None or k == "content"}
    if other_roles:
        message["role"] = _ROLES.get(message["role"], message["role"])
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(content, what, source)
    elif content is not None or not message.get("tool_calls"):
        check_string(content, f"`content` of {what}", source)
    message.setdefault("content", None)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], what, source)
    return message


def _from_value(
    message: dict[str, Any], what: str, source: str, _other_roles: bool
) -> dict[str, Any]:
    speaker, value = message.get("from"), message.get("value")
    check_string(speaker, f"`from` of {what}", source)
    others = {key: message[key] for key in message if key not in ("from", "value")}
    if speaker in _CALLS:
        calls = {"role": "assistant", "content": None, "tool_calls": _calls(value, what, source)}
        return _message(others | calls, what, source)
    if speaker not in _ROLES:
        raise UpitError(
            f"{source} has {shown(speaker)} as `from` of {what}; make it human, gpt, system, "
            "function_call or observation."
        )
    if not isinstance(value, list):
        check_string(value, f"`value` of {what}", source)
    return _message(others | {"role": _ROLES[speaker], "content": value}, what, source)


def _calls(value: Any, what: str, source: str) -> list[Any]:
    """Return the functions that a message of ShareGPT's kind calls: one, or a list, as JSON."""
    try:
        is_text = isinstance(value, str)
        calls = decode(value, f"`value` of {what}", source) if is_text else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UpitError(
            f"{source} has no call of a function as `value` of {what}; make it JSON with `name` "
            "and `arguments`."
        )
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(value: Any, what: str, source: str) -> list[Any]:
    """Return calls with their arguments as objects: a template would write JSON as JSON again."""
    calls = from_json(value, f"`tool_calls` of {what}", source)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UpitError(
            f"{source} has {kind_of(calls)} as `tool_calls` of {what}; make it a list of objects."
        )
    found = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            called = f"the arguments of a call in {what}"
            arguments = from_json(function["arguments"], called, source)
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(call)
    return found


def from_json(value: Any, what: str, source: str) -> Any:
    """Return what a text holds, if it is JSON of a list or an object; else the value itself.

    Args:
        what, source: What the value is, and of which record, for error messages.

    Raises:
        UpitError: a key stands twice in that JSON, or a number that cannot be kept.
    """
    if _may_be_json(value):
        try:
            return decode(value, what, source)
        except (ValueError, RecursionError):
            return value
    return value


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, or such a list as JSON."""
    if _may_be_json(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def _may_be_json(value: Any) -> bool:
    return isinstance(value, str) and value.strip()[:1] in ("[", "{")


def _joined(parts: list[Any], what: str, source: str) -> str:
    """Return a content of parts as one text: templates of text models take no parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text":
            found = kind_of(part) if kind is None else f"a part of type {shown(kind)}"
            raise UpitError(
                f"{source} has {found} in `content` of {what}, but these models read text only; "
                "leave the record out."
            )
        check_string(part.get("text"), f"`text` in `content` of {what}", source)
        texts.append(part["text"])
    return "".join(texts)  # as templates do that take parts themselves


def check_string(value: Any, what: str, source: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        UpitError: the value is no string, or no Unicode.
    """
    found = kind_of(value)
    if isinstance(value, str):
        try:
            value.encode("utf-8")  # a lone "\\ud83d" is valid JSON, but no tokenizer takes it
            return
        except UnicodeEncodeError:
            found = "a broken string (half of a surrogate pair)"
    raise UpitError(f"{source} has {found} as {what}; make it a valid string.")


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", bytes: "binary data", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")
