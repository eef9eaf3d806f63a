"""The command that talks to a model: `chat`."""

from __future__ import annotations

import contextlib
import io
import sys

import click

from upit_merge.cli.options import command


@command(
    short_help="Talk to a mixture, or to one of its experts.",
    epilog="upit-merge chat out/ --show-experts\nupit-merge chat out/ --against base/",
)
@click.argument("out")
@click.option("--system", metavar="TEXT", help="A system message, for the chat template.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Say this, print the answer and end; repeatable, for several turns.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    help="Longest answer.  [default: the model's, or 512]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    help="Draw tokens, the more evenly the higher it is; 0 as --greedy.  [default: the model's]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from the likeliest tokens that have this share.  [default: the model's]",
)
@click.option("--greedy", is_flag=True, help="Take the likeliest token always.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Of drawn tokens, to have them once more."
)
@click.option("--show-experts", is_flag=True, help="Show which experts each token took.")
@click.option(
    "--expert", type=click.IntRange(0), metavar="N", help="Let all tokens take this expert."
)
@click.option(
    "--against",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="Ask another model the same, dense or a mixture, or expert:N of OUT; repeatable.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, mps (Apple's GPU) or auto, the fastest that is here and has room.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights in memory; auto is the model's own.",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with a model or its tokenizer."
)
@click.option("--quiet", is_flag=True, help="No progress bar, no greeting.")
def chat(
    out: str,
    prompts: tuple[str, ...],
    against: tuple[str, ...],
    trust_remote_code: bool,
    **settings: str | float | bool | None,
) -> None:
    """Talk to the MoE in the folder OUT, or to any model that transformers runs.

    With its chat template, on a terminal; from a file or a pipe, every line is said in turn. The
    whole model is loaded into memory. In the session, /help lists what else can be typed.
    """
    from upit_merge.runtime.interrupt import ends_at_once

    # These take seconds to import, and libraries take a KeyboardInterrupt for a part that is missing.
    with ends_at_once(lambda: "Interrupted."):
        from upit_merge.commands.chat import ChatOptions
        from upit_merge.commands.chat import chat as talk
        from upit_merge.commands.compare import Rival
        from upit_merge.io.hub import OpenOptions
        from upit_merge.report.spoken import Screen

    options = ChatOptions(
        open=OpenOptions(trust_remote_code=trust_remote_code),
        against=tuple(map(Rival.parse, against)),
        **settings,  # type: ignore[arg-type]
    )
    # A terminal or pipe may know fewer characters than a model, or others than UTF-8.
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    is_asked = not prompts and sys.stdin.isatty()
    if is_asked:
        _edit_lines()
    lines = None if is_asked else sys.stdin
    talk(out, options, Screen(sys.stdout), prompts=prompts, lines=lines)


def _edit_lines() -> None:
    """Let what is typed be edited, where Python can."""
    with contextlib.suppress(ImportError):  # Windows, whose terminal does it itself
        import readline  # noqa: F401
