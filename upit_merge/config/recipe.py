"""The recipe: a mergekit YAML document, validated whole before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from upit_merge.config.card import CardSettings
from upit_merge.config.explain import check_yaml_size, explain
from upit_merge.config.fields import Name, NotNegative, Number, Strict, as_number
from upit_merge.config.mergekit_moe import is_mergekit_moe, recipe_text, translated
from upit_merge.config.router import ByColumn, Refinement, RouterSettings, UpitObjective
from upit_merge.config.yaml_file import parse_yaml, read_yaml_text
from upit_merge.errors import UpitError, shown
from upit_merge.models.formats import FORMATS

METHOD = "upit"

Share = Annotated[Number, BeforeValidator(as_number), Field(gt=0, le=1)]
PartialShare = Annotated[Number, BeforeValidator(as_number), Field(ge=0, lt=1)]
DensityValue = Share | Annotated[list[Share], Field(min_length=1)]


class FilteredDensity(Strict):
    """mergekit's conditional parameter; of several in a list, the first that fits counts."""

    EXAMPLE: ClassVar[str] = "- {filter: down_proj, value: 0.95}\n- {value: 0.9}"

    value: DensityValue = Field(description="A density, or a list of them over the layers.")
    filter: StrictStr | None = Field(
        None, description="Part of the dense tensor's name, such as down_proj; all, if not given."
    )


Density = DensityValue | FilteredDensity | Annotated[list[FilteredDensity], Field(min_length=1)]


class ModelParameters(Strict):
    """`parameters:` below one entry of `models:`."""

    EXAMPLE: ClassVar[str] = "density: 0.8"

    density: Density | None = Field(
        None, description="Of this model's delta, in every child it is in; wins over the recipe's."
    )


class ModelEntry(Strict):
    """One entry of `models:`: a folder, a Hub id, or a glob of folders; `BASE+` one of adapters."""

    EXAMPLE: ClassVar[str] = "model: ./sft/checkpoint-*"

    model: Name = Field(
        description="A folder, a Hub id, or a glob of folders, taken in step order; BASE+ADAPTER "
        "for LoRA adapters, or the adapter's folder alone for one of base_model."
    )
    parameters: ModelParameters = Field(
        ModelParameters(), description="What holds for this model alone."
    )


class Parameters(Strict):
    """`parameters:`, how checkpoints become experts (paper, section 3.2)."""

    EXAMPLE: ClassVar[str] = (
        "num_experts: 8\nexperts_per_token: 2\nparents: farthest_child\nseed: 42"
    )

    num_experts: StrictInt | None = Field(
        None,
        ge=1,
        le=1024,
        description="Experts per layer; the number of checkpoints if not given. More: children are "
        "grown; fewer: see select.",
    )
    experts_per_token: StrictInt | None = Field(
        None,
        ge=1,
        description="Experts a token is routed to (top-k). If not given, 2; with seed data fewer where "
        "that is better on samples of it.",
    )
    expansion: Literal["genetic", "copy"] = Field(
        "genetic",
        description="genetic: children of the checkpoints are grown; copy: experts are copies of "
        "the models in turn, to be trained further.",
    )
    noise: NotNegative = Field(
        0, description="Of copies: standard deviation of added noise, as a share of the weights'."
    )
    reinitialise: PartialShare = Field(
        0, description="Of copies: share of the FFN's dimensions drawn anew (Drop-Upcycling)."
    )
    density: Density = Field(
        0.9,
        description="Share of a delta's entries that DARE keeps in a child: a number in (0, 1], a "
        "list over the layers, or mergekit's list of filter: and value:.",
    )
    select: Literal["last", "diverse", "merge_similar"] = Field(
        "last",
        description="Of more checkpoints than experts: keep the last ones, or the most diverse "
        "ones, or average the most alike (merge_similar).",
    )
    parents: Literal["most_dissimilar", "farthest_child", "random"] = Field(
        "most_dissimilar",
        description="Of a new expert: the least alike pair (paper), a random pair, or the pair and "
        "mixing ratio whose child is farthest from every expert.",
    )
    granularity: Literal["model", "layer", "tensor"] = Field(
        "model",
        description="Parents and mixing ratios are chosen once for the whole model, or for every "
        "layer or FFN tensor by itself.",
    )
    repeat_pairs: StrictBool = Field(
        False, description="Let a pair be parents again while unused pairs remain (the paper does)."
    )
    similarity: Literal["cosine", "l2"] = Field(
        "cosine", description="How the likeness of two experts' deltas to the base is measured."
    )
    mutation: Literal["once", "compound"] = Field(
        "once",
        description="Drop from the checkpoints' deltas only, or from those of children again "
        "(compound, the paper's), which inflates norms.",
    )
    backbone: Name = Field(
        "last",
        description="Where attention, norms and embeddings come from: last (checkpoint), average, "
        "base, or one of the models.",
    )
    shared: Literal["auto", "none", "zero", "split"] = Field(
        "auto",
        description="An always-on expert beside the routed ones, in formats that have one: none, "
        "of zeros, or half of the neurons (split), the other half being routed; auto: none, or "
        "zero where there must be one.",
    )
    shared_from: Name | None = Field(
        None,
        description="Of split: whose half is shared: last (checkpoint), average, base, or one of "
        "the models; average if not given.",
    )
    dense_layers: StrictInt = Field(
        0,
        ge=0,
        description="So many of the first layers stay dense, in formats that can; they come from "
        "where the backbone does.",
    )
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = Field(
        0,
        description="Of everything random: parents, mixing ratios, DARE masks, sampling, gates; "
        "--random-seed wins.",
    )


