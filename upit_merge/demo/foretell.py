"""How long a demo will take, said before it starts: from steps of its training, timed here."""

from __future__ import annotations

import time
from collections.abc import Collection
from statistics import median

import torch
from transformers import LlamaForCausalLM

from upit_merge.demo.training import TrainingBudget, adamw, model_shape, training_step
from upit_merge.router.effort import told_duration

# The first steps are slower: memory is taken, kernels are chosen.
_WARM_UP = 2
_TIMED_STEPS = 8
# Seconds that timing may take, on a machine on which a step takes seconds.
_LONGEST = 5.0
# What goes before and after the training, in steps of it: 100 of the 150 seconds that the demo took
# on two cores were its 1,660 steps.
STEPS_AROUND = 830
# The pipeline of `--all-stages` after the base model: 2,160 steps of about the same size, a third of
# them of the mixture, and what is around those; 7 to 10 minutes on such cores.
STEPS_OF_PIPELINE = 7500


def time_step(budget: TrainingBudget) -> float:
    """Return how many seconds a training step of a model of this size takes on this machine.

    The caller's random state is kept.
    """
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(model_shape(budget, budget.vocab_size)).train()
        rows = torch.randint(budget.vocab_size, (budget.batch_size, budget.context))
    optimizer = adamw(model)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _WARM_UP + _TIMED_STEPS:
        started = time.perf_counter()
        training_step(model, rows, optimizer)
        seconds.append(time.perf_counter() - started)
        if len(seconds) > _WARM_UP and time.perf_counter() - began > _LONGEST:
            break
    return median(seconds[_WARM_UP:])


def foretold_time(budget: TrainingBudget, written: Collection[str], around: int) -> str:
    """Return a sentence on how long the demo will take from now on.

    Args:
        written: Which models an earlier call has trained, as `train_demo_models` names them.
        around: What is not training, in steps of it.
    """
    left = sum(steps for name, steps in budget.cycles() if name not in written)
    seconds = (left + around) * time_step(budget)
    counted = f"{left:,} training steps, and what follows" if left else "what follows the training"
    return f"This takes about {told_duration(seconds)} on this machine, as it is now ({counted})."
