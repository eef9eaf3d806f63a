"""The recipe's `router:` block; also the options of `upit-merge router`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from upit_merge.config.fields import Name, NotNegative, Number, PositiveNumber, Strict, as_number
from upit_merge.config.prompts import Prompts
from upit_merge.data.prompts import PromptSource
from upit_merge.errors import UpitError

# Router settings that decide how much is computed at a time, but not what.
NO_MATTER = ("batch_tokens", "memory_gb")
# Router settings that 0.5.0 did not have yet.
CHOSEN_SINCE = ("losses", "compute", "prompts")
# They belong together: which part of other data is meant, the settings for these do not say.
OF_DATA = ("data", "subset", "split")
# Those, and how it is computed.
DATA_SETTINGS = (
    *OF_DATA,
    *("sample", "max_length", "batch_tokens", "memory_gb", "compute"),
)


class ByColumn(Strict):
    """`assign: {column: NAME}`: the data says which expert a sample belongs to."""

    EXAMPLE: ClassVar[str] = "column: domain\nexperts: {code: 0, math: 1, wiki: 2}"

    column: Name = Field(description="Column of the seed data with every sample's expert.")
    experts: dict[StrictStr | StrictInt, Annotated[StrictInt, Field(ge=0)]] | None = Field(
        None, description="Number of the expert for each value; without it the values are numbers."
    )


def _assignment(value: Any) -> Any:
    """Accept `column: NAME` and `column:NAME:code=0,math=1` as one text, as on the command line."""
    if not (isinstance(value, str) and (match := re.fullmatch(r"column:\s*(\S.*)", value.strip()))):
        return value
    pairs = re.fullmatch(r"(.*\S)\s*:((?:[^=,:]+=\s*\d+\s*(?:,|$))+)", match[1])
    if pairs is None:
        return {"column": match[1]}
    experts: dict[str, int] = {}
    for pair in pairs[2].strip().strip(",").split(","):
        label, _, number = pair.partition("=")
        if label.strip() in experts:
            raise ValueError(f"assign names {label.strip()} twice; give each label one expert")
        experts[label.strip()] = int(number)
    return {"column": pairs[1], "experts": experts}


class UpitObjective(Strict):
    """`upit:` in the `router:` block, the paper's own training (section 3.3)."""

    EXAMPLE: ClassVar[str] = "train_experts: true\nlora_rank: 16\nbatch_size: 4"

    train_experts: StrictBool = Field(
        False,
        description="Train each expert's FFN together with its routing vectors (the paper's stage "
        "3), not the vectors alone.",
    )
    alpha: Annotated[Number, BeforeValidator(as_number), Field(ge=0, le=1)] = Field(
        0.5, description="Weight of the language-modelling loss; the rest is the router's."
    )
    epochs: StrictInt = Field(4, ge=1, description="Passes over every expert's samples.")
    lr: PositiveNumber | None = Field(
        None,
        description="Learning rate; if not given 2e-4, but 2e-5 where whole FFNs are trained "
        "(paper).",
    )
    batch_size: StrictInt = Field(16, ge=1, description="Samples per step.")
    lora_rank: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Train the FFNs through LoRA of this rank, which takes less memory."
    )

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return float(self.lr)
        return 2e-5 if self.train_experts and self.lora_rank is None else 2e-4


class Refinement(Strict):
    """`refine:` in the `router:` block: the gates trained on the loss of the whole MoE."""

    EXAMPLE: ClassVar[str] = "steps: 100\ntokens: 4096"

    steps: StrictInt = Field(ge=1, description="Optimiser steps.")
    lr: PositiveNumber = Field(
        0.02, description="Learning rate, relative to the size of the gates' entries."
    )
    tokens: StrictInt = Field(8192, ge=2, description="Seed tokens per step.")
    balance: NotNegative = Field(0.01, description="Weight of the load-balancing loss.")


