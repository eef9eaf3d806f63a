"""The output format: Mixtral's configuration and tensor names, from a dense Llama or Mistral."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upit_merge.checkpoints import Checkpoint, check_same_tensors
from upit_merge.errors import UpitError
from upit_merge.tensor_files import TensorSource, TensorSpec

MODEL_TYPES = ("llama", "mistral")

# A dense FFN projection and what Mixtral's published checkpoints call it: transformers, vLLM and
# llama.cpp read these names; transformers 5 fuses them in memory only.
PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# Settings that shape the computation, hence must be the same in every model.
_SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)
_CARRIED_FIELDS = ("initializer_range", "max_position_embeddings", "use_cache")
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def expert_tensor(layer: int, expert: int, projection: str) -> str:
    """Canonical Mixtral name of an expert's projection (`gate_proj`, `up_proj`, `down_proj`)."""
    return (
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{PROJECTIONS[projection]}.weight"
    )


def expert_names(num_layers: int, experts: Iterable[int]) -> Iterator[str]:
    """Canonical names of all tensors of some experts."""
    for expert in experts:
        for layer in range(num_layers):
            for projection in PROJECTIONS:
                yield expert_tensor(layer, expert, projection)


def gate_tensor(layer: int) -> str:
    """Canonical Mixtral name of a layer's gate, shape (num_experts, hidden_size)."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def norm_tensor(layer: int) -> str:
    """Name of the norm before a layer's gate, shape (hidden_size,)."""
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def ffn_tensor(layer: int, projection: str) -> str:
    """Name of a dense model's FFN projection."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


@dataclass(frozen=True)
class DenseArchitecture:
    """What all models of a merge have in common.

    Attributes:
        settings: Values of the configuration that shape the computation.
        specs: Every tensor of the base that the output needs, by dense name.
    """

    settings: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]

    @property
    def num_layers(self) -> int:
        return int(self.settings["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.settings["hidden_size"])

    def ffn_names(self) -> Iterator[tuple[int, str, str]]:
        """(layer, projection, dense tensor name) of every FFN tensor, in layer order."""
        for layer in range(self.num_layers):
            for projection in PROJECTIONS:
                yield layer, projection, ffn_tensor(layer, projection)

    def backbone_names(self) -> list[str]:
        """Everything that is not FFN: attention, norms, embeddings, head."""
        ffn = {name for _layer, _projection, name in self.ffn_names()}
        return [name for name in self.specs if name not in ffn]


def _expected_shapes(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a dense Llama or Mistral without biases, in model order."""
    hidden, inner, head = (settings[f] for f in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (settings[f"num_{f}_heads"] * head for f in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (settings["vocab_size"], hidden)
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
    yield "model.norm.weight", (hidden,)
    if not settings["tie_word_embeddings"]:
        yield "lm_head.weight", (settings["vocab_size"], hidden)


def _dense_config(checkpoint: Checkpoint) -> Any:
    """transformers' view of a dense configuration, with its defaults filled in.

    Raises:
        UpitError: it is not a Llama or Mistral, or uses something Mixtral cannot express.
    """
    from transformers import LlamaConfig, MistralConfig, MixtralConfig
    from transformers.activations import ACT2FN

    raw = checkpoint.config
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UpitError(
            f"Checkpoint {checkpoint.label} has model_type {model_type!r}; Mixtral output needs "
            f"{' or '.join(MODEL_TYPES)} checkpoints."
        )
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise UpitError(
                f"Checkpoint {checkpoint.label} sets {field}, which Mixtral cannot express; use a "
                "model without biases."
            )
    if "quantization_config" in raw:
        raise UpitError(
            f"Checkpoint {checkpoint.label} is quantised (quantization_config); use the "
            "unquantised checkpoint."
        )
    try:
        dense = LlamaConfig if model_type == "llama" else MistralConfig
        config = dense.from_dict(dict(raw))
        # What the output could not be loaded with must show now, not after the merge.
        MixtralConfig.from_dict(_settings(config) | _carried(config))
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is unknown")
        return config
    except Exception as error:  # validation errors of transformers and of huggingface_hub
        reason = " ".join(str(error).split())
        raise UpitError(
            f"The config.json of checkpoint {checkpoint.label} is not a valid {model_type} "
            f"configuration ({reason}); copy or download it again."
        ) from None


def _settings(config: Any) -> dict[str, Any]:
    settings = {field: getattr(config, field, None) for field in _SHARED_FIELDS}
    if config.model_type == "llama":  # keeps the key if it is there but does not act on it
        settings["sliding_window"] = None
    return settings


def _carried(config: Any) -> dict[str, Any]:
    carried = {field: getattr(config, field, None) for field in _CARRIED_FIELDS}
    return carried | {"attention_dropout": config.attention_dropout or 0.0}


def context_length(checkpoint: Checkpoint) -> int:
    """The longest input, in tokens, that a dense checkpoint's configuration allows."""
    return int(_dense_config(checkpoint).max_position_embeddings)


def inspect_models(base: Checkpoint, checkpoints: Sequence[Checkpoint]) -> DenseArchitecture:
    """Check that the models fit together and can become one Mixtral.

    Raises:
        UpitError: naming the checkpoint and the field or tensor that does not fit.
    """
    config = _dense_config(base)
    settings = _settings(config)
    for checkpoint in checkpoints:
        theirs = _dense_config(checkpoint)
        if checkpoint.config["model_type"] != base.config["model_type"]:
            raise UpitError(
                f"Checkpoint {checkpoint.label} is a {checkpoint.config['model_type']} model, the "
                f"base {base.label} a {base.config['model_type']}; all must come from one base."
            )
        for field, value in _settings(theirs).items():
            if value != settings[field]:
                remedy = (
                    "resize the base's embeddings to the tokenizer the checkpoints were trained "
                    "with"
                    if field == "vocab_size"
                    else "all models must come from the same base"
                )
                raise UpitError(
                    f"Checkpoint {checkpoint.label} has {field} {value}, the base {base.label} has "
                    f"{settings[field]}; {remedy}."
                )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _expected_shapes(settings):
        spec = base.specs.get(name)
        if spec is None or spec.shape != shape:
            found = "lacks it" if spec is None else f"has it in shape {list(spec.shape)}"
            raise UpitError(
                f"The base {base.label} should have {name} of shape {list(shape)} by its "
                f"config.json but {found}; use a complete checkpoint."
            )
        shapes[name] = shape
    for checkpoint in (base, *checkpoints):
        _refuse_unknown_tensors(checkpoint, shapes)
    check_same_tensors(base, checkpoints, shapes)
    return DenseArchitecture(settings, {name: base.specs[name] for name in shapes})


def _refuse_unknown_tensors(checkpoint: Checkpoint, shapes: Mapping[str, Any]) -> None:
    for name in checkpoint.specs:
        # Old checkpoints carry rotary tables, tied ones a copy of the embeddings: both are derived.
        if name in shapes or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight":
            continue
        raise UpitError(
            f"Checkpoint {checkpoint.label} has the tensor {name}, which Mixtral has no place for; "
            "use a plain Llama or Mistral checkpoint without biases or adapters."
        )


def stored_dtype(checkpoint: Checkpoint, architecture: DenseArchitecture) -> torch.dtype:
    """The widest dtype among a checkpoint's tensors that matter."""
    dtypes = {checkpoint.specs[name].dtype for name in architecture.specs}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))


