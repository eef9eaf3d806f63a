"""What an output format has to say; everything else is common to all of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from upit_merge.io.sources import TensorSource
from upit_merge.models.families import FAMILIES, QUALITIES, SHARED_FIELDS, DenseFamily
from upit_merge.models.formats.choosing import to_beat_by_softmax
from upit_merge.models.formats.shapes import (
    EMBEDDINGS,
    HEAD,
    PLAIN,
    PROJECTIONS,
    Shapes,
    llama_shapes,
)


@dataclass(frozen=True)
class Constant:
    """A tensor of a mixture that no dense model has, all of one value."""

    name: str
    shape: tuple[int, ...]
    value: float = 0.0


class MixtureFormat(ABC):
    """Names and settings of a mixture on disk, as its published checkpoints have them.

    A mixture's tensors are spoken of one by one: the matrices of every expert, the gates, and the
    rest, the backbone. Where a format packs the experts of a layer into one tensor, or calls
    tensors otherwise in its files, `packed` and `stored_name` say so, and only what reads and
    writes files knows.

    Attributes:
        name: `model_type` of the output, and a recipe's `architecture:`.
        title: What people call it.
        class_name: The class that `config.json` names.
        block: What the mixture of a layer is called in tensors' names.
        gate: What the gate is called in the block.
        choice_bias: What the router has in the block that is added to scores only to choose by.
        projections: What an expert's matrices are called, by their dense names.
        packed: Names, in the block, of tensors that hold all experts of a layer, and which of
            `FUSED` they are; empty if every expert has its own.
        count_field: The setting with the number of experts.
        inner_field: The setting with the intermediate size of an expert.
        expresses: Those of `families.QUALITIES` that it has a place for.
        more_fields: Settings beside the shared ones that shape its computation.
        shared: Kinds of an always-on expert that it can have; the first is the default.
        has_dense_layers: Its first layers may be dense.
        can_tie: Its readers take the embeddings for the head if `tie_word_embeddings` says so;
            else an output has both tables.
        wanted_tokens: Some reader expects the tokenizer to know these.
        readers: Programs that run it, and what is special there ("" if nothing).
        fewest_experts: Its router needs so many.
        peft_knows: PEFT finds the experts in memory by what they are called in files.
        gate_path, experts_path: Modules of a decoder layer in transformers' memory: that with the
            gate's weight, whose inputs are what the gate sees, and that of the experts.
        adds_output: What the experts give is added to the stream, at most multiplied: no norm is
            between.
        attention: Which of transformers' ways to compute attention the layers have; `sdpa` makes no
            matrix for a causal mask.
        router_is_linear: What `gate_path` names returns logits alone, and no choice.
        dense_type: `model_type` of the dense model that one expert is, see `dense_type_of`.
        is_part: It is published as a part of a larger model, which is what `config.json` names.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    class_name: ClassVar[str]
    block: ClassVar[str]
    gate: ClassVar[str] = "gate.weight"
    chosen_field: ClassVar[str] = "num_experts_per_tok"
    choice_bias: ClassVar[str | None] = None
    projections: ClassVar[Mapping[str, str]] = {name: name for name in PROJECTIONS}
    packed: ClassVar[Mapping[str, str]] = {}
    count_field: ClassVar[str]
    inner_field: ClassVar[str] = "intermediate_size"
    expresses: ClassVar[frozenset[str]] = frozenset()
    more_fields: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ("none",)
    has_dense_layers: ClassVar[bool] = False
    can_tie: ClassVar[bool] = True
    wanted_tokens: ClassVar[tuple[str, ...]] = ()
    readers: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("transformers", "vLLM", "llama.cpp", "mlx-lm"), ""
    )
    fewest_experts: ClassVar[int] = 1
    peft_knows: ClassVar[bool] = True
    gate_path: ClassVar[str] = "mlp.gate"
    experts_path: ClassVar[str] = "mlp.experts"
    adds_output: ClassVar[bool] = True
    attention: ClassVar[str] = "sdpa"
    is_part: ClassVar[bool] = False
    router_is_linear: ClassVar[bool] = False
    dense_type: ClassVar[str]

    @property
    def family(self) -> DenseFamily:
        """The dense models of `dense_type`."""
        return FAMILIES[self.dense_type]

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Return whether a `config.json` is that of such a mixture."""
        return config.get("model_type") == self.name

    # ---- names -----------------------------------------------------------------------------

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"model.layers.{layer}."

    def in_block(self, name: str) -> str:
        """What something in the mixture of a layer is called in the layer."""
        return f"{self.block}.{name}" if self.block else name

    def gate_tensor(self, layer: int) -> str:
        """Name of a layer's gate, shape (num_experts, hidden_size)."""
        return f"{self.layer_prefix(layer)}{self.in_block(self.gate)}"

    def expert_tensor(self, layer: int, expert: int, projection: str) -> str:
        """Name of an expert's projection (`gate_proj`, `up_proj`, `down_proj`)."""
        within = f"experts.{expert}.{self.projections[projection]}.weight"
        return f"{self.layer_prefix(layer)}{self.in_block(within)}"

    @cached_property
    def expert_pattern(self) -> re.Pattern[str]:
        """Matches the names of experts' tensors: `layer`, `expert` and `kind`, as in the file."""
        kinds = "|".join(self.projections.values())
        number = r"(?P<{}>0|[1-9]\d{{0,3}})"
        return re.compile(
            rf"model\.layers\.{number.format('layer')}\.{re.escape(self.in_block('experts'))}\."
            rf"{number.format('expert')}\.(?P<kind>{kinds})\.weight"
        )

    def gate_names(self, layers: Iterable[int]) -> list[str]:
        """Return names of the gates of some layers."""
        return [self.gate_tensor(layer) for layer in layers]

    def expert_names(self, layers: Iterable[int], experts: Iterable[int]) -> Iterator[str]:
        """Yield names of all tensors of some experts."""
        layers = list(layers)
        for expert in experts:
            for layer in layers:
                for projection in PROJECTIONS:
                    yield self.expert_tensor(layer, expert, projection)

    def is_backbone(self, name: str) -> bool:
        """Return whether a layer's tensor is neither gate nor expert."""
        return not (
            name.endswith(f".{self.in_block(self.gate)}") or self.expert_pattern.fullmatch(name)
        )

    def stored_name(self, name: str) -> str:
        """What a tensor that is not packed is called in published files."""
        return name

    def plain_name(self, stored: str) -> str:
        """Undo `stored_name`, for names that it would not give, too."""
        return stored

    # ---- settings --------------------------------------------------------------------------

    def readers_of(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the programs that run a mixture of these settings, see `readers`."""
        return self.readers

    def unfit(self, settings: Mapping[str, Any]) -> str | None:
        """What of a dense model's settings it cannot express, as "sets …"; else None.

        Qualities are named as in `QUALITIES`.

        Args:
            settings: See `DenseFamily.settings`.
        """
        for field, plain in QUALITIES.items():
            if field not in self.expresses and settings[field] != plain:
                return f"sets {field}, which {self.title} cannot express"
        return None

    def caution(self, settings: Mapping[str, Any]) -> str | None:
        """What people should know before they publish such a mixture, as a sentence."""
        return None

    def fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        """Return what of its `config.json` follows from a dense model's settings.

        Rope settings are not among the results, see `rope_fields`.
        """
        shared = {field: settings[field] for field in SHARED_FIELDS if field != "rope_parameters"}
        shared["tie_word_embeddings"] = self.can_tie and shared["tie_word_embeddings"]
        return {**shared, **self.own_fields(settings, num_experts)}

    def rope_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rope settings under the names that every reader knows.

        Those are transformers 4's, vLLM's and llama.cpp's; transformers 5 reads them too.
        """
        rope = dict(settings["rope_parameters"])
        rope_theta = rope.pop("rope_theta")
        rope.pop("partial_rotary_factor", None)
        scaled = rope.get("rope_type", "default") != "default"
        return {"rope_theta": rope_theta, "rope_scaling": rope if scaled else None}

    @abstractmethod
    def own_fields(self, settings: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
        """Return what `config.json` has beside the fields that all formats share."""

    def document(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return `config.json` as it is published, of all its fields: mostly these."""
        return dict(fields)

    def language_part(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a mixture's own fields in its `config.json`; undoes `document`."""
        return raw

    def with_language_part(
        self, raw: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a `config.json` with other fields of its own."""
        return dict(fields)

    def wanted_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields of its own that some reader insists on, and others do not write."""
        return {}

    def read(self, raw: Mapping[str, Any]) -> Any:
        """transformers' view of a mixture's `config.json`, with its defaults filled in."""
        import transformers

        config_class: Any = getattr(transformers, self.class_name).config_class
        return config_class.from_dict(dict(self.language_part(raw)))

    def unfit_mixture(self, config: Any) -> str | None:
        """Return what of a mixture's configuration is not supported, as "has …"; else None."""
        return None

    @abstractmethod
    def sizes(self, config: Any) -> tuple[int, int]:
        """(num_experts, intermediate size of an expert) of a mixture's configuration."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the router makes of its logits before it chooses, (tokens, num_experts).

        Biases that only decide who is chosen are not in it. The weights of the chosen are as these.
        """
        return logits.softmax(1)

    def to_beat(self, logits: torch.Tensor, leads: torch.Tensor) -> torch.Tensor:
        """Return the logit with which one more expert is chosen before each, (tokens, num_experts).

        Args:
            logits: The others', of this shape.
            leads: What each of them has of `choice_bias`, less what the new one has, (num_experts,).
        """
        return to_beat_by_softmax(logits, leads)

    def chosen(self, config: Any) -> int:
        """Return how many experts a mixture's configuration sends a token to."""
        return int(config.num_experts_per_tok)

    def with_chosen(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return a `config.json` with another number of experts per token."""
        inner = config.get("text_config")
        if isinstance(inner, Mapping):
            return {**config, "text_config": {**inner, self.chosen_field: count}}
        return {**config, self.chosen_field: count}

    def settings(self, config: Any) -> dict[str, Any]:
        """Return the settings that one expert would have as a dense model.

        Args:
            config: A mixture's, from `read`.
        """
        shared = {field: getattr(config, field, None) for field in SHARED_FIELDS}
        shared["intermediate_size"] = self.sizes(config)[1]
        shared["head_dim"] = shared["head_dim"] or (
            config.hidden_size // config.num_attention_heads
        )
        more = {field: getattr(config, field, None) for field in self.more_fields}
        return {**shared, **QUALITIES, **PLAIN, **more, **self.qualities(config)}

    def qualities(self, config: Any) -> Mapping[str, Any]:
        """Return in which of `QUALITIES` and `PLAIN` a mixture differs, by its configuration."""
        return {}

    def dense_type_of(self, settings: Mapping[str, Any]) -> str:
        """Return the `model_type` of the dense model that one expert of a mixture is.

        Args:
            settings: See `settings`.
        """
        return self.dense_type

    def unfit_dense(self, settings: Mapping[str, Any], config: Any) -> str | None:
        """Return why one expert is no dense model that there is, as "has …"; else None."""
        return None

    # ---- tensors ---------------------------------------------------------------------------

    def dense_shapes(self, settings: Mapping[str, Any]) -> Shapes:
        """Yield the tensors of a dense model of these settings, in model order."""
        return llama_shapes(settings)

    def backbone_names(self, dense: str) -> tuple[str, ...]:
        """What a dense model's tensor that is no expert's is called in the mixture: mostly alike.

        There may be several that are all it.
        """
        return (dense,)

    def outputs_of(self, dense: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Return all tensors of the mixture that are a dense model's, see `backbone_names`."""
        names = self.backbone_names(dense)
        if dense == EMBEDDINGS and settings["tie_word_embeddings"] and not self.can_tie:
            names = (*names, HEAD)
        return names

    def factor(self, dense: str) -> float:
        """By what such a tensor is multiplied."""
        return 1.0

    def constants(self, settings: Mapping[str, Any], num_experts: int) -> Iterator[Constant]:
        """Yield the tensors that no dense model has, gates aside."""
        yield from ()

    def norm_factors(self, model: TensorSource, layer: int) -> torch.Tensor:
        """By what the norm before a layer's gate multiplies what it has normalised, (hidden_size,).

        Args:
            model: Dense or the mixture: norms are called alike in both.
        """
        return model.tensor(f"{self.layer_prefix(layer)}post_attention_layernorm.weight")

    # ---- computation -----------------------------------------------------------------------

    def model(self, config: Any) -> Any:
        """transformers' model of a configuration, without weights."""
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.class_name)(config)

    def memory_name(self, within: str) -> str:
        """What transformers has in memory for a tensor of the backbone.

        Args:
            within: Its published name, in a layer.
        """
        return within

    def final_norm(self, body: Any) -> Any:
        """The norm after the last layer, of transformers' model without its head."""
        return body.norm

    @property
    def final_norm_tensor(self) -> str:
        """Name of that norm's weight."""
        return "model.norm.weight"

    def unfit_router(self, config: Any) -> str | None:
        """Why the router cannot be pre-trained layer by layer, as a clause; else None."""
        return None

    def embedding_scale(self, config: Any) -> float:
        """By what embeddings are multiplied before the first layer."""
        return 1.0

    def logits_scale(self, config: Any) -> float:
        """By what the head's results are multiplied."""
        return 1.0

    def logits_cap(self, config: Any) -> float | None:
        """The c of c · tanh(logits / c), if they pass that."""
        return None

    def logits(self, outputs: torch.Tensor, config: Any) -> torch.Tensor:
        """Return logits from what the head's matrix gives, (tokens, vocab_size)."""
        scale, cap = self.logits_scale(config), self.logits_cap(config)
        if scale != 1:
            outputs = outputs * scale
        return outputs if cap is None else cap * torch.tanh(outputs / cap)
