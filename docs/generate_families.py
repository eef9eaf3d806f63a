"""The page of dense families, the formats that they become, and what is refused."""

from __future__ import annotations

from inspect import cleandoc

from generate_markdown import NOTE
from upit_merge.models.families import FAMILIES, REFUSED
from upit_merge.models.formats import FORMATS

_FAMILIES = """
The experts of a mixture are FFNs; all else of it is a dense model's. So a dense model becomes a
mixture exactly where some published format has the same attention, norms and multipliers: n equal
experts then compute what the model did, to rounding, and the tests compare that for every row here.
`architecture: auto` takes the first format of a row; `upit-merge plan` says which programs run it and
what else could be chosen. A recipe for each family is in [recipes/families](../recipes/families).

TABLE
What to know:

* `granitemoe` made of models with attention biases (Qwen2.5) is for llama.cpp: vLLM drops the biases.
* `glm4_moe` and `lfm2_moe` weigh experts by sigmoids. An LFM2-MoE adds 1e-6 to their sum, so very
  negative logits of a gate would weaken its experts: gates are made with logits of about 1.
* `granitemoe_swa` made of a SmolLM3 has a window as long as its context in the layers with a rotary
  embedding: if you raise `max_position_embeddings` afterwards, raise `sliding_window` with it.
* `flex_olmo`'s gates see the residual stream itself, without a norm.
* Of a mixture in Mixtral's format made of a Phi-3, only transformers is sure to honour a sliding window.
* A Ministral 3's context ends at `original_max_position_embeddings`, beyond which it scales queries.

`parameters.shared` adds an expert that every token passes. `zero` is none in effect, for formats that
must have one. `split` halves the neurons: an FFN is the sum of what its halves give, so one half may
always run (`shared_from` says of whom) and the other be routed, and equal experts stay exact.
`parameters.dense_layers: N` leaves the first N layers as they are.

## What is refused

A format without a place for something would compute other tokens, often without a word. Such models
are refused in one sentence with the reason, those of these types:

TABLE
Settings are refused in the same way where no format that the family has can express them: `mlp_bias`
and `use_bias` (experts have no biases), a bias of attention's output for `glm4_moe`, windows in some
layers only, and a partial rotary embedding for `mixtral`. What is a mixture already is no dense model.
"""


def families_page() -> str:
    """Return the page of dense families, the formats they become, and what is refused."""
    intro, options, refused = cleandoc(_FAMILIES).split("TABLE\n")
    lines = [f"# Families and formats\n\n{NOTE}\n\n{intro}"]
    lines.append("| dense models | `model_type` | become (`architecture:`) |\n|---|---|---|")
    for family in dict.fromkeys(FAMILIES.values()):
        targets = ", ".join(f"`{target}`" for target in family.targets)
        names = ", ".join(f"`{name}`" for name, other in FAMILIES.items() if other is family)
        lines.append(f"| {family.title} | {names} | {targets} |")
    lines.append("\n| format | run by | `shared` | `dense_layers` |\n|---|---|---|---|")
    for name, form in FORMATS.items():
        readers = [f"{who} ({note})" if note else who for who, note in form.readers.items()]
        dense = "yes" if form.has_dense_layers else "no"
        kinds = ", ".join(form.shared)
        lines.append(f"| {form.title}, `{name}` | {', '.join(readers)} | {kinds} | {dense} |")
    lines.append(f"\n{options}")
    lines.append("| `model_type` | why |\n|---|---|")
    lines += [f"| `{name}` | {reason} |" for name, reason in REFUSED.items()]
    return "\n".join([*lines, f"\n{refused.strip()}", ""])
