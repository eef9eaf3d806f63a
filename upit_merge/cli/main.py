"""The `upit-merge` command line: its commands, by what one does with them."""

from __future__ import annotations

import logging

import click

from upit_merge import __version__
from upit_merge.cli import chat, look, merge, mixture, start, training

# In the order in which a newcomer needs them.
SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Begin": (start.init, start.split),
    "Make a mixture": (merge.plan, merge.run, merge.verify),
    "Measure and show it": (chat.chat, mixture.evaluate, look.inspect, mixture.page),
    "Change it": (mixture.router, mixture.extend, mixture.shrink, mixture.extract),
    "Train": (training.finetune, training.pipeline, training.demo),
}


class Sections(click.Group):
    """Lists its commands in sections."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(width)) for c in commands])


@click.group(
    cls=Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="upit-merge")
def main() -> None:
    """Grow the checkpoints of an instruction-tuning run into a mixture of experts (UpIT)."""
    # mergekit imports PEFT, which imports this, which on some CPUs asks for a kernel that nothing
    # here needs: findings/bitsandbytes-0502-hub-kernel-on-import.sh.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


for _commands in SECTIONS.values():
    for _command in _commands:
        main.add_command(_command)
