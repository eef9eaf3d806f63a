"""What an adapter makes of the embeddings and the head, which may be one tensor, or of new size.

The rules are those by which PEFT applies an adapter, not those by which it merges one: where head
and embeddings share their weights, its merge of factors for one of them changes the other too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.tensor_file import equal_tensors
from upit_merge.models.lora.change import FACTORS, Change, Owner, Parts
from upit_merge.models.lora.config import CONFIG

EMBEDDINGS, HEAD = TABLES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Tables:
    """Finds out what an adapter makes of its base's tables.

    Args:
        owner: The adapter.
        base: What it is applied to.
    """

    owner: Owner
    base: Checkpoint

    def changes(self, tables: Mapping[str, Parts]) -> dict[str, Change]:
        """Return the changes by name of the resulting tensor.

        A head that shared the base's embeddings and does so no longer is among them; one that
        still does is not.

        Args:
            tables: What the adapter's file has for them; a table without anything may be missing.

        Raises:
            UpitError: a part is missing, or does not fit the base, the other table or the settings.
        """
        if tables and f"{EMBEDDINGS}.weight" not in self.base.specs:
            raise self._unknown(next(iter(tables)))
        for module in TABLES:
            self._check_tokens(module, tables.get(module, {}))
        if not tables:
            return {}
        parts = {module: dict(tables.get(module, {})) for module in TABLES}
        sources = {module: f"{module}.weight" for module in TABLES}
        if self._is_tied:
            if self.owner.settings.keeps_tied and not parts[HEAD]:
                parts = {EMBEDDINGS: parts[EMBEDDINGS]}
            else:
                self._share(parts)
            sources[HEAD] = sources[EMBEDDINGS]
        rows = self._rows(parts, sources)
        changes = {
            f"{module}.weight": self._change(module, own, sources[module], rows)
            for module, own in parts.items()
            if own or self._is_tied or self._is_resized(sources[module], rows)
        }
        if self._is_tied and self._are_same(parts):
            changes.pop(f"{HEAD}.weight", None)
        return changes

    @property
    def _is_tied(self) -> bool:
        return self.owner.ties

    def _check_tokens(self, module: str, parts: Parts) -> None:
        label, tokens = self.owner.label, self.owner.settings.tokens_of(module)
        if "tokens" not in parts:
            if tokens is not None and not (module == HEAD and self._is_tied):
                raise UpitError(
                    f"Checkpoint {label} has no trained tokens of {module}, which its {CONFIG} "
                    "names; save the adapter again."
                )
            return
        if any(part in parts for part in FACTORS):
            raise UpitError(
                f"Checkpoint {label} has factors and trained tokens of {module}, which PEFT "
                "cannot apply together; train one of them."
            )
        if tokens is None and module == HEAD and self._is_tied:
            tokens = self.owner.settings.tokens_of(EMBEDDINGS)
        found = self.owner.file.specs[parts["tokens"]].shape
        expected = (len(tokens or ()), self.base.specs[f"{EMBEDDINGS}.weight"].shape[1])
        if found != expected:
            raise UpitError(
                f"Checkpoint {label} has trained tokens of shape {list(found)} for {module}, but "
                f"its {CONFIG} and its base make {list(expected)}; save the adapter again."
            )

    def _share(self, parts: dict[str, dict[str, str]]) -> None:
        """Give each of two tables that were one what the adapter has for the other.

        A table that is trained whole (`modules_to_save`) is a copy: the other keeps what it was.
        Rows of tokens that are trained in the embeddings are the head's too, unless it has others.
        """
        settings = self.owner.settings
        trained = {
            module
            for module in TABLES
            if settings.is_replaced(module)
            and parts[module].get("weight", "").endswith(f"{module}.weight")
        }
        both = [own["weight"] for own in parts.values() if "weight" in own]
        common = [
            parts[module]["weight"]
            for module in TABLES
            if "weight" in parts[module] and module not in trained
        ]
        if len(common) == 2 and not self._equal(*both):
            raise UpitError(
                f"Checkpoint {self.owner.label} has two different tables {both[0]} and {both[1]}, "
                f"but the base {self.base.label} ties its embeddings and modules_to_save of its "
                f"{CONFIG} names neither; name the base it was trained on."
            )
        for module in TABLES:
            if common:
                parts[module].setdefault("weight", common[0])
        head = settings.tokens_of(HEAD)
        if (
            "tokens" in parts[EMBEDDINGS]
            and HEAD not in trained
            and head in (None, settings.tokens_of(EMBEDDINGS))
        ):
            parts[HEAD]["tokens"] = parts[EMBEDDINGS]["tokens"]

    def _tokens(self, module: str, parts: Parts) -> tuple[int, ...]:
        """Return which rows of the table are trained, in the order in which the file has them."""
        if "tokens" not in parts:
            return ()
        settings = self.owner.settings
        return settings.tokens_of(module) or settings.tokens_of(EMBEDDINGS) or ()

    def _rows(self, parts: Mapping[str, Parts], sources: Mapping[str, str]) -> int:
        """Return the size of the vocabulary: of whole tables, else of factors, tokens, the base."""
        sizes = [
            self.owner.file.specs[own[part]].shape[axis]
            for part, axis in (("weight", 0), ("B", 0), ("embedding A", 1))
            for own in parts.values()
            if part in own and len(self.owner.file.specs[own[part]].shape) > axis
        ]
        if sizes:
            return sizes[0]
        tokens = [row for module, own in parts.items() for row in self._tokens(module, own)]
        return max(self.base.specs[sources[EMBEDDINGS]].shape[0], 1 + max(tokens, default=0))

    def _is_resized(self, source: str, rows: int) -> bool:
        spec = self.base.specs.get(source)
        return spec is not None and spec.shape[0] != rows

    def _change(self, module: str, parts: Parts, source: str, rows: int) -> Change:
        """Return what becomes of a table; one that lost rows has lost the last."""
        file, spec = self.owner.file, self.base.specs.get(source)
        if spec is None:
            raise self._unknown(module)
        shape = file.specs[parts["weight"]].shape if "weight" in parts else spec.shape
        tokens = {row: index for index, row in enumerate(self._tokens(module, parts))}
        if len(shape) == 2 and shape[0] != rows:
            if "weight" in parts or not all(row in tokens for row in range(shape[0], rows)):
                raise self._unlike(module, shape[0], rows)
            shape = (rows, shape[1])
        if beyond := [row for row in tokens if row >= rows]:
            raise UpitError(
                f"Checkpoint {self.owner.label} has trained the token {beyond[0]} of {module}, "
                f"which has only {rows} rows; save the adapter again."
            )
        return self.owner.change(module, parts, source, shape, tokens)

    def _unknown(self, module: str) -> UpitError:
        return UpitError(
            f"Checkpoint {self.owner.label} changes {module}, which the base {self.base.label} has "
            "not; name the base it was trained on."
        )

    def _unlike(self, module: str, found: int, rows: int) -> UpitError:
        label = self.owner.label
        return UpitError(
            f"Checkpoint {label} has a vocabulary of {rows}, but of {module} it has, or its base "
            f"{self.base.label} has, only {found} rows; save it again with both tables (PEFT's "
            "save_pretrained(…, save_embedding_layers=True)), or write BASE+"
            f"{label} with the resized model as BASE."
        )

    def _are_same(self, parts: Mapping[str, Parts]) -> bool:
        """Return whether both tables still are one, though the file may have it twice."""
        if HEAD not in parts:
            return True
        first, second = parts[EMBEDDINGS], parts[HEAD]
        weights = first.get("weight"), second.get("weight")
        if weights[0] != weights[1] and not (all(weights) and self._equal(*map(str, weights))):
            return False
        if first.get("tokens") != second.get("tokens"):
            return False
        ours, theirs = ({part for part in FACTORS if part in own} for own in (first, second))
        if not (ours or theirs):
            return True
        if (ours, theirs) != ({"embedding A", "embedding B"}, {"A", "B"}):
            return False
        scales = {self.owner.settings.scale(module) for module in TABLES}
        return len(scales) == 1 and all(
            torch.equal(self._whole(first[f"embedding {mine}"]).T, self._whole(second[other]))
            for mine, other in (("A", "B"), ("B", "A"))
        )

    def _whole(self, part: str) -> torch.Tensor:
        return self.owner.file.rows(part, 0, self.owner.file.specs[part].shape[0])

    def _equal(self, first: str, second: str) -> bool:
        return equal_tensors(self.owner.file, first, second)