def default_dtype(base: Checkpoint, architecture: DenseArchitecture) -> torch.dtype:
    """The output's dtype when the recipe names none: the base's, but never above float32."""
    dtype = stored_dtype(base, architecture)
    return torch.float32 if dtype == torch.float64 else dtype


def moe_config(
    donor: Checkpoint,
    token_donor: Checkpoint,
    num_experts: int,
    experts_per_token: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The output's `config.json`.

    Rope settings and dtype are written under the names that every reader knows (transformers 4
    and 5, vLLM, llama.cpp), not under those only transformers 5 writes.

    Args:
        donor: The checkpoint whose settings the output carries.
        token_donor: The one whose special token ids it carries, that of the tokenizer.
    """
    config = _dense_config(donor)
    tokens = _dense_config(token_donor)
    rope = dict(config.rope_parameters)
    rope_theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    content = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{
            field: value for field, value in _settings(config).items() if field != "rope_parameters"
        },
        **_carried(config),
        **{field: getattr(tokens, field, None) for field in _TOKEN_FIELDS},
        "rope_theta": rope_theta,
        "rope_scaling": rope if scaled else None,
        "num_local_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return dict(sorted(content.items()))


def moe_specs(
    architecture: DenseArchitecture, num_experts: int, dtype: torch.dtype
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The output's tensors: all but the gates in model order, and the gates."""
    body = []
    projections = {name: (layer, p) for layer, p, name in architecture.ffn_names()}
    for name, spec in architecture.specs.items():
        if name not in projections:
            body.append(TensorSpec(name, spec.shape, dtype))
            continue
        layer, projection = projections[name]
        for expert in range(num_experts):
            body.append(TensorSpec(expert_tensor(layer, expert, projection), spec.shape, dtype))
    gates = [
        TensorSpec(gate_tensor(layer), (num_experts, architecture.hidden_size), dtype)
        for layer in range(architecture.num_layers)
    ]
    return body, gates


def check_moe(moe: TensorSource, config: Any) -> None:
    """Check that a Mixtral folder has every tensor, under its published name and in its shape.

    Args:
        config: The folder's `MixtralConfig`.

    Raises:
        UpitError: naming the tensor that is missing or has another shape.
    """
    settings = _settings(config)
    settings["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    ffn = {f"mlp.{projection}.weight": projection for projection in PROJECTIONS}

    def expected() -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in _expected_shapes(settings):
            _model, layers, *rest = name.split(".", 3)
            if layers != "layers" or rest[1] not in ffn:
                yield name, shape
                continue
            for expert in range(config.num_local_experts):
                yield expert_tensor(int(rest[0]), expert, ffn[rest[1]]), shape
        for layer in range(config.num_hidden_layers):
            yield gate_tensor(layer), (config.num_local_experts, config.hidden_size)

    shapes = dict(expected())
    for name in moe.specs:
        # As in dense models: tables that are derived, a copy of tied embeddings.
        if not (name in shapes or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"):
            raise UpitError(
                f"{moe.label} has the tensor {name}, which a Mixtral has not; the router needs a "
                "plain Mixtral, such as the output of a upit recipe."
            )
    if config.num_experts_per_tok > config.num_local_experts:
        raise UpitError(
            f"The config.json of {moe.label} routes a token to {config.num_experts_per_tok} of "
            f"{config.num_local_experts} experts; correct num_experts_per_tok."
        )
    for name, shape in shapes.items():
        spec = moe.specs.get(name)
        if spec is None:
            raise UpitError(
                f"{moe.label} has no tensor {name}; the router needs a complete Mixtral under the "
                "published names, such as the output of a upit recipe."
            )
        if spec.shape != shape:
            raise UpitError(
                f"{moe.label} has {name} of shape {list(spec.shape)}, its config.json says "
                f"{list(shape)}; make the model again."
            )
