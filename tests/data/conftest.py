"""A folder of its own for every test, and a tokenizer with a chat template."""

import pytest

from tests.support.seeds import TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(template=TEMPLATE)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Relative paths, so that the expected sentences can be written out in full."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