def _known_format(name: str) -> str:
    if name not in (known := ["auto", *FORMATS]):
        raise ValueError(f"architecture is {shown(name)}, expected {', '.join(known)}")
    return name


# Parameters that 0.5.0 had not; at their defaults they change nothing.
PARAMETERS_SINCE = ("shared", "shared_from", "dense_layers")
# Parameters that say how children are grown and checkpoints are chosen.
_OF_GROWTH = (
    "select",
    "parents",
    "granularity",
    "repeat_pairs",
    "similarity",
    "mutation",
    "density",
)


class Recipe(Strict):
    """A whole `merge_method: upit` document. Unknown keys are errors."""

    EXAMPLE: ClassVar[str] = """\
merge_method: upit
base_model: ./base
models:
  - model: ./sft/checkpoint-*
dtype: bfloat16
parameters:
  num_experts: 8
router:
  data: ./seed.jsonl
"""

    merge_method: Literal["upit"] = Field(description="Tells mergekit whose recipe this is.")
    base_model: Name = Field(
        description="The pre-trained dense model, before instruction tuning: what deltas are "
        "measured against. A folder or a Hub id."
    )
    models: list[ModelEntry] = Field(
        min_length=1, description="The checkpoints, or adapters, that become experts; in order."
    )
    architecture: Annotated[StrictStr, AfterValidator(_known_format)] = Field(
        "auto",
        description="Of the output: auto, what the models become, or its name where they can "
        "become several, or to say what you expect; docs/families.md has a table.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Of the output; the base's if not given."
    )
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="As in mergekit: wins over dtype. Arithmetic is always float32."
    )
    tokenizer_source: Name | None = Field(
        None, description="`base` or a model; the last checkpoint that has a tokenizer, else base."
    )
    chat_template: StrictStr | None = Field(
        None, description="A Jinja template, or the name of one that mergekit ships."
    )
    parameters: Parameters = Field(
        Parameters(), description="How checkpoints become experts, and how many."
    )
    router: RouterSettings | None = Field(
        None, description="How the gates are trained; without the block they are random."
    )

    card: CardSettings | None = Field(
        None, description="What the model card says of name, licence, languages and tags."
    )

    @model_validator(mode="after")
    def _expressible(self) -> Recipe:
        params = self.parameters
        if (
            params.num_experts is not None
            and params.experts_per_token is not None
            and params.num_experts < params.experts_per_token
        ):
            raise ValueError(
                f"parameters: num_experts ({params.num_experts}) is below experts_per_token "
                f"({params.experts_per_token}), but a token cannot be routed to more experts than "
                "there are; lower experts_per_token or raise num_experts"
            )
        if params.expansion == "copy":
            self._check_growth_of_copies()
        elif params.noise or params.reinitialise:
            name = "noise" if params.noise else "reinitialise"
            raise ValueError(
                f"parameters: {name} is for copies of a model, which would be alike without; add "
                "expansion: copy, or remove it"
            )
        if params.shared_from is not None and params.shared != "split":
            raise ValueError(
                f"parameters: shared_from is for shared: split, but shared is {params.shared}; add "
                "shared: split, or remove it"
            )
        if params.repeat_pairs and params.parents == "farthest_child":
            raise ValueError(
                "parameters: repeat_pairs has no meaning with parents: farthest_child, which takes "
                "a pair again whenever its child is the farthest; remove it"
            )
        if params.mutation == "compound" and any(m.parameters.density for m in self.models):
            raise ValueError(
                "models: density per model has no meaning with mutation: compound, which drops "
                "from children too; use parameters.density or mutation: once"
            )
        if self.tokenizer_source == "union":
            raise ValueError(
                "tokenizer_source: union would change the vocabulary, which an expert cannot "
                "follow; use base or one of the models"
            )
        return self

    def _check_growth_of_copies(self) -> None:
        fields = Parameters.model_fields
        idle = [n for n in _OF_GROWTH if getattr(self.parameters, n) != fields[n].default]
        if idle or any(m.parameters.density for m in self.models):
            raise ValueError(
                f"parameters: {idle[0] if idle else 'density'} has no meaning with expansion: copy, "
                "where every checkpoint is copied and nothing is grown; remove it"
            )

    @property
    def output_dtype(self) -> torch.dtype | None:
        """Return the dtype asked for, or None for the base model's."""
        name = self.out_dtype or self.dtype
        return getattr(torch, name) if name else None

    @property
    def seed(self) -> int:
        return self.parameters.seed

    def with_seed(self, seed: int | None) -> Recipe:
        """Return the same recipe with another seed, if one is given."""
        if seed is None:
            return self
        parameters = self.parameters.model_copy(update={"seed": seed})
        return self.model_copy(update={"parameters": parameters})


