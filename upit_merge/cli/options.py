"""Options that several commands share: those of all, mergekit's, a recipe's `router:` block."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

# Makes options when a command is used: what they are made from takes long to import.
LazyOptions = Callable[[], list[click.Option]]

PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)


class Command(click.Command):
    """A command with examples that can be copied, and options that are made only when it is used.

    Args:
        setting_options: Makes the keys of a recipe's `router:` block, see `setting_options`.
        merge_options: Makes mergekit's options, see `merge_options`.
    """

    def __init__(
        self,
        *args: Any,
        setting_options: LazyOptions | None = None,
        merge_options: LazyOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.setting_options = setting_options or list
        self.merge_options = merge_options or list

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*self.setting_options(), *super().get_params(ctx), *self.merge_options()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the examples with their line breaks."""
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


command = partial(click.command, cls=Command)


# ---- of all commands that run data through a mixture -------------------------------------------


class ShardSize(click.ParamType):
    """Take mergekit's sizes (5000000, 500M, 5B), in bytes; a wrong one is no traceback."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from mergekit.common import parse_kmb

        try:
            size = parse_kmb(value)
        except (ValueError, IndexError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write bytes, such as 500M or 5B", param, ctx)
        return size


_COMMON = {
    "seed": click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
    "device": click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto."),
    "max_shard_bytes": click.option(
        "--out-shard-size", "max_shard_bytes", type=ShardSize(), default="5B", show_default=True
    ),
    "allow_pickle": click.option(
        "--lazy-unpickle", "allow_pickle", is_flag=True, help="Accept a checkpoint in .bin files."
    ),
    "trust_remote_code": click.option(
        "--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer."
    ),
}
_OPENING = ("allow_pickle", "trust_remote_code")


def common_options(
    *also: str, quiet: str = "No progress bars, no table."
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take the fields of `MixtureOptions`; it gets them as the mapping `common`.

    Args:
        also: Which of `max_shard_bytes` and `allow_pickle` it takes besides.
        quiet: Help of `--quiet`.
    """
    names = [key for key in _COMMON if key in ("seed", "device", "trust_remote_code", *also)]
    options = [*map(_COMMON.__getitem__, names), click.option("--quiet", is_flag=True, help=quiet)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_common(**values: Any) -> None:
            from upit_merge.io.hub import OpenOptions

            common = {name: values.pop(name) for name in [*names, "quiet"]}
            opening = {name: common.pop(name) for name in _OPENING if name in common}
            command(**values, common={**common, "open": OpenOptions(**opening)})

        for option in reversed(options):
            option(with_common)
        return with_common

    return decorate


# ---- a recipe's `router:` block ------------------------------------------------------------------


def setting_options(keys: Collection[str] | None = None) -> list[click.Option]:
    """Make an option of every router setting; values are checked by the settings themselves.

    Args:
        keys: Only these of the block's own.
    """
    from upit_merge.config.router import Refinement, RouterSettings, UpitObjective

    blocks: dict[str, type[BaseModel]] = {"upit": UpitObjective, "refine": Refinement}
    options: list[click.Option] = []
    for name, field in RouterSettings.model_fields.items():
        if keys is not None and name not in keys:
            continue
        if name not in blocks:
            options.append(_router_option(name, field))
            continue
        for inner, inner_field in blocks[name].model_fields.items():
            options.append(_router_option(f"{name}_{inner}", inner_field, optional=True))
    return options


def data_options() -> list[click.Option]:
    """Make options of the settings that say which data, which must be given, and how it is computed."""
    from upit_merge.config.router import DATA_SETTINGS

    options = setting_options(DATA_SETTINGS)
    for option in options:
        option.required = option.name == "data"
        # It is no seed of anything here.
        option.help = (option.help or "").replace("Seed samples: ", "Samples: ")
    return options


def gate_options() -> list[click.Option]:
    """Make options of the settings that say how gates are fitted; no data need be given."""
    options = [o for o in setting_options() if not str(o.name).startswith("upit_train")]
    return [option for option in options if option.name != "prompts"]


def _metavar(name: str, field: Any) -> str | None:
    if name == "prompts":
        return "FILE"
    return None if field.annotation in (str, str | None) and name == "data" else "VALUE"


def _router_option(name: str, field: Any, *, optional: bool = False) -> click.Option:
    """Make an option of that name.

    Args:
        optional: Not given, it is not a setting at all: its block may not be wanted.
    """
    default = None if field.is_required() or optional else field.default
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind]
    choices = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
        choices = []  # not only words
    text = f"{field.description}"
    if optional and not field.is_required() and field.default not in (None, False):
        text += f"  [default: {field.default}]"
    flag = field.annotation is bool
    if name == "prompts":
        text = (
            "Instead of --data: a YAML or JSON file with a few lines for each expert, such as "
            '{"0": ["Write a function"], "1": ["What is 7 times 8?"]}.'
        )
    return click.Option(
        [f"--{name.replace('_', '-')}"],
        required=field.is_required() and not optional,
        type=bool if flag else click.Choice(choices) if choices else str,
        is_flag=flag,
        metavar=_metavar(name, field) if not (flag or choices) else None,
        default=default,
        show_default=default is not None,
        help=text,
    )


# ---- mergekit's ----------------------------------------------------------------------------------


def merge_options(unused: Collection[str] = ()) -> list[click.Option]:
    """Make mergekit's options.

    Args:
        unused: Accepted, so that a command line need not be changed, but not shown.
    """
    from mergekit.options import add_merge_options

    @click.command()
    @add_merge_options
    def template(merge_options: Any) -> None:
        """Only its options are of interest."""

    from upit_merge.plugin.method import NO_EFFECT

    options = [param for param in template.params if isinstance(param, click.Option)]
    for option in options:
        # Accepted, for who is used to them, and told to have no effect; but not advertised.
        option.hidden = option.name in NO_EFFECT or option.name in unused
        if option.name == "out_shard_size":
            option.type = ShardSize()
            option.help = "Largest size of an output file, in bytes  [default: 5B]"
    return options


def parse_merge_options(values: dict[str, Any]) -> Any:
    """Return mergekit's options, applied as mergekit-yaml applies them.

    Raises:
        UpitError: a number is out of range.
    """
    from mergekit.options import MergeOptions

    from upit_merge.errors import UpitError

    # mergekit seeds numpy too, which takes 32 bits.
    for name, least, most in (("num_threads", 1, 2**15), ("random_seed", 0, 2**32 - 1)):
        if (value := values.get(name)) is not None and not least <= value <= most:
            option = name.replace("_", "-")
            raise UpitError(f"--{option} is {value}; it must be from {least} to {most}.")
    options = MergeOptions(**values)
    options.apply_global_options()
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # mergekit's, which begins with a module's name
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return options
