"""How large the models of benchmarks.paper are, and how long they are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from upit_merge.demo.training import TrainingBudget


@dataclass(frozen=True)
class LearningRates:
    """Peaks. What comes after stage 1 is the sweep's choice, where the scale has one."""

    base: float
    stage1: float  # every visit of a domain, and every restart, is a cycle of its own
    dense: float  # all further training of a dense model
    mixture: float  # … and of a mixture of experts


@dataclass(frozen=True)
class Scale:
    """Sizes and lengths. A row is `context` tokens; a step is one optimiser step.

    Attributes:
        base_steps: Steps of `base_batch` rows, on documents of their own.
        rows_per_domain: Fine-tuning data; an epoch is all rows of all domains.
        batch_size: Rows a step of fine-tuning and post-training.
        replay: In stage 1, share of a domain's rows that arrive during visits of the others.
        backbone_rate: In stage 1, the learning rate outside the FFN, relative to the FFN's.
        sweep: Rates to choose from, for further training of dense models and of mixtures.
        balance: Weight of the load-balancing loss (`router_aux_loss_coef`).
        seed_samples: Of every domain, for the router.
        curve_every: Perplexity on the way is that of every n-th held-out document, this n.
        problems: Held-out arithmetic problems whose answers are generated.
    """

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    context: int
    base_steps: int
    base_batch: int
    rows_per_domain: int
    batch_size: int
    rates: LearningRates
    replay: float = 0.2
    backbone_rate: float = 0.15
    sweep: tuple[float, ...] = ()
    balance: float = 0.01
    seed_samples: int = 60
    curve_every: int = 3
    problems: int = 400

    @property
    def model_shape(self) -> TrainingBudget:
        """In the demo's terms, which builds its models the same way."""
        return TrainingBudget(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            context=self.context,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="cpu",
            vocab_size=1024,
            hidden_size=128,
            layers=3,
            context=128,
            base_steps=800,
            base_batch=8,
            rows_per_domain=96,
            batch_size=4,
            rates=LearningRates(base=4e-3, stage1=2e-3, dense=2e-3, mixture=2e-3),
            sweep=(1e-3, 2e-3, 4e-3),
        ),
        Scale(  # only to see that everything runs
            name="quick",
            vocab_size=1024,
            hidden_size=64,
            layers=2,
            context=128,
            base_steps=150,
            base_batch=8,
            rows_per_domain=60,
            batch_size=4,
            rates=LearningRates(base=4e-3, stage1=4e-3, dense=2e-3, mixture=2e-3),
            seed_samples=20,
            problems=100,
        ),
        Scale(
            name="gpu",
            vocab_size=4096,
            hidden_size=512,
            layers=8,
            context=256,
            base_steps=2000,
            base_batch=32,
            rows_per_domain=400,
            batch_size=8,
            rates=LearningRates(base=1e-3, stage1=5e-4, dense=5e-4, mixture=5e-4),
            sweep=(2.5e-4, 5e-4, 1e-3),
            seed_samples=200,
            problems=1000,
        ),
    )
}
