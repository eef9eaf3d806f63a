"""What an output format has to say; everything else is common to all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# The matrices of a dense FFN, in the order in which files hold them.
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


@dataclass(frozen=True)
class Modules:
    """transformers' own classes, with which a format is computed.

    Attributes:
        dense_config, dense_model, dense_layer, rotary, norm: Of the dense model whose attention
            is the mixture's.
        moe_config, moe_layer: Of the mixture.
    """

    dense_config: Any
    dense_model: Any
    dense_layer: Any
    rotary: Any
    norm: Any
    moe_config: Any
    moe_layer: Any


class MixtureFormat(ABC):
    """Names and settings of a mixture on disk, as its published checkpoints have them.

    Attributes:
        name: `model_type` of the output, and a recipe's `architecture:`.
        title: What people call it.
        class_name: The class that `config.json` names.
        dense_types: Values of `model_type` of the dense checkpoints it is made from.
        block: What the mixture of a layer is called in tensors' names.
        projections: What an expert's matrices are called, by their dense names.
        count_field: The setting with the number of experts.
        inner_field: The setting with the intermediate size of an expert.
        required: Settings of its own that some reader insists on, and others do not write.
        biases: Settings of dense models that give them biases, for which there is no place.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    class_name: ClassVar[str]
    dense_types: ClassVar[tuple[str, ...]]
    block: ClassVar[str]
    projections: ClassVar[Mapping[str, str]]
    count_field: ClassVar[str]
    inner_field: ClassVar[str] = "intermediate_size"
    required: ClassVar[tuple[str, ...]] = ()
    biases: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    def gate_tensor(self, layer: int) -> str:
        """Name of a layer's gate, shape (num_experts, hidden_size)."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def expert_tensor(self, layer: int, expert: int, projection: str) -> str:
        """Name of an expert's projection (`gate_proj`, `up_proj`, `down_proj`)."""
        return (
            f"model.layers.{layer}.{self.block}.experts.{expert}."
            f"{self.projections[projection]}.weight"
        )

    def gate_names(self, num_layers: int) -> list[str]:
        """Return names of all gates, in layer order."""
        return [self.gate_tensor(layer) for layer in range(num_layers)]

    def expert_names(self, num_layers: int, experts: Iterable[int]) -> Iterator[str]:
        """Yield names of all tensors of some experts."""
        for expert in experts:
            for layer in range(num_layers):
                for projection in PROJECTIONS:
                    yield self.expert_tensor(layer, expert, projection)

    def is_backbone(self, name: str) -> bool:
        """Return whether a layer's tensor is neither gate nor expert."""
        return f".{self.block}." not in name

    def attention_norms(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what an attention has beside its four matrices, by name within it."""
        return {}

    @abstractmethod
    def modules(self) -> Modules:
        """The classes to compute with; imported when asked for, as transformers takes seconds."""

    def unfit_dense(self, raw: Mapping[str, Any]) -> str | None:
        """What of a dense `config.json` the format cannot express, as "sets …"; else None."""
        field = next((field for field in self.biases if raw.get(field)), None)
        return field and f"sets {field}, which {self.title} cannot express"

    @abstractmethod
    def read_dense(self, raw: Mapping[str, Any]) -> Any:
        """transformers' view of a dense model's `config.json`, with its defaults filled in."""

    @abstractmethod
    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        """Return what `config.json` has beside the fields that all formats share."""

    def unfit_mixture(self, config: Any) -> str | None:
        """Return what of a mixture's configuration is not supported, as "has …"; else None."""
        return None

    @abstractmethod
    def sizes(self, config: Any) -> tuple[int, int]:
        """(num_experts, intermediate size of an expert) of a mixture's configuration."""

    @abstractmethod
    def dense_fields(self, config: Any) -> dict[str, Any]:
        """Settings of one expert as a dense model, from a mixture's configuration."""
