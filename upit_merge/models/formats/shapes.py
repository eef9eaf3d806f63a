"""Names and shapes of what dense models and mixtures are made of, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The matrices of a dense FFN, in the order in which files hold them.
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
# How an expert's matrices lie in memory, and in the files of formats that pack them.
FUSED: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a mixture may have beside experts, by names that are ours: `shared` says what its always-on
# expert is, `dense_layers` how many of its first layers are no mixtures.
PLAIN: Mapping[str, Any] = {"shared": "none", "dense_layers": 0}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def routed_size(settings: Mapping[str, Any]) -> int:
    """Return the intermediate size of an expert: of a split FFN, half of it is shared."""
    size = int(settings["intermediate_size"])
    return size // 2 if settings["shared"] == "split" else size


def ffn_tensor(layer: int, projection: str) -> str:
    """Name of a dense model's FFN projection."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def shared_tensor(layer: int, projection: str) -> str:
    """Name of the half of a dense model's FFN projection that is shared, where it is split."""
    return f"model.layers.{layer}.mlp.shared.{projection}.weight"


def is_shared(dense: str) -> bool:
    """Return whether a name is one of `shared_tensor`'s."""
    return ".mlp.shared." in dense


def mixture_layers(settings: Mapping[str, Any]) -> range:
    """Return the layers that are mixtures."""
    return range(settings["dense_layers"], settings["num_hidden_layers"])


def llama_shapes(settings: Mapping[str, Any]) -> Shapes:
    """Yield the tensors of a Llama with the qualities that are shapes, in model order."""
    hidden, head = settings["hidden_size"], settings["head_dim"]
    queries, keys = (settings[f"num_{f}_heads"] * head for f in ("attention", "key_value"))
    yield EMBEDDINGS, (settings["vocab_size"], hidden)
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{prefix}self_attn.{name}.weight", (size, hidden)
            if settings["attention_bias"]:
                yield f"{prefix}self_attn.{name}.bias", (size,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        if settings["output_bias"]:
            yield f"{prefix}self_attn.o_proj.bias", (hidden,)
        if settings["qk_norm"]:
            yield f"{prefix}self_attn.q_norm.weight", (head,)
            yield f"{prefix}self_attn.k_norm.weight", (head,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield from ffn_shapes(settings, layer)
    yield "model.norm.weight", (hidden,)
    if not settings["tie_word_embeddings"]:
        yield HEAD, (settings["vocab_size"], hidden)


def ffn_shapes(settings: Mapping[str, Any], layer: int) -> Shapes:
    """Yield the tensors of a layer's dense FFN; halves of them, where these are split."""
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    names = [ffn_tensor]
    if settings["shared"] == "split" and layer in mixture_layers(settings):
        inner //= 2
        names = [shared_tensor, ffn_tensor]
    for name in names:
        for projection in PROJECTIONS:
            shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
            yield name(layer, projection), shape


def fits_grouped_products(sizes: Iterable[int]) -> bool:
    """Return whether torch multiplies experts of such rows and columns together, in any dtype.

    By `torch.nn.functional.grouped_mm`, as transformers 5 does unless told otherwise: it takes rows
    of a multiple of 16 bytes (torch 2.13), which are 8 numbers of 16 bits.
    """
    return not any(size % 8 for size in sizes)
