"""The paper's joint loss of one expert once more, naively: plain autograd, one sample at a time.

Shares no code with the package, so that agreement means something.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import Family
from tests.support.naive import PROJECTIONS, load_model
from upit_merge.data.tokens import TokenizedSample

EXPERT = 1

# Different lengths, the shortest possible sample, and one with a single target.
LENGTHS = [(17, 1), (2, 1), (30, 29), (9, 4), (23, 11)]


def bucket() -> list[TokenizedSample]:
    generator = torch.Generator().manual_seed(5)
    return [
        TokenizedSample(
            torch.randint(3, 259, (length,), generator=generator).tolist(), start, f"sample {i}"
        )
        for i, (length, start) in enumerate(LENGTHS)
    ]


def some_vectors() -> Tensor:
    """Not zero: at zero the routing loss does not reach the FFNs."""
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(6)) * 0.5


def dense_model(family: Family) -> Any:
    """The expert in transformers' own class: the last checkpoint with another one's FFN."""
    dense = AutoModelForCausalLM.from_pretrained(family.checkpoints[-1], dtype=torch.float32)
    ffn = load_model(family.checkpoints[EXPERT])
    dense.load_state_dict({n: t for n, t in ffn.items() if ".mlp." in n}, strict=False)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return dense.eval()


def naive_loss(dense: Any, vectors: Tensor, samples: list[TokenizedSample], alpha: float) -> Tensor:
    """Word for word: a sum over samples, layers and tokens, without batches or padding."""
    seen: list[Tensor] = []
    handles = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output[0])
        )
        for layer in dense.model.layers
    ]
    language, targets, routing, tokens = torch.zeros(()), 0, torch.zeros(()), 0
    for sample in samples:
        seen.clear()
        logits = dense(torch.tensor([sample.input_ids])).logits[0]
        for position in range(sample.loss_start, len(sample.input_ids)):
            probability = logits[position - 1].softmax(-1)[sample.input_ids[position]]
            language = language - probability.log()
            targets += 1
        for layer, router_input in enumerate(seen):
            routing = routing - torch.sigmoid(router_input @ vectors[layer]).log().sum()
            tokens += len(sample.input_ids)
    for handle in handles:
        handle.remove()
    return alpha * language / targets + (1 - alpha) * routing / tokens


def naive_gradients(dense: Any, vectors: Tensor, alpha: float) -> tuple[float, dict[str, Tensor]]:
    vectors = vectors.clone().requires_grad_()
    loss = naive_loss(dense, vectors, bucket(), alpha)
    loss.backward()
    gradients = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients | {"vectors": vectors.grad}


def by_dense_name(ffn: dict[str, Tensor]) -> dict[str, Tensor]:
    """An expert's FFN by the names of the dense model."""
    return {
        f"model.layers.{layer}.mlp.{projection}.weight": ffn[
            f"model.layers.{layer}.block_sparse_moe.experts.{EXPERT}.{short}.weight"
        ]
        for layer in range(2)
        for projection, short in PROJECTIONS.items()
    }
