"""What an adapter makes of one of its base's tensors, checked against its settings and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from upit_merge.errors import UpitError
from upit_merge.io.pickle_file import PickleFile
from upit_merge.io.safetensors_file import SafetensorsFile
from upit_merge.models.lora.config import CONFIG, AdapterConfig

WeightFile = SafetensorsFile | PickleFile
Parts = Mapping[str, str]

FACTORS = ("A", "B", "embedding A", "embedding B")


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one of its base's tensors.

    Attributes:
        parts: Names in the adapter's file: of `A` and `B`, or `embedding A` and `embedding B`, of
            `magnitudes`, of a `weight` that takes the place of the base's, and of `tokens`, rows
            that take the place of rows.
        source: The base's tensor that is changed; a head may start from the embeddings.
        shape: Of the result: it may have other rows than the source.
        scale: Of the product of the factors.
        rank: Of the factors; 0 without.
        tokens: Which row of the result is which row of `tokens`.
    """

    parts: Parts
    source: str
    shape: tuple[int, ...]
    scale: float = 1.0
    rank: int = 0
    tokens: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        return not {"weight", "magnitudes", "tokens"} & self.parts.keys()


@dataclass(frozen=True)
class Owner:
    """Whose tensors are looked at, for sentences about them.

    Args:
        label: The adapter's.
        base: The label of its base.
        ties: The base's head and embeddings are one tensor.
    """

    label: str
    base: str
    ties: bool
    settings: AdapterConfig
    file: WeightFile

    def change(
        self,
        module: str,
        parts: Parts,
        source: str,
        shape: tuple[int, ...],
        tokens: Mapping[int, int] | None = None,
    ) -> Change:
        """Return what these parts make of a module's weight.

        Args:
            source: The base's tensor.
            shape: What the factors and magnitudes must fit.
            tokens: As in `Change`.

        Raises:
            UpitError: a part is missing, or does not fit the shape or the settings.
        """
        factors = [part for part in FACTORS if part in parts]
        if not factors and "magnitudes" not in parts:
            return Change(parts, source, shape, tokens=tokens or {})
        self._check_parts(module, factors, parts)
        first, second = (self.file.specs[parts[part]].shape for part in factors)
        rank, ranks = self.settings.rank(module), (*first[:1], *second[1:])
        if len(first) != 2 or len(second) != 2 or ranks != (rank, rank):
            raise UpitError(
                f"Checkpoint {self.label} has factors of shapes {list(first)} and {list(second)} "
                f"for {module}, but its {CONFIG} says rank {rank}; save the adapter again."
            )
        product = (second[0], first[1]) if "A" in parts else (first[1], second[0])
        if product != shape:
            raise UpitError(
                f"Checkpoint {self.label} was trained for another base: its factors for {module} "
                f"make {list(product)}, the base {self.base} has {list(shape)}."
            )
        if "magnitudes" in parts and self.file.specs[parts["magnitudes"]].shape != shape[:1]:
            found = list(self.file.specs[parts["magnitudes"]].shape)
            raise UpitError(
                f"Checkpoint {self.label} has magnitudes of shape {found} for {module}, which has "
                f"{shape[0]} rows; save the adapter again."
            )
        return Change(parts, source, shape, self.settings.scale(module), rank, tokens or {})

    def _check_parts(self, module: str, factors: Sequence[str], parts: Parts) -> None:
        if factors not in (["A", "B"], ["embedding A", "embedding B"]):
            raise UpitError(
                f"Checkpoint {self.label} has not both factors for {module} (it has "
                f"{', '.join(parts.values())}); save the adapter again."
            )
        if self.settings.dora and factors[0] != "A":
            # PEFT's merge would change a head that is the embeddings, which its model does not.
            untied = ", untied first (tie_word_embeddings=False)" if self.ties else " first"
            raise UpitError(
                f"Checkpoint {self.label} has DoRA on {module}, which is not supported on "
                f"embeddings; merge it into its base{untied} (PEFT's merge_and_unload)."
            )
        if self.settings.dora != ("magnitudes" in parts):
            has = "no magnitudes" if self.settings.dora else "magnitudes"
            raise UpitError(
                f"Checkpoint {self.label} has {has} for {module}, but its {CONFIG} sets use_dora "
                f"to {str(self.settings.dora).lower()}; save the adapter again."
            )
