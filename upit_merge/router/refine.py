"""The gates trained end to end: the language-modelling loss of the whole mixture, all else frozen.

A step goes through the layers forwards, keeping what enters each, and then backwards, computing
each layer once more to differentiate it: no more than a layer is ever in memory, and a mixture of
any size can be refined, at the price of reading it twice per step if it does not fit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from upit_merge.config.router import RouterSettings
from upit_merge.data.tokens import TokenizedSample
from upit_merge.engine.assembled import AssembledMixture
from upit_merge.engine.hidden_states import BATCH_PRICE, Batch, PackedStates, token_batches
from upit_merge.engine.layerwise import LayerwiseMixture, row_parts
from upit_merge.runtime.processes import ALONE, Processes


def balance_loss(probabilities: Tensor, shares: Tensor, num_tokens: int) -> Tensor:
    """The paper's load balancing, n · Σ_i f_i · P_i, of one layer (section 3.4; Switch, eq. 4).

    Args:
        probabilities: Of some of the tokens, (tokens, num_experts): their part of P.
        shares: f, the share of all tokens that is routed to each expert, (num_experts,); sums to
            the number of experts per token, and has no gradient.
        num_tokens: All tokens, over which P is a mean.
    """
    mean = probabilities.sum(0) / num_tokens
    return len(shares) * (shares * mean).sum()


@dataclass(frozen=True)
class Slopes:
    """What one step found.

    Attributes:
        loss: Mean negative log-likelihood of the target tokens, nats.
        balance: The load-balancing loss, mean over layers; at its best the experts per token.
        gates: Gradient of loss + weight · balance, (num_mixtures, num_experts, hidden_size).
    """

    loss: float
    balance: float
    gates: Tensor


@dataclass(frozen=True)
class GateTrainer:
    """Differentiates the mixture's loss by its gates.

    Args:
        model: The mixture; its own gates are not looked at.
        samples: All samples.
        settings: `batch_tokens`, `memory_gb` and `refine.balance` are used.
        scratch: A folder for hidden states that exceed the memory budget.
        processes: Share the samples of every step.
    """

    model: LayerwiseMixture
    samples: Sequence[TokenizedSample]
    settings: RouterSettings
    scratch: Path
    processes: Processes = ALONE

    def slopes(self, moe: AssembledMixture, chosen: Sequence[int], balance: float) -> Slopes:
        """Return the loss on some samples and its gradient.

        Args:
            moe: The mixture with the gates in question.
            chosen: Indices of the samples.
            balance: Weight of the load-balancing loss.
        """
        lengths = [len(sample.input_ids) for sample in self.samples]
        # The tokens of a small batch are few for each of its experts.
        price = BATCH_PRICE * self.model.num_experts
        batches = token_batches(chosen, lengths, self.settings.batch_tokens, price=price)
        mine = batches[self.processes.rank :: self.processes.size]
        held = {index for batch in mine for index in batch}
        local = [length if index in held else 0 for index, length in enumerate(lengths)]
        num_tokens = sum(lengths[index] for index in chosen)
        num_targets = sum(self.samples[index].num_targets for index in chosen)
        layers = self.model.num_layers
        with contextlib.ExitStack() as stack:
            # What enters every layer, and what leaves the last.
            entering = [stack.enter_context(self._states(local)) for _ in range(layers + 1)]
            self.model.embed(self.samples, entering[0])
            counts = self._forwards(moe, mine, entering)
            slope = stack.enter_context(self._states(local, torch.float32))
            loss = self._head(mine, entering[-1], slope, num_targets)
            shares = self.processes.total(counts) / num_tokens
            balances, gates = self._backwards(
                moe, mine, entering, slope, shares, num_tokens, balance
            )
        sums = self.processes.total(torch.tensor([loss, balances], dtype=torch.float64))
        return Slopes(float(sums[0]), float(sums[1]), self.processes.total(gates))

    @contextlib.contextmanager
    def _states(
        self, lengths: Sequence[int], dtype: torch.dtype | None = None
    ) -> Iterator[PackedStates]:
        budget = float(self.settings.memory_gb) * 2**30 / (self.model.num_layers + 2)
        with contextlib.closing(
            PackedStates(
                lengths,
                self.model.hidden_size,
                dtype or self.model.dtype,
                scratch=self.scratch,
                budget_bytes=budget,
            )
        ) as states:
            yield states

    @torch.no_grad()
    def _forwards(
        self, moe: AssembledMixture, batches: Sequence[Batch], entering: Sequence[PackedStates]
    ) -> Tensor:
        """Fill what enters every layer; returns how often each expert was chosen, (mixtures, n)."""
        shape = len(self.model.mixture_layers), self.model.num_experts
        counts = torch.zeros(shape, dtype=torch.float64)

        def count(layer: int, _batch: Batch, _logits: Tensor, chosen: Tensor) -> None:
            counts[layer] += torch.bincount(chosen.flatten().cpu(), minlength=counts.shape[1])

        order = range(self.model.num_layers if batches else 0)
        with contextlib.closing(moe.layers(order)) as layers:
            for number, module in enumerate(layers):
                for batch in batches:
                    padded = entering[number].padded(batch).to(self.model.device)
                    output = moe.run(module, padded, entering[number], batch, number, count)
                    entering[number + 1].put(batch, output)
        return counts

    def _head(
        self, batches: Sequence[Batch], states: PackedStates, slope: PackedStates, targets: int
    ) -> float:
        """The loss, this process's part of its mean, and its slope in the last hidden states."""
        head = self.model.head()
        total = 0.0
        slope.rows.zero_()
        for index in (index for batch in batches for index in batch):
            sample = self.samples[index]
            rows = states.rows[states.span(index)][sample.loss_start - 1 : -1]
            labels = torch.tensor(sample.input_ids[sample.loss_start :], device=self.model.device)
            into = slope.rows[slope.span(index)][sample.loss_start - 1 : -1]
            for part in row_parts(len(labels)):
                leaf = rows[part].to(self.model.device).requires_grad_()
                loss = F.cross_entropy(head(leaf), labels[part], reduction="sum") / targets
                into[part] = torch.autograd.grad(loss, leaf)[0].cpu().float()
                total += float(loss.detach())
        return total

    def _backwards(
        self,
        moe: AssembledMixture,
        batches: Sequence[Batch],
        entering: Sequence[PackedStates],
        slope: PackedStates,
        shares: Tensor,
        num_tokens: int,
        weight: float,
    ) -> tuple[float, Tensor]:
        """This process's part of the mean balance loss and of the gates' gradients."""
        model = self.model
        mixtures = len(model.mixture_layers)
        gates = torch.zeros(mixtures, model.num_experts, model.hidden_size)
        balances = 0.0
        order = range(model.num_layers - 1, -1, -1) if batches else range(0)
        with contextlib.closing(moe.layers(order)) as modules:
            for layer, module in zip(order, modules, strict=True):
                is_mixture = layer in model.mixture_layers
                number = model.mixture_layers.index(layer) if is_mixture else 0
                gate = moe.gate_of(module).requires_grad_() if is_mixture else None
                part = shares[number].float().to(model.device)
                for batch in batches:
                    terms: list[Tensor] = []

                    def balance(
                        _layer: int,
                        _batch: Batch,
                        logits: Tensor,
                        _chosen: Tensor,
                        terms: list[Tensor] = terms,
                        part: Tensor = part,
                    ) -> None:
                        terms.append(balance_loss(logits.softmax(1), part, num_tokens))

                    leaf = entering[layer].padded(batch).to(model.device).requires_grad_()
                    output = moe.run(module, leaf, entering[layer], batch, layer, balance)
                    outer = slope.padded(batch)
                    # Slopes of a mean are too small for float16; a power of two costs nothing.
                    scale = 2.0 ** -math.frexp(float(outer.abs().max()))[1]
                    outer = (outer * scale).to(output.device, output.dtype)
                    whole = (output * outer).sum()
                    if gate is None:
                        (into_leaf,) = torch.autograd.grad(whole, leaf)
                        slope.put(batch, into_leaf.float() / scale)
                        continue
                    whole = whole + scale * weight / mixtures * terms[0]
                    into_leaf, into_gate = torch.autograd.grad(whole, [leaf, gate])
                    slope.put(batch, into_leaf.float() / scale)
                    gates[number] += into_gate.float().cpu() / scale
                    balances += float(terms[0].detach()) / mixtures
                if gate is not None:
                    gate.requires_grad_(False)
        return balances, gates


