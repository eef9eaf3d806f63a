"""Configurations of `mergekit-moe`, as recipes: the same models become the same experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from upit_merge.errors import UpitError, shown

LOG = logging.getLogger(__name__)

# The keys of mergekit's MoEMergeConfig and of its Expert; it ignores any other.
_KEYS = (
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token"),
    *("shared_experts", "architecture"),
)
_EXPERT_KEYS = (
    *("source_model", "positive_prompts", "negative_prompts"),
    *("noise_scale", "residual_scale"),
)
_FROM_PROMPTS = ("hidden", "cheap_embed")
_RANDOM = ("random", "uniform_random")
# What mergekit-moe can write, and whether an architecture of ours is meant by the beginning of it.
_ARCHITECTURES = {
    "mixtral": "mixtral",
    "qwen3 moe": "qwen3_moe",
    "qwen moe": None,
    "deepseek moe": None,
}


def is_mergekit_moe(document: Any) -> bool:
    """Whether a YAML document is meant for `mergekit-moe`."""
    return (
        isinstance(document, Mapping)
        and "merge_method" not in document
        and ("experts" in document or "gate_mode" in document)
    )


def translated(
    document: Mapping[Any, Any], source: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Return the recipe that a configuration of `mergekit-moe` comes to; warns of what is left out.

    Args:
        source: How to call it in messages.
        tell: Takes a line on each key that is called otherwise in a recipe.

    Raises:
        UpitError: it is not one, or wants what a recipe cannot say.
    """
    experts = _experts(document, source)
    ignored = list(_ignored(document, _KEYS, ""))
    for number, expert in enumerate(experts):
        ignored += _ignored(expert, _EXPERT_KEYS, f"experts.{number}.")
        _check_scales(expert, number, source)
    if document.get("shared_experts"):
        raise UpitError(
            f"{source}: shared_experts cannot be expressed, as upit makes an always-on expert of "
            "halves of the FFNs (parameters.shared: split) and not of a model; leave it out."
        )
    recipe: dict[str, Any] = {"merge_method": "upit", "base_model": document.get("base_model")}
    if not isinstance(recipe["base_model"], str):
        raise UpitError(
            f"{source}: base_model is {shown(document.get('base_model'))}, expected a folder or a "
            "Hub id."
        )
    recipe["models"] = [{"model": expert["source_model"]} for expert in experts]
    tell(f"{source} is a configuration of mergekit-moe, run as a recipe of upit:")
    tell(
        "  experts: models, in this order, with expansion: copy (nothing is grown); backbone and "
        "tokenizer are base_model's."
    )
    recipe |= _architecture(document.get("architecture"), source, tell)
    if document.get("dtype") is not None:
        recipe["dtype"] = document["dtype"]
    recipe["tokenizer_source"] = "base"
    recipe["parameters"] = {"expansion": "copy", "num_experts": len(experts), "backbone": "base"}
    per_token = document.get("experts_per_token", 2)
    recipe["parameters"]["experts_per_token"] = per_token
    router = _router(document, experts, source, tell)
    if router is not None:
        recipe["router"] = router
    for line in ignored:
        LOG.warning("%s: %s", source, line)
    return recipe


def recipe_text(document: Mapping[str, Any], name: str) -> str:
    """Write a translated recipe as YAML, which says what it was."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=100)
    return f"# Translated from {name.encode('unicode_escape').decode()}, of mergekit-moe.\n{text}"


def _experts(document: Mapping[Any, Any], source: str) -> list[Mapping[Any, Any]]:
    experts = document.get("experts")
    if not isinstance(experts, list) or not experts:
        raise UpitError(
            f"{source}: experts is {shown(experts)}, expected a list of `- source_model: FOLDER` "
            "entries, as in a configuration of mergekit-moe."
        )
    for number, expert in enumerate(experts):
        model = expert.get("source_model") if isinstance(expert, Mapping) else None
        if not isinstance(model, str) or not model:
            raise UpitError(
                f"{source}: experts.{number} has no source_model that is a text (found "
                f"{shown(expert)}); write `- source_model: FOLDER` or a Hub id."
            )
        for key in ("positive_prompts", "negative_prompts"):
            prompts = expert.get(key)
            texts = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
            if prompts is not None and not texts:
                raise UpitError(
                    f"{source}: experts.{number}.{key} is {shown(prompts)}, expected a list of "
                    "texts."
                )
    return experts


def _ignored(block: Mapping[Any, Any], known: tuple[str, ...], where: str) -> Iterator[str]:
    for key in block:
        if key not in known:
            yield f"{where}{shown(key).strip(chr(39))} is left out; mergekit-moe ignores it, too."


def _check_scales(expert: Mapping[Any, Any], number: int, source: str) -> None:
    for key, idle, remedy in (
        ("residual_scale", 1, "scale the model's down_proj beforehand"),
        ("noise_scale", 0, "write a recipe of upit, whose parameters.noise is for all experts"),
    ):
        if (value := expert.get(key)) is not None and value != idle:
            raise UpitError(
                f"{source}: experts.{number}.{key} is {shown(value)}, which cannot be expressed, "
                f"as experts keep their model's weights; leave it out, or {remedy}."
            )


def _architecture(wanted: Any, source: str, tell: Callable[[str], None]) -> dict[str, str]:
    """Read `architecture` as mergekit does: the beginning of a name, in whatever case."""
    if wanted is None:
        return {}
    meant = [n for n in _ARCHITECTURES if isinstance(wanted, str) and n.startswith(wanted.lower())]
    ours = [form for name in meant if (form := _ARCHITECTURES[name])]
    if not ours:
        raise UpitError(
            f"{source}: architecture is {shown(wanted)}, which upit does not write; leave it out "
            "for what the models become (docs/families.md has a table)."
        )
    if len(meant) > 1:
        tell(f"  architecture: {wanted} may be several; auto, what the models become.")
        return {}
    return {"architecture": ours[0]}


def _router(
    document: Mapping[Any, Any],
    experts: list[Mapping[Any, Any]],
    source: str,
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return the `router:` block, if there is one."""
    mode = document.get("gate_mode", "hidden")
    if mode in _RANDOM:
        tell(f"  gate_mode: {mode}: no router: block; random gates, from the seed.")
        return None
    if mode not in _FROM_PROMPTS:
        known = ", ".join((*_FROM_PROMPTS, *_RANDOM))
        raise UpitError(f"{source}: gate_mode is {shown(mode)}, expected one of {known}.")
    prompts = {number: expert.get("positive_prompts") for number, expert in enumerate(experts)}
    if without := [str(number) for number, listed in prompts.items() if not listed]:
        raise UpitError(
            f"{source}: experts {', '.join(without)} have no positive_prompts, which gate_mode: "
            f"{mode} needs; write some, or gate_mode: random."
        )
    if len(experts) > 1 and all(listed == prompts[0] for listed in prompts.values()):
        raise UpitError(
            f"{source}: all experts have the same positive_prompts, which tell none from another; "
            "write what each is good at, or gate_mode: random."
        )
    tell(
        f"  gate_mode: {mode}: router.prompts with objective: {OBJECTIVE}, gates fitted to what "
        "each layer sees of the positive_prompts."
    )
    if any(expert.get("negative_prompts") for expert in experts):
        LOG.warning(
            "%s: negative_prompts are left out; every expert's gate is fitted against the "
            "positive_prompts of the others instead.",
            source,
        )
    return {"prompts": prompts, "objective": OBJECTIVE}


# Of gates fitted to prompts.
OBJECTIVE = "one_vs_rest"