_BLOCKS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "parameters": Parameters,
    "router": RouterSettings,
    "router.upit": UpitObjective,
    "router.refine": Refinement,
    "router.assign": ByColumn,
    "card": CardSettings,
    "models": ModelEntry,
    "models.parameters": ModelParameters,
    "density": FilteredDensity,
}

# mergekit keys that exist, with the reason why upit has no use for them.
_MERGEKIT_ONLY = {
    "slices": "upit merges whole models; list them under models:",
    "modules": "upit merges whole models; list them under models:",
    "tokenizer": "upit keeps the vocabulary; use tokenizer_source: base or a model",
    "experts": "upit takes its experts from models:",
    "gate_mode": "upit has objective: in its router: block",
}


def parse_recipe(document: Any, source: str = "the recipe") -> Recipe:
    """Validate a parsed YAML document.

    Args:
        document: What `yaml.safe_load` returned.
        source: How to call the recipe in messages, e.g. its path.

    Raises:
        UpitError: one sentence that names the first wrong key, its value and what would work.
    """
    check_yaml_size(document, source)
    if not isinstance(document, Mapping):
        raise UpitError(f"{source} is not a YAML mapping; see recipes/upit-8x.yml for one.")
    if "merge_method" not in document:
        raise UpitError(f"{source}: merge_method is missing; add merge_method: {METHOD}.")
    method = document["merge_method"]
    if method != METHOD:
        raise UpitError(
            f"{source}: merge_method is {shown(method)}, not '{METHOD}'; run other methods with "
            "mergekit-yaml."
        )
    for key, remedy in _MERGEKIT_ONLY.items():
        if key in document:
            raise UpitError(f"{source}: {key} is not supported by upit: {remedy}.")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UpitError(f"{source}: {explain(error, document, _BLOCKS)}.") from None


def load_recipe(path: Path, tell: Callable[[str], None] = lambda _line: None) -> tuple[Recipe, str]:
    """Read and validate a recipe file; return it with its source text.

    A configuration of `mergekit-moe` is translated, and what became of it is told; the text is then
    that of the recipe which it has become.

    Args:
        tell: Takes a line on each of its keys that is called otherwise here.

    Raises:
        UpitError: the file cannot be read, is not YAML, or is not a valid recipe.
    """
    text = read_yaml_text(path, "recipe")
    lines: list[str] = []
    document = parse_yaml(text, str(path))
    if is_mergekit_moe(document):
        check_yaml_size(document, str(path))
        document = translated(document, str(path), lines.append)
        text = recipe_text(document, path.name)
    recipe = parse_recipe(document, str(path))
    for line in lines:
        tell(line)
    return recipe, text


def parse_recipe_text(text: str, source: str = "the recipe") -> Recipe:
    """Validate a recipe given as YAML text; see `parse_recipe`."""
    return parse_recipe(parse_yaml(text, source), source)
