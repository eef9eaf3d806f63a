"""Properties of the two readers of foreign input: safetensors headers and recipes.

Whatever comes in, a reader either gives something sound or refuses it with one `UpitError`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from upit_merge.config.recipe import Recipe, parse_recipe, parse_recipe_text
from upit_merge.errors import UpitError
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.models.formats import FORMATS

Document = dict[str, Any]


def examples(count: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def assert_one_sentence(message: str) -> None:
    assert message.endswith(".")
    assert len(message) < 1000
    assert message.isprintable(), message
    message.encode("utf-8")


# ---- safetensors ---------------------------------------------------------------------------

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def file_bytes(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def assert_sound_or_refused(path: Path, content: bytes) -> bool:
    """Opening reads what lies in the file, or raises `UpitError`; whether it did open."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = SafetensorsFile(path)
    except UpitError as error:
        assert_one_sentence(error.message.replace(str(path), "x"))
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000 + 50 * len(content)
    with contextlib.closing(file):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        assert file.specs.keys() == header.keys()
        covered = 0
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            spec, shape = file.specs[name], tuple(entry["shape"])
            assert spec.shape == shape
            assert spec.num_bytes == math.prod(shape) * WIDTHS[entry["dtype"]] == end - start
            covered += end - start
            rows = shape[0] if shape else 1
            parts = [file.rows(name, a, b) for a, b in ((0, rows // 2), (rows // 2, rows))]
            read = b"".join(part.view(-1).view(torch.uint8).numpy().tobytes() for part in parts)
            assert read == np.frombuffer(content, np.uint8)[start:end].tobytes()
            assert sum(part.shape[0] for part in parts) == rows
        assert 8 + length + covered == len(content)
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "model.safetensors"


names = st.text(st.characters(codec="utf-8"), max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def good_files(draw: st.DrawFn) -> tuple[Document, bytes]:
    """A header and its data."""
    header: Document = {}
    offset = 0
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), max_size=4)):
        if name in header:
            continue
        dtype, shape = draw(st.sampled_from(sorted(WIDTHS))), draw(shapes)
        end = offset + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    return header, draw(st.binary(min_size=offset, max_size=offset))


# What a field may be replaced by: the edges of every check, and other types.
edges = st.sampled_from([-1, 0, 1, 4, 8, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
odd_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | edges
    | names
    | st.sampled_from([*WIDTHS, "I8", "F4", "Q", {"F32": None}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


@examples(150)
@given(good_files())
def test_good_files_are_read(path: Path, good: tuple[Document, bytes]) -> None:
    header, data = good
    opened = assert_sound_or_refused(path, file_bytes(json.dumps(header).encode(), data))
    assert opened == all(name.isprintable() for name in header)


@examples(200)
@given(st.binary(max_size=200) | st.builds(file_bytes, st.binary(max_size=80), st.just(b"")))
def test_arbitrary_bytes(path: Path, content: bytes) -> None:
    assert_sound_or_refused(path, content)


@examples(1000)
@given(good_files(), st.data())
def test_spoilt_headers(path: Path, good: tuple[Document, bytes], data: st.DataObject) -> None:
    header, tensors = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 2))):
        spots = [(header, name) for name in header]
        spots += [
            (entry, key) for entry in header.values() if isinstance(entry, dict) for key in entry
        ]
        spots += [
            (values, index)
            for entry in header.values()
            if isinstance(entry, dict)
            for values in entry.values()
            if isinstance(values, list)
            for index in range(len(values))
        ]
        spots.append((header, data.draw(names)))
        target, key = data.draw(st.sampled_from(spots))
        target[key] = data.draw(odd_values)
    encoded = json.dumps(header).encode()
    length = len(encoded) + data.draw(st.sampled_from([0, 0, 0, 0, -1, 1, 2**31, 2**63]))
    assert_sound_or_refused(path, file_bytes(encoded, tensors, length))


@examples(300)
@given(good_files(), st.data())
def test_torn_files(path: Path, good: tuple[Document, bytes], data: st.DataObject) -> None:
    """Cut, longer, or with a changed byte."""
    content = bytearray(file_bytes(json.dumps(good[0]).encode(), good[1]))
    spot = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["cut", "byte", "more"]))
    if change == "cut":
        del content[spot:]
    elif change == "more":
        content[spot:spot] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[spot] = data.draw(st.integers(0, 255))
    opened = assert_sound_or_refused(path, bytes(content))
    assert not (opened and change == "cut")


