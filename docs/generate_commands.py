"""The reference of the command line, from click."""

from __future__ import annotations

import re
from inspect import cleandoc

import click

from generate_markdown import NOTE, table
from upit_merge.cli.main import main
from upit_merge.cli.options import Command


def commands_page() -> str:
    """Describe every command with its arguments and options."""
    introduction = (
        "`upit-merge COMMAND --help` prints the same. The options of mergekit that several "
        "commands take are [at the end](#options-of-mergekit); those that can have no effect are "
        "accepted and say so."
    )
    parts = [NOTE, "# Commands", introduction]
    shared: dict[str, click.Option] = {}
    for name in main.list_commands(click.Context(main)):
        command = main.commands[name]
        assert isinstance(command, Command)
        context = click.Context(command, info_name=f"upit-merge {name}")
        params = [p for p in command.get_params(context) if "--help" not in p.opts]
        mergekit = {str(option.name): option for option in command.merge_options()}
        shared |= {key: option for key, option in mergekit.items() if not option.hidden}
        params = [param for param in params if param.name not in mergekit]
        options = [p for p in params if isinstance(p, click.Option)]
        usage = " ".join(["upit-merge", name, *command.collect_usage_pieces(context)])
        parts += [f"## upit-merge {name}", f"`{usage}`", cleandoc(command.help or "")]
        if mergekit:
            parts.append("Also takes [mergekit's options](#options-of-mergekit).")
        parts.append(table(["option", "value", "default", ""], list(map(option_row, options))))
        if command.epilog:
            parts.append(f"```\n{command.epilog}\n```")
    rows = [option_row(shared[name], mergekit=True) for name in sorted(shared)]
    parts += ["## Options of mergekit", table(["option", "value", "default", ""], rows)]
    return "\n\n".join(parts) + "\n"


def option_row(option: click.Option, *, mergekit: bool = False) -> list[str]:
    """Return spelling, kind of value, default and help."""
    spelling = ", ".join(f"`{word}`" for word in [*option.opts, *option.secondary_opts])
    value = ""
    if not option.is_flag:
        value = {"integer": "whole number"}.get(option.type.name, option.type.name)
        if isinstance(option.type, click.Choice):
            value = ", ".join(f"`{word}`" for word in option.type.choices)
        elif isinstance(option.type, click.IntRange):
            value = "whole number"
    default = ""
    if option.required:
        default = "*required*"
    elif option.secondary_opts:
        default = f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    elif not option.is_flag and isinstance(option.default, (str, int, float)):
        default = f"`{option.default}`"
    text = option.help or ""
    if found := re.search(r"\s*\[default: ([^]]*)\]$", text):  # of a block that may not be wanted
        text, default = text[: found.start()], f"`{found[1]}`"
    own = _MERGEKIT.get(str(option.name), text) if mergekit else text
    return [spelling, value, default, own or _OWN.get(str(option.name), "")]


# Options whose name says it all on the command line.
_OWN = {
    "seed": "Of whatever is random.",
    "max_shard_bytes": "Largest size of an output file, in bytes, such as 500M.",
}
# What mergekit's options do here.
_MERGEKIT = {
    "random_seed": "Instead of the recipe's seed.",
    "out_shard_size": "Largest size of an output file, in bytes, such as 500M or 5B.",
    "copy_tokenizer": "Whether the output gets a tokenizer.",
    "cuda": "Compute on the GPU; `--device cuda` says the same.",
    "device": "Where to compute: cpu, cuda, cuda:1, auto.",
    "gpu_rich": "mergekit's short form of several options; here it means `--cuda --multi-gpu`.",
    "lazy_unpickle": "Accept checkpoints in .bin files, which are unpickled tensor by tensor.",
    "multi_gpu": "Share the work among all GPUs.",
    "num_threads": "Threads for arithmetic on the CPU.",
    "quiet": "No progress bars, no tables.",
    "safe_serialization": "Safetensors, which is all that is written.",
    "transformers_cache": "Where models from the Hub are kept.",
    "trust_remote_code": "Run code that comes with a tokenizer.",
    "verbosity": "Log more; repeat it for still more.",
    "write_model_card": "Whether the output gets a README.md.",
}
