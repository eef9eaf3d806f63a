"""Options that several commands share: mergekit's, and the keys of a recipe's `router:` block."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel


class Verbatim(click.Command):
    """A command whose help text keeps its line breaks, for examples that can be copied."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


class LazyOptionsCommand(Verbatim):
    """Takes mergekit's merge options, which are imported only when the command is used."""

    # Accepted, so that a command line need not be changed, but of no use to this command.
    unused: frozenset[str] = frozenset()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = _mergekit_params()
        for param in params:
            assert isinstance(param, click.Option)
            param.hidden = param.hidden or param.name in self.unused
        return [*super().get_params(ctx), *params]


class PlanCommand(LazyOptionsCommand):
    unused = frozenset({"copy_tokenizer", "write_model_card", "safe_serialization"})


class VerifyCommand(LazyOptionsCommand):
    unused = PlanCommand.unused | {"out_shard_size", "random_seed"}


class RouterCommand(Verbatim):
    """Takes the keys of a recipe's `router:` block as options."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_router_params(), *super().get_params(ctx)]


class EvaluateCommand(Verbatim):
    """Takes those of them that say which data, and how it is computed."""

    settings = ("data", "subset", "split", "sample", "max_length", "batch_tokens", "memory_gb")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = [param for param in _router_params() if param.name in self.settings]
        return [*params, *super().get_params(ctx)]


class ExtendCommand(Verbatim):
    """Takes those that say how gates are fitted; the data may be that of the model's own gates."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = [p for p in _router_params() if not str(p.name).startswith("upit_train")]
        for param in params:
            param.required = False
        return [*params, *super().get_params(ctx)]


def _router_params() -> list[click.Parameter]:
    """One option per router setting; values are checked by the settings themselves."""
    from upit_merge.config.router import Refinement, RouterSettings, UpitObjective

    blocks: dict[str, type[BaseModel]] = {"upit": UpitObjective, "refine": Refinement}
    params: list[click.Parameter] = []
    for name, field in RouterSettings.model_fields.items():
        if name not in blocks:
            params.append(_router_option(name, field))
            continue
        for inner, inner_field in blocks[name].model_fields.items():
            params.append(_router_option(f"{name}_{inner}", inner_field, optional=True))
    return params


def _router_option(name: str, field: Any, *, optional: bool = False) -> click.Option:
    """An option of that name.

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
    return click.Option(
        [f"--{name.replace('_', '-')}"],
        required=field.is_required() and not optional,
        type=bool if flag else click.Choice(choices) if choices else str,
        is_flag=flag,
        metavar=None if flag or choices or field.annotation is str else "VALUE",
        default=default,
        show_default=default is not None,
        help=text,
    )


def _mergekit_params() -> list[click.Parameter]:
    from mergekit.options import add_merge_options

    @click.command()
    @add_merge_options
    def template(merge_options: Any) -> None:
        """Only its options are of interest."""

    from upit_merge.plugin.method import NO_EFFECT

    for param in template.params:
        assert isinstance(param, click.Option)
        # Accepted, for who is used to them, and told to have no effect; but not advertised.
        param.hidden = param.name in NO_EFFECT
        if param.name == "out_shard_size":
            param.type = ShardSize()
            param.help = "Largest size of an output file, in bytes  [default: 5B]"
    return template.params


class ShardSize(click.ParamType):
    """mergekit's sizes (5000000, 500M, 5B), in bytes; a wrong one is an error, not a traceback."""

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


def merge_options(values: dict[str, Any]) -> Any:
    """mergekit's options, applied as mergekit-yaml applies them.

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
    return options