# ---- recipes -------------------------------------------------------------------------------

texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=12
)
positive = st.integers(1, 10**9) | st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.just(1) | st.floats(0, 1, exclude_min=True)
density_values = shares | st.lists(shares, min_size=1, max_size=3)


def mappings(required: Document, **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    return st.fixed_dictionaries(required, optional=optional)


filtered = mappings({"value": density_values}, filter=st.none() | texts)
densities = density_values | filtered | st.lists(filtered, min_size=1, max_size=3)
dtypes = st.sampled_from([None, "float32", "float16", "bfloat16"])
sources = st.none() | texts.filter(lambda text: text != "union")

router_settings: dict[str, st.SearchStrategy[Any]] = {
    "subset": st.none() | texts,
    "split": texts,
    "sample": st.none() | st.integers(1) | st.floats(0, 1, exclude_min=True),
    "max_length": st.integers(2, 10**6),
    "assign": st.sampled_from(["balanced", "lowest", "shuffled"])
    | mappings({"column": texts}, experts=st.none() | st.dictionaries(texts, st.integers(0, 7))),
    "stream": st.none() | st.sampled_from(["mean", "expert"]),
    "temperature": positive,
    "batch_tokens": st.integers(1, 10**6),
    "losses": st.sampled_from(["auto", "first_order", "exact"]),
    "compute": st.sampled_from(["auto", "float32", "bfloat16"]),
    "memory_gb": positive,
    "refine": st.none()
    | mappings(
        {"steps": st.integers(1, 999)},
        lr=positive,
        tokens=st.integers(2, 10**6),
        balance=st.floats(0, 10),
    ),
}


def _has_idle_density(document: Document) -> bool:
    """Of a model, although nothing is grown."""
    copies = (document.get("parameters") or {}).get("expansion") == "copy"
    return copies and any(
        (model.get("parameters") or {}).get("density") is not None for model in document["models"]
    )


recipes = mappings(
    {
        "merge_method": st.just("upit"),
        "base_model": texts,
        "models": st.lists(
            mappings({"model": texts}, parameters=mappings({}, density=st.none() | densities)),
            min_size=1,
            max_size=3,
        ),
    },
    dtype=dtypes,
    out_dtype=dtypes,
    architecture=st.sampled_from(["auto", *FORMATS]),
    tokenizer_source=sources,
    card=st.none() | st.just({"name": "Ada"}),
    chat_template=st.none() | st.text(st.characters(codec="utf-8"), max_size=12),
    parameters=mappings(
        {},
        num_experts=st.none() | st.integers(8, 64),
        experts_per_token=st.none() | st.integers(1, 8),
        density=densities,
        select=st.sampled_from(["diverse", "merge_similar", "last"]),
        expansion=st.just("genetic"),
        noise=st.just(0),
        reinitialise=st.just(0),
        parents=st.sampled_from(["most_dissimilar", "farthest_child", "random"]),
        granularity=st.sampled_from(["model", "layer", "tensor"]),
        repeat_pairs=st.booleans(),
        similarity=st.sampled_from(["cosine", "l2"]),
        mutation=st.just("once"),
        backbone=texts,
        shared=st.sampled_from(["auto", "none", "zero", "split"]),
        dense_layers=st.integers(0, 99),
        seed=st.integers(0, 2**63 - 1),
    ).filter(lambda p: not (p.get("repeat_pairs") and p.get("parents") == "farthest_child"))
    | mappings(
        {"expansion": st.just("copy")},
        noise=st.integers(0, 9) | st.floats(0, 9),
        reinitialise=st.just(0) | st.floats(0, 1, exclude_max=True),
        backbone=texts,
        shared=st.sampled_from(["auto", "none", "zero", "split"]),
    )
    | mappings(
        {"shared": st.just("split"), "shared_from": texts},
        dense_layers=st.integers(0, 99),
        seed=st.integers(0, 2**63 - 1),
    ),
    router=st.none()
    | mappings(
        {"data": texts, "objective": st.sampled_from(["one_vs_rest", "softmax", "random"])},
        **router_settings,
    )
    | mappings(
        {"data": texts, "objective": st.just("upit")},
        upit=st.none()
        | mappings(
            {},
            train_experts=st.booleans(),
            alpha=st.floats(0, 1),
            epochs=st.integers(1, 9),
            lr=st.none() | positive,
            batch_size=st.integers(1, 64),
            lora_rank=st.none() | st.integers(1, 64),
        ),
        **router_settings,
    )
    | mappings({"prompts": st.dictionaries(st.integers(0, 9), st.just(["a", "b"]), min_size=1)}),
)

recipes = recipes.filter(lambda document: not _has_idle_density(document))

anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.dates()
    | st.sampled_from(["x" * 5000, 2**127, -1e308, "1e999", "a\nb", "upit", "\ud800", "\x1b[2J"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=4)
        | st.dictionaries(st.sampled_from(["value", "filter", "data", "model"]), inner, max_size=2)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=12,
)


def assert_parsed_or_refused(parse: Callable[[Any], Recipe], document: Any) -> None:
    try:
        parse(document)
    except UpitError as error:
        assert_one_sentence(error.message)


def test_the_strategy_knows_every_key() -> None:
    """A key that is added to the recipe must be added to the strategy."""
    keys = {"": set[str](), "parameters": set[str](), "router": set[str]()}

    @examples(400)
    @given(recipes)
    def collect(document: Document) -> None:
        for block, found in keys.items():
            found.update(document.get(block) or {} if block else document)

    collect()
    router = Recipe.model_fields["router"].annotation.__args__[0]  # type: ignore[union-attr]
    assert keys[""] == set(Recipe.model_fields)
    assert keys["parameters"] == set(Recipe.model_fields["parameters"].annotation.model_fields)  # type: ignore[union-attr]
    assert keys["router"] == set(router.model_fields)


@examples(150)
@given(recipes)
def test_good_recipes_parse_and_dump(document: Document) -> None:
    recipe = parse_recipe(document)
    assert parse_recipe(recipe.model_dump()) == recipe
    text = yaml.safe_dump(document, allow_unicode=True)
    assert parse_recipe_text(text) == recipe
    assert recipe.model_dump(include=set(document), exclude_unset=True) == document


@examples(500)
@given(anything)
def test_arbitrary_documents(document: Any) -> None:
    assert_parsed_or_refused(parse_recipe, document)


@examples(1000)
@given(recipes, anything, st.data())
def test_arbitrary_values_in_a_good_recipe(
    document: Document, value: Any, data: st.DataObject
) -> None:
    """Planted at any place of the document, under a known key, an index or a new key."""
    document, target = copy.deepcopy(document), None
    place: Any = document
    while isinstance(place, (dict, list)) and place:
        target = place
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else [0, -1]))
        place = place[key]
        if data.draw(st.booleans()):
            break
    if value == 2**127:  # larger still, which hypothesis itself could not print
        value = 10**5000
    if isinstance(target, dict) and data.draw(st.integers(0, 4)) == 0:
        key = data.draw(st.text(max_size=5) | st.integers() | st.sampled_from(["x" * 999, "\x1b"]))
    target[key] = value  # type: ignore[index]
    assert_parsed_or_refused(parse_recipe, document)


# Pieces that mean something to YAML, so that more than plain words comes of them.
pieces = st.sampled_from(
    [
        *("merge_method: upit", "base_model: b", "models: [model: m]", "density", "\n", "\n  "),
        *("!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!x "),
        *("&a ", "*a", "<<: *a", ": ", "- ", "? ", ", ", "---", "...", "%YAML 1.1", "0x", "1:59"),
        *("2026-13-01", "1e3", ".inf", "yes", *"{}[]'\"\\|#~>@`\t\0é\ud800"),
    ]
)


@examples(1500)
@given(st.text(max_size=60) | st.lists(pieces | st.text(max_size=3), max_size=25).map("".join))
def test_arbitrary_text(text: str) -> None:
    assert_parsed_or_refused(parse_recipe_text, text)
