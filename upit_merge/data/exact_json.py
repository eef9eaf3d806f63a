"""Values of any shape in a table of the `datasets` library, as Python's JSON has them."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from datasets.features.features import Json, register_feature
from datasets.table import array_cast


@dataclass
class ExactJson(Json):
    """Objects and lists that are read as they were stored, to the last digit.

    The library's own feature writes ten digits of a number and may read another than is written,
    0.30000000000000004 for 0.3; with a whole number from 2^64 all that is around it becomes a text.
    """

    _type: str = field(default="UpitExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        """Return the text that is stored; a text is one already."""
        if example_data is None or isinstance(example_data, str):
            return example_data
        return json.dumps(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the object or list that was stored."""
        if example_data is None:
            return None
        value = json.loads(example_data)
        # The library's writer encodes once more what its own parser cannot read.
        return json.loads(value) if isinstance(value, str) else value

    def cast_storage(self, storage: Any) -> Any:
        """Return texts of `encode_example` as a column."""
        return array_cast(storage, self.pa_type)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that the library may change this
    register_feature(ExactJson, "UpitExactJson")
