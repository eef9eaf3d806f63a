"""Which expert gets which sample: the losses computed as the settings say, and what they mean."""

from __future__ import annotations

import logging

import torch

from upit_merge.config.router import ByColumn
from upit_merge.router.buckets import Buckets, assign_by_loss, named, shuffled
from upit_merge.router.control import loss_sweeps
from upit_merge.router.first_order import checked_losses
from upit_merge.router.router_gain import SampleLosses, measure_router_gain
from upit_merge.router.stage import RouterStage

LOG = logging.getLogger(__name__)


def sample_losses(stage: RouterStage, *, keep_inputs: bool = False) -> SampleLosses:
    """Compute every sample's loss under every expert as `settings.losses` says.

    Args:
        keep_inputs: Gates will be fitted: what they see on the way is left to the stage.

    Raises:
        UpitError: a loss is NaN or infinite.
    """
    count = stage.model.num_experts
    if loss_sweeps(stage.settings, count, len(stage.everything)) == count:
        return stage.losses()
    return checked_losses(stage, keep_inputs=keep_inputs)


def assigned(stage: RouterStage) -> Buckets:
    """Return which expert gets which sample, as `settings.assign` says.

    Raises:
        UpitError: a loss is NaN or infinite, or the data names no expert.
    """
    rule = stage.settings.assign
    experts = stage.model.num_experts
    if rule == "shuffled":
        buckets = Buckets(shuffled(len(stage.everything), experts, stage.seed), experts)
    elif stage.settings.names_experts:
        buckets = Buckets(named(stage.seeds.samples, stage.settings, experts), experts)
    else:
        assert not isinstance(rule, ByColumn)
        buckets = assign_by_loss(sample_losses(stage, keep_inputs=True), rule)
    if stage.processes.is_first:
        _warn(buckets, rule, with_verdict=stage.quiet)  # else it ends the command's own words
    return buckets


def nobodys(stage: RouterStage) -> Buckets:
    """Return buckets for fits that do not look at them; all samples are in the first."""
    return Buckets(torch.zeros(len(stage.everything), dtype=torch.int64), stage.model.num_experts)


def _warn(buckets: Buckets, rule: ByColumn | str, *, with_verdict: bool) -> None:
    if empty := [str(expert) for expert, size in enumerate(buckets.sizes) if size == 0]:
        remedy = "give more samples"
        if rule == "lowest":
            remedy += ", or use assign: balanced if you train the mixture further"
        LOG.warning(
            "No seed sample belongs to expert(s) %s, which the gates will avoid or know "
            "nothing of; %s.",
            ", ".join(empty),
            remedy,
        )
    if buckets.losses is not None:
        for sentence in measure_router_gain(buckets.losses).warnings(with_verdict=with_verdict):
            LOG.warning("%s", sentence)
