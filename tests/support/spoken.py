"""Samples that a sum of models' deltas predicts best."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Family
from tests.support.naive import load_model
from upit_merge.data.tokens import SeedSet, TokenizedSample


def spoken(family: Family, count: int, scale: float = 0.5) -> SeedSet:
    """What the base plus a scaled sum of the deltas says: nothing predicts it as well."""
    dense = [load_model(path) for path in (family.base, *family.checkpoints)]
    model = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32).eval()
    state = {
        name: base + scale * sum(other[name].float() - base for other in dense[1:])
        for name, base in ((name, dense[0][name].float()) for name in dense[0])
    }
    model.load_state_dict(state, strict=False)
    samples = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for index in range(count):
            ids = torch.randint(3, 259, (1, 1))
            with torch.no_grad():
                for _ in range(24 + index % 5):
                    chances = (model(ids).logits[0, -1] / 0.7).softmax(-1)
                    ids = torch.cat([ids, chances.multinomial(1)[None]], 1)
            samples.append(TokenizedSample(ids[0].tolist(), 1, f"sample {index}"))
    return SeedSet(samples, max_length=64)
