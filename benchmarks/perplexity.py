"""How well held-out documents are predicted: by a model in memory, by a mixture's folder."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from upit_merge.config.router import RouterSettings
from upit_merge.engine.layerwise import LayerwiseMixture
from upit_merge.models.mixture import opened_mixture
from upit_merge.router.evaluation import Evaluation, Groups, run_mixture
from upit_merge.router.pretrain import seed_set_for
from upit_merge.router.stage import RouterStage


@torch.no_grad()
def set_gates(model: PreTrainedModel, gates: Sequence[Tensor]) -> None:
    """Give a loaded Mixtral other gates, one (num_experts, hidden_size) per layer."""
    for layer, gate in zip(model.model.layers, gates, strict=True):
        layer.mlp.gate.weight.copy_(gate)


@torch.inference_mode()
def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = 128,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """The model's loss on every document.

    Documents of like length share a batch, padded on the right; under causal attention no real
    token sees that padding, so no attention mask is needed.

    Args:
        model: any causal language model; put into evaluation mode and left there.
        tokenizer: the model's; adds BOS, which is context and never a target.
        texts: documents; each is cut at ``max_length`` tokens.
        max_length: in tokens, BOS included.
        batch_size: in documents.

    Returns:
        Two tensors [len(texts)]: summed negative log-likelihood in nats (float64) and the number
        of target tokens (int64). A document without a target has 0 and 0.
    """
    model.eval()
    documents = [
        torch.tensor(ids)
        for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    ]
    order = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    nll = torch.zeros(len(documents), dtype=torch.float64)
    targets = torch.zeros(len(documents), dtype=torch.int64)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [documents[row] for row in rows]
        inputs = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)  # [documents, length]
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits.float().cpu()
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )  # [documents, length - 1]; 0 where there is no target
        nll[rows] = losses.double().sum(dim=1)
        targets[rows] = (labels[:, 1:] != -100).sum(dim=1)
    return nll, targets


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = 128,
    batch_size: int = 16,
) -> float:
    """exp(mean negative log-likelihood over all target tokens of ``texts``)."""
    nll, targets = document_losses(model, tokenizer, texts, max_length, batch_size)
    return math.exp(nll.sum().item() / targets.sum().item())


def mixture_perplexity(
    folder: Path, gates: Sequence[Tensor], data: Path, max_length: int = 512
) -> float:
    """Geometric mean over the domains of a mixture's perplexity, layer by layer on the CPU.

    Args:
        folder: The mixture, with its tokenizer.
        gates: Instead of its own, (num_experts, hidden_size) per layer.
        data: Held-out documents with the column `domain`.
        max_length: In tokens.
    """
    with opened_mixture(folder) as moe, tempfile.TemporaryDirectory() as scratch:
        model = LayerwiseMixture(moe, torch.device("cpu"))
        settings = RouterSettings(data=str(data), max_length=max_length)
        seeds = seed_set_for(model, folder, settings, 0, column="domain")
        stage = RouterStage(model, seeds, settings, 0, Path(scratch), quiet=True)
        sums, routing = run_mixture(stage, list(gates))
    groups = Groups.of(seeds.samples)
    found = Evaluation(seeds.samples, groups, sums, routing)
    return geometric_mean(
        found.perplexity(members)
        for name, members in groups.members.items()
        if name != groups.whole
    )


def average_model(checkpoints: Sequence[Path]) -> PreTrainedModel:
    """Return the checkpoint whose weights are the mean of all."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints[0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in checkpoints[1:]:
        other = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for name, tensor in state.items():
            tensor += other[name]
    model.load_state_dict({name: tensor / len(checkpoints) for name, tensor in state.items()})
    return model
