"""The model card, `README.md` of the output: what the report says, for people and for the Hub."""

from __future__ import annotations

import re
from collections.abc import Collection

from upit_merge.errors import counted
from upit_merge.models.formats import FORMATS
from upit_merge.report.document import Report
from upit_merge.report.expert_sections import experts_section, linked, similarity_section
from upit_merge.report.markdown import (
    amount,
    code,
    escaped,
    fenced,
    folded,
    table,
    without_local_paths,
)
from upit_merge.report.metadata import disagreement, front_matter
from upit_merge.report.result_sections import (
    evaluation_section,
    post_training_section,
    router_section,
)

_LONG_RECIPE = 40  # lines that are shown at once
_UPIT = "[UpIT](https://arxiv.org/abs/2410.01610)"
_MERGEKIT = "[mergekit](https://github.com/arcee-ai/mergekit)"
_OWNER = "your-name"  # who will publish the model is not known


def render(report: Report, pictures: Collection[str], recipe_source: str) -> str:
    """Return the card's Markdown, with metadata the Hub understands.

    Args:
        report: Of the model.
        pictures: Names of the files that are there to be shown.
        recipe_source: Text of the recipe; its section is left out if that is empty.
    """
    sections = [
        front_matter(report),
        f"# {escaped(report.name)}",
        _introduction(report),
        _at_a_glance(report),
        _section("Run it", _run_it(report)),
        _section("What it writes", _samples(report)),
        _section("Experts", experts_section(report, pictures)),
        _section("How alike they are", similarity_section(report, pictures)),
        _section("Router", router_section(report)),
        _section("Post-training", post_training_section(report, pictures)),
        _section("Evaluation", evaluation_section(report, pictures)),
        _section("Recipe", _recipe(recipe_source)),
        _section("Make it again", _make_it_again(report, recipe_source)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _introduction(report: Report) -> str:
    """Say what it is, in two sentences."""
    model, form = report.model, FORMATS.get(report.model.format)
    checkpoints = counted(len(report.sources.checkpoints), "checkpoint")
    what = (
        f"A mixture of {counted(model.num_experts, 'expert')} per layer, {report.experts_per_token} "
        f"of them per token, in {form.title if form else model.format} format: "
        f"{amount(model.parameters)} parameters, of which a token meets "
        f"{amount(model.active_parameters)}."
    )
    if report.is_copied:
        how = f"It was upcycled from dense models, whose FFNs it has copies of, with {_MERGEKIT} "
        return f"{what} {how}and its extension upit-merge."
    return (
        f"{what} It was grown from {checkpoints} of an instruction-tuning run with upit-merge, an "
        f"implementation of {_UPIT} for {_MERGEKIT}."
    )


def _at_a_glance(report: Report) -> str:
    model = report.model
    rows = [
        ("base", linked(report.sources.base)),
        ("layers", str(model.num_layers)),
        ("experts per layer", f"{model.num_experts}, {report.experts_per_token} per token"),
        ("parameters", f"{model.parameters:,} ({model.active_parameters:,} active)"),
        ("stored in", report.dtype),
    ]
    text = table([" ", " "], rows)
    return f"{text}\n\n{told}" if (told := disagreement(report)) else text


def _run_it(report: Report) -> str:
    """Show ways to be copied: those of the programs that run the format."""
    if not report.model.tokenizer:
        return (
            "The model came without a tokenizer: put that of its base into the folder, then "
            "transformers, vLLM and llama.cpp run it."
        )
    # A repository's name: a folder's may have spaces, or quotes that would end a string.
    name = f"{_OWNER}/{re.sub(r'[^A-Za-z0-9._-]+', '-', report.name).strip('-.') or 'model'}"
    parts = [
        f"Where {code(name)} stands, write the model's id on the Hub, or its folder.",
        "With transformers:",
        fenced(_with_transformers(name, chat=report.model.chat_template), "python"),
    ]
    form = FORMATS.get(report.model.format)
    readers = form.readers if form else {"vLLM": "", "llama.cpp": ""}
    others = {
        "vLLM": (
            "With [vLLM](https://docs.vllm.ai), as a server with OpenAI's interface",
            _with_vllm(name, chat=report.model.chat_template),
        ),
        "llama.cpp": (
            "With [llama.cpp](https://github.com/ggml-org/llama.cpp), whose converter is in its "
            "repository",
            _with_llama_cpp(name, chat=report.model.chat_template),
        ),
    }
    for reader, (told, commands) in others.items():
        if reader in readers:
            note = f" ({readers[reader]})" if readers[reader] else ""
            parts += [f"{told}{note}:", fenced(commands, "bash")]
    return "\n\n".join(parts)


def _with_transformers(name: str, *, chat: bool) -> str:
    prompt = '[{"role": "user", "content": "Why is the sky blue?"}]' if chat else '"The sky is"'
    answer = '[-1]["content"]' if chat else ""
    return f"""from transformers import pipeline

generate = pipeline("text-generation", model="{name}", dtype="auto", device_map="auto")
prompt = {prompt}
print(generate(prompt, max_new_tokens=100)[0]["generated_text"]{answer})"""


def _with_vllm(name: str, *, chat: bool) -> str:
    path = "chat/completions" if chat else "completions"
    asked = (
        '"messages": [{"role": "user", "content": "Why is the sky blue?"}]'
        if chat
        else '"prompt": "The sky is"'
    )
    return f"""vllm serve {name}
curl http://localhost:8000/v1/{path} -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", {asked}, "max_tokens": 100}}'"""


def _with_llama_cpp(name: str, *, chat: bool) -> str:
    prompt = "Why is the sky blue?" if chat else "The sky is"
    return f"""hf download {name} --local-dir model
python convert_hf_to_gguf.py model --outfile model.gguf
llama-cli -m model.gguf -n 100 -p "{prompt}"
llama-server -m model.gguf"""


def _samples(report: Report) -> str:
    """Show what it wrote once, as it is: most likely tokens, nothing chosen."""
    parts = [f"{code(sample.prompt)}\n\n{fenced(sample.text, 'text')}" for sample in report.samples]
    if not parts:
        return ""
    return "\n\n".join(["With greedy decoding, cut off where it was long:", *parts])


def _recipe(source: str) -> str:
    if not source.strip():
        return ""
    text = fenced(without_local_paths(source), "yaml")
    lines = source.count("\n")
    return folded(f"mergekit_config.yml, {lines} lines", text) if lines > _LONG_RECIPE else text


def _make_it_again(report: Report, recipe_source: str) -> str:
    """Give commands, seed, versions, and what has been done to the model since."""
    parts = []
    if recipe_source.strip():
        option = "" if report.seed_option is None else f" --random-seed {report.seed_option}"
        lines = [f"mergekit-yaml mergekit_config.yml out/{option}"]
        if not (report.shrunk or report.post_training):
            lines.append("upit-merge verify out/    # computes it once more and compares")
        parts.append(fenced("\n".join(lines), "bash"))
    if later := [step.command for step in report.history]:
        told = ", then ".join(f"`upit-merge {escaped(command)}`" for command in later)
        parts.append(f"The recipe makes the model as it was merged. After that came {told}.")
    made = ", ".join(f"{escaped(name)} {escaped(text)}" for name, text in report.versions.items())
    parts.append(
        f"Seed {report.seed}; made with {made}. `upit_report.json` has the whole lineage, the "
        "similarities, the digests and the settings."
    )
    return "\n\n".join(parts)
