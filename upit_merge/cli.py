"""The `upit-merge` command line: parses, delegates, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

from upit_merge import __version__


class _Verbatim(click.Command):
    """A command whose help text keeps its line breaks, for examples that can be copied."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


class _LazyOptionsCommand(_Verbatim):
    """Takes mergekit's merge options, which are imported only when the command is used."""

    # Accepted, so that a command line need not be changed, but of no use to this command.
    unused: frozenset[str] = frozenset()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = _mergekit_params()
        for param in params:
            assert isinstance(param, click.Option)
            param.hidden = param.hidden or param.name in self.unused
        return [*super().get_params(ctx), *params]


class _PlanCommand(_LazyOptionsCommand):
    unused = frozenset({"copy_tokenizer", "write_model_card", "safe_serialization"})


class _VerifyCommand(_LazyOptionsCommand):
    unused = _PlanCommand.unused | {"out_shard_size", "random_seed"}


class _RouterCommand(_Verbatim):
    """Takes the keys of a recipe's `router:` block as options."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_router_params(), *super().get_params(ctx)]


class _EvaluateCommand(_Verbatim):
    """Takes those of them that say which data, and how it is computed."""

    settings = ("data", "subset", "split", "sample", "max_length", "batch_tokens", "memory_gb")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = [param for param in _router_params() if param.name in self.settings]
        return [*params, *super().get_params(ctx)]


def _router_params() -> list[click.Parameter]:
    """One option per router setting; values are checked by the settings themselves."""
    from upit_merge.router.settings import Refinement, RouterSettings, UpitObjective

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

    from upit_merge.mergekit_plugin import NO_EFFECT

    for param in template.params:
        assert isinstance(param, click.Option)
        # Accepted, for who is used to them, and told to have no effect; but not advertised.
        param.hidden = param.name in NO_EFFECT
        if param.name == "out_shard_size":
            param.type = _ShardSize()
            param.help = "Largest size of an output file, in bytes  [default: 5B]"
    return template.params


class _ShardSize(click.ParamType):
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


def _merge_options(values: dict[str, Any]) -> Any:
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="upit-merge")
def main() -> None:
    """Grow the checkpoints of an instruction-tuning run into a mixture of experts (UpIT)."""


_RECIPE = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


@main.command(
    cls=_LazyOptionsCommand,
    epilog="upit-merge run recipes/upit-8x.yml out/ --cuda",
)
@click.argument("recipe", type=_RECIPE)
@click.argument("out", type=_FOLDER)
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of upit-merge.")
def run(recipe: Path, out: Path, overwrite: bool, **values: Any) -> None:
    """Turn RECIPE into an MoE in the folder OUT, as `mergekit-yaml RECIPE OUT` does."""
    from upit_merge.mergekit_plugin import run_options
    from upit_merge.pipeline import run_recipe
    from upit_merge.recipe import load_recipe

    parsed, source = load_recipe(recipe)
    options = run_options(_merge_options(values), overwrite=overwrite)
    run_recipe(parsed, source, out, options)


@main.command(cls=_PlanCommand, epilog="upit-merge plan recipes/upit-8x.yml out/ --data seed.jsonl")
@click.argument("recipe", type=_RECIPE)
@click.argument("out", type=_FOLDER, required=False)
@click.option("--data", help="Find out on this seed data whether a router is worth it.")
def plan(recipe: Path, out: Path | None, data: str | None, **values: Any) -> None:
    """Check RECIPE and its models and show what `run` would make and need; writes nothing.

    With the folder OUT, check also that the output would fit its disk. With --data, compute the
    loss of every sample under every checkpoint, and tell what choosing among them could gain.
    """
    from upit_merge.mergekit_plugin import run_options
    from upit_merge.planning import plan_recipe
    from upit_merge.recipe import load_recipe

    parsed, _source = load_recipe(recipe)
    plan_recipe(parsed, run_options(_merge_options(values)), out, data)


@main.command(cls=_VerifyCommand, epilog="upit-merge verify out/")
@click.argument("out", type=_FOLDER)
@click.option("--recipe", type=_RECIPE, help="The recipe, if it is not in OUT.")
@click.option("--gates", is_flag=True, help="Train the gates again too, from the seed data.")
def verify(out: Path, recipe: Path | None, gates: bool, **values: Any) -> None:
    """Compute again what OUT should be, from its recipe and the models, and compare every byte.

    Start it in the folder in which the recipe was run, where its paths lead to the models.
    """
    from upit_merge.mergekit_plugin import run_options
    from upit_merge.verify import verify_output

    verify_output(out, recipe, run_options(_merge_options(values)), gates=gates)


@main.command(
    cls=_RouterCommand,
    epilog="upit-merge router out/ --data seed.jsonl --objective ridge",
)
@click.argument("out", type=_FOLDER)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no table.")
def router(
    out: Path, seed: int, device: str, trust_remote_code: bool, quiet: bool, **settings: Any
) -> None:
    """Train the gates of the MoE in the folder OUT, which is changed in place."""
    from upit_merge.router.command import parse_settings, train_router

    train_router(
        out,
        parse_settings(settings),
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )


@main.command(
    cls=_EvaluateCommand,
    epilog="upit-merge evaluate out/ --data held-out.jsonl --group-by domain --plot routing.png",
)
@click.argument("out", type=_FOLDER)
@click.option("--group-by", metavar="COLUMN", help="Column of the data with the kind of text.")
@click.option("--json", "json_file", type=_FILE, help="Write all numbers to this file.")
@click.option("--plot", type=_FILE, help="Write the routing heat map to this PNG file.")
@click.option("--no-experts", is_flag=True, help="Leave out the comparison with every expert.")
@click.option("--control", is_flag=True, help="Compare with gates fitted to shuffled buckets.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
@click.option("--quiet", is_flag=True, help="No progress bars, no tables.")
def evaluate(
    out: Path,
    group_by: str | None,
    json_file: Path | None,
    plot: Path | None,
    no_experts: bool,
    control: bool,
    seed: int,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure the MoE in the folder OUT on held-out data: perplexity, and what its router does.

    Layer by layer, so that it runs where the model does not fit; nothing is changed.
    """
    from upit_merge.evaluating import EvaluateOptions, evaluate_output
    from upit_merge.router.command import parse_settings

    options = EvaluateOptions(
        group_by=group_by,
        json=json_file,
        plot=plot,
        experts=not no_experts,
        control=control,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    evaluate_output(out, parse_settings(settings), options)


@main.command(cls=_Verbatim, epilog="upit-merge demo demo/")
@click.argument("folder", type=_FOLDER)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(folder: Path, seed: int, quiet: bool) -> None:
    """Train small models on text that is on this machine, merge them, and measure the result."""
    from upit_merge.demo.run import run_demo

    run_demo(folder, seed=seed, quiet=quiet)