def sample_order(lengths: Sequence[int], tokens: int, steps: int, seed: int) -> list[list[int]]:
    """The samples of every step, of about `tokens` tokens; each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order: list[list[int]] = []
    waiting: list[int] = []
    while len(order) < steps:
        if not waiting:
            waiting = torch.randperm(len(lengths), generator=generator).tolist()
        chosen = [waiting.pop()]
        size = lengths[chosen[0]]
        while waiting and size + lengths[waiting[-1]] <= tokens:
            size += lengths[waiting[-1]]
            chosen.append(waiting.pop())
        order.append(chosen)
    return order


@dataclass(frozen=True)
class RefineState:
    """Refinement after some steps: all that is needed to go on.

    Attributes:
        entries: The gates in `units`, (num_layers, num_experts, hidden_size).
        units: Root mean square of each layer's gate at the start, (num_layers, 1, 1).
        step, exp_avg, exp_avg_sq: AdamW's own.
        history: Loss and load-balancing loss of every step, float64, (steps done, 2).
    """

    entries: Tensor
    units: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    history: Tensor

    @property
    def gates(self) -> list[Tensor]:
        """float32, (num_experts, hidden_size) per layer."""
        return list((self.entries * self.units).unbind())

    def to_tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    @classmethod
    def start(cls, gates: Sequence[Tensor]) -> RefineState:
        whole = torch.stack(list(gates))
        units = whole.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        zeros = torch.zeros_like(whole)
        history = torch.zeros(0, 2, dtype=torch.float64)
        return cls(whole / units, units, torch.zeros(()), zeros, zeros.clone(), history)


def refine_gates(
    trainer: GateTrainer,
    gates: Sequence[Tensor],
    *,
    seed: int,
    keep_bytes: float,
    done: RefineState | None,
    after_step: Callable[[RefineState], object],
) -> RefineState:
    """Train the gates by AdamW, at a rate that falls linearly to zero.

    The rate is relative: a gate's entries are measured in units of their root mean square at the
    start, for how large gates are depends on the model.

    Args:
        gates: Where to start, float32, (num_experts, hidden_size) per layer.
        seed: Of the samples' order.
        keep_bytes: Keep the layers in memory if they fit into this.
        done: What a run that was killed had reached.
        after_step: Called with what is reached.
    """
    refine = trainer.settings.refine
    assert refine is not None
    state = done or RefineState.start(gates)
    entries = state.entries.clone().requires_grad_()
    optimizer = torch.optim.AdamW([entries], weight_decay=0.0)
    optimizer.state[entries] = {
        "step": state.step.clone(),
        "exp_avg": state.exp_avg.clone(),
        "exp_avg_sq": state.exp_avg_sq.clone(),
    }
    lengths = [len(sample.input_ids) for sample in trainer.samples]
    steps = sample_order(lengths, refine.tokens, refine.steps, seed)
    moe = AssembledMixture(trainer.model, keep_bytes=keep_bytes)
    for step in range(len(state.history), len(steps)):
        moe.set_gates(state.gates)
        found = trainer.slopes(moe, steps[step], float(refine.balance))
        entries.grad = found.gates * state.units
        optimizer.param_groups[0]["lr"] = float(refine.lr) * (1 - step / len(steps))
        optimizer.step()
        told = torch.tensor([[found.loss, found.balance]], dtype=torch.float64)
        state = RefineState(
            entries=entries.detach().clone(),
            units=state.units,
            history=torch.cat([state.history, told]),
            # Copies: the next step changes AdamW's own.
            **{name: value.clone() for name, value in optimizer.state[entries].items()},
        )
        after_step(state)
    return state
