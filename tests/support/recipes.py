"""Recipes as documents; the models they name are nowhere."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]


def document(**keys: Any) -> Document:
    listed = [{"model": "one"}, {"model": "two"}]
    return {"merge_method": "upit", "base_model": "base", "models": listed, **keys}


def parameters(**settings: Any) -> Document:
    return document(parameters=settings)


def router(**settings: Any) -> Document:
    return document(router={"data": "seed.jsonl", **settings})