class RouterSettings(Strict):
    """`router:`, the pre-training of the gates (paper, section 3.3)."""

    EXAMPLE: ClassVar[str] = """\
data: ./seed.jsonl
sample: 2000
objective: softmax
refine: {steps: 100}
"""

    data: Name | None = Field(
        None,
        description="Seed samples: jsonl, parquet, csv or tsv with columns text, or messages, or "
        "prompt and completion, or ShareGPT's conversations, or instruction (or question, query) "
        "and its answer; txt (blank lines separate samples; without any, every line is one); a "
        "folder of them; or a dataset id.",
    )
    prompts: Prompts | None = Field(
        None,
        description="Instead of data, one of which must be given: a few lines for each expert, by "
        'its number, such as {0: ["Write a function"], 1: ["What is 7 times 8?"]}; a text each, or a '
        "list of messages.",
    )
    subset: Name | None = Field(None, description="Configuration name of a dataset id.")
    split: Name = Field("train", description="Split of a dataset id.")
    sample: Annotated[
        Annotated[StrictInt, Field(ge=1)] | Annotated[StrictFloat, Field(gt=0, le=1)] | None,
        BeforeValidator(as_number),
    ] = Field(
        None,
        description="Samples to use: a count, or a fraction such as 0.01; at most 1,000 if not "
        "given.",
    )
    max_length: StrictInt = Field(
        512, ge=2, description="Tokens of a sample that are used, never above the model's context."
    )
    assign: Annotated[
        Literal["lowest", "balanced", "shuffled"] | ByColumn, BeforeValidator(_assignment)
    ] = Field(
        "lowest",
        description="Who gets a sample: the expert with the lowest loss (paper); balanced, in "
        "equal buckets of least loss, so that no expert is left out; column:NAME, as the data "
        "says (column:NAME:code=0,math=1 where it does not number the experts); or shuffled, a control.",
    )
    losses: Literal["auto", "first_order", "exact"] = Field(
        "auto",
        description="How the samples' losses under the experts are computed: first_order, for all "
        "experts by one forward and one backward sweep; exact, by one sweep for each; auto, to "
        "first order where that is cheaper and a control group of samples says that it holds.",
    )
    objective: Literal["one_vs_rest", "softmax", "ridge", "hidden", "kmeans", "upit", "random"] = (
        Field(
            "one_vs_rest",
            description="How the gates are fitted: one_vs_rest and softmax (logistic regressions), "
            "ridge (closed form, cheapest), hidden (mean state, as mergekit), kmeans (the tokens' own "
            "clusters, for copies, which no loss tells apart), upit (the paper's: positives only), "
            "random (not at all).",
        )
    )
    stream: Literal["mean", "expert"] | None = Field(
        None,
        description="The gates learn from what the mean of all experts computes, or the sample's "
        "own expert; if not given mean, but expert for objective: upit.",
    )
    temperature: PositiveNumber | None = Field(
        None,
        description="Divides the gate logits: higher mixes the chosen experts more evenly. If not "
        "given it is chosen on a quarter of the samples, to which the gates are not fitted at "
        "first; 1 where that would be too few.",
    )
    batch_tokens: StrictInt = Field(
        2048, ge=1, description="Tokens pushed through a layer at a time."
    )
    memory_gb: PositiveNumber = Field(
        4.0, description="GiB of hidden states kept in memory; more than that go to disk."
    )
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of the matrix products; all that is summed stays in float32 on the CPU. "
        "auto: on a GPU the stored dtype; on a CPU with AVX512-BF16 or AMX bfloat16 for the "
        "experts' losses and the gates' inputs, else float32.",
    )
    upit: UpitObjective | None = Field(None, description="For objective: upit.")
    refine: Refinement | None = Field(
        None,
        description="After any objective: train the gates on the loss of the whole mixture.",
    )

    _prompts_source: PromptSource = PrivateAttr(default=PromptSource())

    @model_validator(mode="after")
    def _expressible(self) -> RouterSettings:
        if self.prompts is None and self.data is None:
            raise ValueError(
                "router: neither data nor prompts is given; add data: FILE, or prompts: {0: [...], "
                "1: [...]} with a few lines for each expert"
            )
        if self.prompts is not None:
            self._check_prompts()
        if self.upit is not None and self.objective != "upit":
            raise ValueError(
                f"router: upit is given, but objective is {self.objective}; set objective: upit or "
                "remove the upit: block"
            )
        if self.objective == "kmeans":
            for key, idle in (("assign", "lowest"), ("stream", None)):
                if getattr(self, key) not in (idle, "mean"):
                    raise ValueError(
                        f"router: {key} has no meaning with objective: kmeans, where no sample "
                        "belongs to an expert; remove it"
                    )
        return self

    def _check_prompts(self) -> None:
        """Refuse what is of data, where there is none."""
        if self.data is not None:
            raise ValueError("router: data and prompts are both given; remove one of them")
        for key in ("subset", "split", "sample", "assign"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"router: {key} has no meaning with prompts, which are all used, each for its "
                    "expert; remove it"
                )
        if self.objective == "kmeans":
            raise ValueError(
                "router: objective: kmeans does not ask whose a prompt is; use another, or data"
            )

    def for_data(
        self, data: str, *, subset: str | None = None, split: str | None = None
    ) -> RouterSettings:
        """Return the same settings for data that is named apart from them.

        Args:
            subset, split: Of the data; if not given those of the settings, where it is the data
                they are for, and else the defaults.
        """
        fields = type(self).model_fields
        kept = {key: getattr(self, key) for key in OF_DATA if data == self.data}
        named = {"data": data, "subset": subset, "split": split}
        given = {key: value for key, value in named.items() if value is not None}
        defaults = {key: fields[key].default for key in ("subset", "split")}
        return self.model_copy(update={**defaults, "prompts": None, **kept, **given})

    def with_prompts_of(self, source: PromptSource) -> RouterSettings:
        """Return the same settings, whose prompts messages call by where they are from."""
        settings = self.model_copy()
        settings._prompts_source = source
        return settings

    @property
    def prompts_source(self) -> PromptSource:
        """Return where the prompts are from: a recipe, unless it was said."""
        return self._prompts_source

    @property
    def column(self) -> str | None:
        """Return the column of the data that assigns its samples, if one does."""
        return self.assign.column if isinstance(self.assign, ByColumn) else None

    @property
    def names_experts(self) -> bool:
        """Whether the samples come with their experts, so that no losses need be computed."""
        return self.column is not None or (self.prompts is not None and self.assign != "shuffled")

    @property
    def router_stream(self) -> Literal["mean", "expert"]:
        """Return whose hidden states the gates are fitted to."""
        return self.stream or ("expert" if self.objective == "upit" else "mean")

    @property
    def scale(self) -> float:
        """Return the temperature that gates are fitted with, before another is chosen."""
        return 1.0 if self.temperature is None else float(self.temperature)

    @property
    def needs_buckets(self) -> bool:
        """Whether the gates are fitted to which expert a sample belongs to."""
        return self.objective not in ("random", "kmeans")

    @property
    def upit_settings(self) -> UpitObjective:
        return self.upit or UpitObjective()

    @property
    def trains_experts(self) -> bool:
        """Whether the FFNs change too."""
        return self.upit is not None and self.upit.train_experts


def check_data_is_named(values: Mapping[str, Any]) -> None:
    """Refuse options of the data where the data itself is not named.

    Args:
        values: Of options, by the names of settings.

    Raises:
        UpitError: naming the option.
    """
    if values.get("data") is not None:
        return
    for key in ("subset", "split"):
        if values.get(key) not in (None, RouterSettings.model_fields[key].default):
            raise UpitError(f"--{key} is of the data; name that with --data.")
