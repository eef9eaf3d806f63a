"""What LoRA is to train: names as people write them, found in the model or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from upit_merge.errors import UpitError, one_line
from upit_merge.models.formats import FORMATS, FUSED, PROJECTIONS, MixtureFormat, found_format

_TABLES = ("embed_tokens", "lm_head")


def resolve_targets(model: Any, folder: Path) -> None:
    """Give a mixture's experts the names by which PEFT finds them; refuse what is not there.

    Args:
        model: TRL's `ModelConfig`, whose target modules and parameters are replaced.
        folder: Of the model that is trained.

    Raises:
        UpitError: a name matches nothing, or PEFT cannot train the experts in the way asked for.
    """
    from transformers import AutoConfig

    if model.use_peft:
        resolve_targets_of(model, AutoConfig.from_pretrained(folder))


def resolve_targets_of(model: Any, config: Any) -> None:
    """Do what `resolve_targets` does, for a model of which there is no more than its settings.

    Args:
        model: As there.
        config: transformers' configuration of the model.
    """
    if not model.use_peft:
        return
    form = found_format(config.to_dict())
    if form is not None:
        _name_experts(model, form)
    skeleton = _skeleton(config)
    modules = [name for name, _module in skeleton.named_modules() if name]
    parameters = [name for name, _parameter in skeleton.named_parameters()]
    experts = {*form.projections.values(), "gate"} if form else set()
    known = _known(skeleton, form)
    for name in _listed(model.lora_target_modules):
        if not (_last(name) in experts or any(_ends(module, name) for module in modules)):
            raise _nothing("lora_target_modules", name, known)
    for name in _listed(model.lora_target_parameters):
        if not any(_ends(parameter, name) for parameter in parameters):
            named = {_last(parameter) for parameter in parameters if not _is_plain(parameter)}
            raise _nothing("lora_target_parameters", name, sorted(named) or known)
    for name in _listed(model.lora_modules_to_save):
        if not any(module.endswith(name) for module in modules):
            raise _nothing("lora_modules_to_save", name, [*known, "norm"])
    _check_tables(model, config)


def dense_targets(names: Sequence[str]) -> list[str]:
    """Return what a mixture's target modules are called in a dense model, which has no router."""
    dense: dict[str, list[str]] = {"gate": [], "gate_up_proj": ["gate_proj", "up_proj"]}
    for form in FORMATS.values():
        dense |= {own: [projection] for projection, own in form.projections.items()}
    found = [other for name in names for other in dense.get(_last(name), [name])]
    return list(dict.fromkeys(found))


def _name_experts(model: Any, form: MixtureFormat) -> None:
    modules, parameters = [], _listed(model.lora_target_parameters)
    inputs = f"{form.experts_path}.gate_up_proj"
    own_parameters = {
        **{p: f"{form.experts_path}.{kind}" for kind, parts in FUSED.items() for p in parts},
        "gate": f"{form.gate_path}.weight",
    }
    for name in _listed(model.lora_target_modules):
        last = _last(name)
        if last == "gate_up_proj":
            parameters.append(inputs)
        elif not form.peft_knows and last in (*PROJECTIONS, "gate"):
            parameters.append(own_parameters[last])
        elif last in PROJECTIONS:
            modules.append(form.projections[last])
        else:
            modules.append(name)
    fused = [form.projections[name] for name in ("gate_proj", "up_proj")]
    given = {_last(name) for name in modules} & {*fused}
    if inputs in parameters:
        modules = [name for name in modules if _last(name) not in given]
    elif len(given) == 1:
        (there,), (missing,) = given, {*fused} - given
        raise UpitError(
            f"lora_target_modules has {there} without {missing}, but an expert has both in one "
            f"matrix; add {missing}."
        )
    if isinstance(model.lora_target_modules, list):
        model.lora_target_modules = list(dict.fromkeys(modules))
    if parameters:
        model.lora_target_parameters = list(dict.fromkeys(parameters))
    trained = {*form.projections.values(), "gate"} & {_last(name) for name in modules}
    is_all = model.lora_target_modules == "all-linear"
    if model.lora_dropout and (trained or parameters or is_all):
        raise UpitError(
            f"lora_dropout is {model.lora_dropout} (0.05 if it is not given), which PEFT cannot do "
            "where LoRA trains experts or the router; write lora_dropout: 0.0."
        )


def _check_tables(model: Any, config: Any) -> None:
    """Refuse factors for a mixture's tables where its head shares their weights.

    PEFT would train a difference for one of both, and add it to both.
    """
    if found_format(config.to_dict()) is None or not config.tie_word_embeddings:
        return
    named = {_last(name) for name in _listed(model.lora_target_modules)}
    for table in _TABLES:
        if table in named:
            raise UpitError(
                f"lora_target_modules has {table}, but the mixture has one tensor for head and "
                "embeddings, which LoRA would make two of; remove it."
            )


def _skeleton(config: Any) -> Any:
    """Return the model without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _known(skeleton: torch.nn.Module, form: MixtureFormat | None) -> list[str]:
    """Return what can be named, without the layers, in the model's order."""
    linear = [
        _last(name)
        for name, module in skeleton.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    ]
    experts = [form.projections[name] for name in PROJECTIONS] + ["gate"] if form else []
    return list(dict.fromkeys([*linear, *experts]))


def _is_plain(parameter: str) -> bool:
    return _last(parameter) in ("weight", "bias")


def _listed(names: str | Iterable[str] | None) -> list[str]:
    """Return a setting's names; a text alone is a pattern, which PEFT matches."""
    return [] if names is None or isinstance(names, str) else list(names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _nothing(key: str, name: str, known: Sequence[str]) -> UpitError:
    return UpitError(
        f"{key} has {one_line(name)}, which matches nothing in the model; it has "
        f"{', '.join(known)}."
    )
