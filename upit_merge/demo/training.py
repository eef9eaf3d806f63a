"""A small Llama trained on the spot, and fine-tuned so that its checkpoints specialise.

What makes the checkpoints worth a mixture, each measured on held-out text:

* Fine-tuning visits one domain after the other, with little replay. A well-mixed run leaves
  checkpoints that differ only in how long they have trained: nothing to divide among experts.
* It goes round twice. Going once, with two checkpoints per domain, the last checkpoint's attention,
  which all experts share, has drifted too far from the first domain.
* Every visit is a learning-rate cycle that ends at zero. Checkpoints taken at a constant rate are
  so noisy that their plain average beats any choice among them.
* The rate is lower outside the FFN: the FFN becomes the expert, all else is shared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim import Optimizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from upit_merge.demo.corpus import Domain
from upit_merge.demo.progress import DemoFolder
from upit_merge.runtime.work_bar import WorkBar

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TOKENIZER_DOCUMENTS = 800  # per domain, so that none has most of the merges


@dataclass(frozen=True)
class DemoModels:
    """Folders that ``from_pretrained`` loads."""

    base: Path
    checkpoints: list[Path]  # in training order


@dataclass(frozen=True)
class TrainingBudget:
    """Sizes, lengths and learning rates; `foretold_time` says how long they take here.

    A step is one optimiser step on ``batch_size`` sequences of ``context`` tokens. At this budget
    a wider or deeper model ends up worse: it sees too few tokens.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    context: int = 128
    batch_size: int = 8
    base_steps: int = 700
    base_learning_rate: float = 4e-3
    sft_rounds: int = 2  # how often fine-tuning visits every domain; each visit is one checkpoint
    sft_steps: int = 160  # per visit
    sft_learning_rate: float = 7e-3
    backbone_rate: float = 0.15  # learning rate outside the FFN, relative to the FFN's
    replay: float = 0.05  # share of the other domains during a visit

    def cycles(self, domains: int = 3) -> list[tuple[str, int]]:
        """Return the models that are saved, in order, and how many steps lead to each."""
        visits = domains * self.sft_rounds
        tuned = [f"sft/checkpoint-{(visit + 1) * self.sft_steps}" for visit in range(visits)]
        return [("base", self.base_steps), *((name, self.sft_steps) for name in tuned)]


def train_demo_models(
    folder: Path,
    domains: Sequence[Domain],
    *,
    seed: int = 0,
    budget: TrainingBudget | None = None,
    quiet: bool = False,
    progress: DemoFolder | None = None,
) -> DemoModels:
    """Train a base model on all domains, then fine-tune it on one domain after the other.

    The same for a given ``seed`` and number of threads, whether or not it was cut off meanwhile.
    The caller's random state is kept.

    Args:
        folder: receives ``base`` and ``sft/checkpoint-<step>``, each with its tokenizer.
        domains: in the order in which fine-tuning meets them.
        seed: of the initial weights and of the order of the data.
        budget: sizes and lengths; the defaults unless given.
        quiet: no progress bar.
        progress: what an earlier call has done, and where this one keeps what it has; nothing is
            kept if None.

    Returns:
        Where the models are: one checkpoint for each visit of a domain.
    """
    budget = budget or TrainingBudget()
    tokenizer = train_tokenizer(
        [text for domain in domains for text in domain.train[:TOKENIZER_DOCUMENTS]],
        budget.vocab_size,
    )
    generator = torch.Generator().manual_seed(seed)
    streams = [
        sequences(pack(tokenizer, domain.train, budget.context), generator) for domain in domains
    ]
    kept = progress.training() if progress else {}
    written: list[str] = kept.get("written", [])  # folders, in the order of training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(budget, tokenizer))
    if written:
        model = LlamaForCausalLM.from_pretrained(folder / written[-1])
    model.train()

    cycles = budget.cycles(len(domains))
    fine_tuned = [name for name, _steps in cycles[1:]]
    total = sum(steps for _name, steps in cycles)
    with WorkBar(total, total, "train the base model", quiet=quiet, unit="step") as bar:

        def train(
            name: str, steps: int, shares: list[float], optimizer: Optimizer, peaks: list[float]
        ) -> None:
            """Train for one learning-rate cycle; a row's domain is drawn with probability ``shares``."""
            weights, is_done = torch.tensor(shares), name in written
            for step in range(steps):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * learning_rate_cycle(step, steps)
                drawn = torch.multinomial(
                    weights, budget.batch_size, replacement=True, generator=generator
                )
                rows = [next(streams[domain]) for domain in drawn.tolist()]
                if is_done:  # the same text is drawn, so that what follows sees what it would have
                    bar.skip(1)
                    continue
                training_step(model, torch.stack(rows), optimizer)
                bar.advance(1)
            if is_done:
                return
            save(folder / name, model, tokenizer)
            written.append(name)
            if progress:
                progress.keep_training({"written": written, "optimizer": optimizer.state_dict()})

        peaks = [budget.base_learning_rate] * 2
        train("base", budget.base_steps, [1 / len(domains)] * len(domains), adamw(model), peaks)
        optimizer = adamw(model)
        if len(written) > 1:
            optimizer.load_state_dict(kept["optimizer"])
        peaks = [budget.sft_learning_rate, budget.sft_learning_rate * budget.backbone_rate]
        for visit, name in enumerate(fine_tuned):
            current = visit % len(domains)
            bar.set_description(f"fine-tune on {domains[current].name}")
            shares = [budget.replay / max(1, len(domains) - 1)] * len(domains)
            shares[current] = 1 - budget.replay
            train(name, budget.sft_steps, shares, optimizer, peaks)
    return DemoModels(folder / "base", [folder / name for name in fine_tuned])


def training_step(model: LlamaForCausalLM, batch: Tensor, optimizer: Optimizer) -> None:
    """Train on a batch of token ids, (batch_size, context)."""
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE without unknown tokens; BOS before every text; digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def model_config(budget: TrainingBudget, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return model_shape(
        budget,
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def model_shape(budget: TrainingBudget, vocab_size: int, **tokens: int | None) -> LlamaConfig:
    """Make the settings of a model of this size, with these numbers of special tokens."""
    heads = budget.hidden_size // 32
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=budget.hidden_size,
        intermediate_size=budget.hidden_size * 4,
        num_hidden_layers=budget.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=budget.context,
        initializer_range=0.06,  # Llama's 0.02 is for wide models: here it costs 15 % perplexity
        tie_word_embeddings=False,
        **tokens,
    )


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int) -> Tensor:
    """Cut all texts, BOS-separated, into rows of tokens: [rows, context]; the remainder is lost."""
    ids = torch.tensor([token for row in tokenizer(list(texts))["input_ids"] for token in row])
    rows = len(ids) // context
    return ids[: rows * context].view(rows, context)


def sequences(rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows [context] without end, every one once in each reshuffled epoch."""
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[index]


def adamw(model: LlamaForCausalLM) -> Optimizer:
    """Make AdamW with two groups whose rates the caller sets: FFN weights first, then all others."""
    ffn = [weight for name, weight in model.named_parameters() if ".mlp." in name]
    backbone = [weight for name, weight in model.named_parameters() if ".mlp." not in name]
    groups = [{"params": ffn}, {"params": backbone}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)


def learning_rate_cycle(step: int, steps: int) -> float:
    """Warm up over the first twelfth of the steps, then a cosine down to nothing."""
    warmup = max(1, steps // 12)
    return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def save(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a folder that ``from_pretrained`` loads, without a progress bar inside ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    finally:
        if shown:
            logging.enable_progress_bar()
    return path
