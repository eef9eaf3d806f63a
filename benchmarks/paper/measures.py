"""What benchmarks.paper measures of a model: perplexity, exact match, routing, parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.paper.data import last_number
from benchmarks.perplexity import perplexity
from upit_merge.data.tokens import TokenizedSample
from upit_merge.demo.training import pack
from upit_merge.router.evaluation import Evaluation, Groups, Routing

MAX_ANSWER_TOKENS = 6  # an answer is one number, then the line ends
ROUTING_ROWS = 32  # of every domain


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Sequence[str]],
    context: int,
) -> list[float]:
    """On the held-out documents of every domain."""
    return [perplexity(model, tokenizer, texts, context, batch_size=32) for texts in heldout]


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[tuple[str, str]],
) -> float:
    """Share of problems whose greedily generated first line ends in the right number.

    Prompts of one length share a batch, so that no token has to be padded.
    """
    model.eval()
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for prompt, answer in problems:
        ids = tokenizer(prompt)["input_ids"]
        by_length[len(ids)].append((ids, answer))
    # A line's end, wherever byte-level BPE has merged it with what follows.
    ends = [token for text, token in tokenizer.get_vocab().items() if text.startswith("Ċ")]
    right = 0
    for length, group in by_length.items():
        ids = torch.tensor([prompt for prompt, _ in group], device=model.device)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(MAX_ANSWER_TOKENS, model.config.max_position_embeddings - length),
            eos_token_id=[*ends, tokenizer.bos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        right += sum(last_number(text) == a for text, (_, a) in zip(texts, group, strict=True))
    return right / len(problems)


@torch.inference_mode()
def routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Sequence[str]],
    context: int,
) -> dict[str, float]:
    """Of a mixture on held-out rows of all domains.

    Returns:
        `token` and `load`, entropies from 0 to 1 as `upit-merge evaluate` gives them: of a token's
        routing probabilities and of the experts' shares; `dead`, the share of experts, over all
        layers, that get less than a tenth of an even share.
    """
    model.eval()
    config = model.config
    packed = [pack(tokenizer, texts, context)[:ROUTING_ROWS] for texts in heldout]
    rows = torch.cat(packed)
    samples = [TokenizedSample(row, 1, "held-out") for row in rows.tolist()]
    counted = Routing(len(samples), config.num_hidden_layers, config.num_local_experts)
    count = counted.counter(samples)
    for indices in torch.arange(len(rows)).split(ROUTING_ROWS):
        output = model(
            input_ids=rows[indices].to(model.device), use_cache=False, output_router_logits=True
        )
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=1).indices
            count(layer, tuple(indices.tolist()), logits.float(), chosen)
    every = Evaluation(samples, Groups.of(samples), torch.zeros(len(samples)), counted)
    places = config.num_hidden_layers * config.num_local_experts
    return {**every.entropy(range(len(samples))), "dead": len(every.dead()) / places}


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Of the whole model, and those that a token meets."""
    total = sum(weight.numel() for weight in model.parameters())
    experts = sum(
        weight.numel() for name, weight in model.named_parameters() if ".mlp.experts." in name
    )
    if not experts:
        return {"total": total, "active": total}
    share = model.config.num_experts_per_tok / model.config.num_local_experts
    return {"total": total, "active": round(total - experts * (1 - share))}
