"""`upit-merge init`: a folder of checkpoints -> a recipe, with questions where nothing says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.table import Table

from upit_merge.commands.first_recipe.choices import (
    RecipeChoices,
    choose,
    experts_for,
    is_named_base,
    nothing_found,
)
from upit_merge.commands.first_recipe.draft import Draft
from upit_merge.commands.first_recipe.survey import FoundModel, survey_folder
from upit_merge.config.recipe import ModelEntry, parse_recipe_text
from upit_merge.config.references import expand_models
from upit_merge.data.examples import iter_examples, local_data
from upit_merge.errors import UpitError, argument, counted, one_line
from upit_merge.io.disk import explained_failures
from upit_merge.io.hub import OpenOptions, is_folder, looks_like_path, resolve, split_reference
from upit_merge.io.text_file import replace_text
from upit_merge.merge.inputs import opened
from upit_merge.report.next_steps import free_folder, tell_next
from upit_merge.report.tables import show

_NONE = "-"  # the answer that there is none
_SHOWN = 12  # of what is left out


@dataclass(frozen=True)
class InitOptions:
    """What is said beforehand; None, or nothing, is found or asked for.

    Args:
        base, data: As in a recipe.
        models: Entries of `models:`.
        no_data: Leave the router out.
        experts, experts_per_token: How many.
        dtype: Of the output.
        yes: Take what would be offered as an answer, and ask nothing.
        force: Replace a recipe that is there.
        quiet: Print only what to do next, and questions.
        open: How models are opened.
    """

    base: str | None = None
    models: tuple[str, ...] = ()
    data: str | None = None
    no_data: bool = False
    experts: int | None = None
    experts_per_token: int | None = None
    dtype: str | None = None
    yes: bool = False
    force: bool = False
    quiet: bool = False
    open: OpenOptions = field(default_factory=OpenOptions)


def write_recipe(folder: Path, output: Path, options: InitOptions) -> None:
    """Write a recipe for what lies in a folder.

    Questions are asked on a terminal alone; elsewhere what nothing says is an error.

    Args:
        output: The recipe's file.

    Raises:
        UpitError: nothing can be made of what is there, an answer is missing, or a file would be
            overwritten.
    """
    asks = not options.yes and is_terminal()
    survey = survey_folder(folder, options.open)
    _check_free(output, force=options.force, asks=asks)
    choices = choose(survey, _bases_beside(folder, options.open))
    if not options.models and not choices.experts:
        raise nothing_found(folder, survey, choices.base)
    table = _table(folder, choices, options)
    if asks:
        show(table)
    if not options.models and len(choices.experts) == 1:
        raise _one_alone(choices.entries)
    base = _base(folder, choices, options, asks=asks)
    data = _data(folder, choices, options, asks=asks)
    entries = [*options.models] or choices.entries
    count = len(expand_models([ModelEntry(model=entry) for entry in entries]))
    if count < 2 and (options.experts or 2) > 1:
        raise _one_alone(entries)
    is_one_run = choices.is_one_run if not options.models else len(entries) == 1
    num_experts = _num_experts(count, options, is_one_run=is_one_run, asks=asks)
    chosen_on_data = data is not None and num_experts > 1
    per_token = options.experts_per_token or (None if chosen_on_data else min(2, num_experts))
    draft = Draft(
        base=base,
        base_told=choices.base_told,
        entries=entries,
        description=choices.description if not options.models else "as they were named",
        count=count,
        num_experts=num_experts,
        experts_per_token=per_token,
        average=not is_one_run,
        dtype=options.dtype or (choices.dtype if not options.models else None),
        data=data,
    )
    steps = _next_steps(output, data)
    commands = [command for _purpose, command in steps]
    text = draft.text(commands, commands[0].rpartition(" ")[2])
    recipe = parse_recipe_text(text, str(output))
    if is_folder(base):  # what the Hub has, `plan` downloads
        with opened(recipe, options.open):
            pass
    if not (asks or options.quiet):
        show(table)
    with explained_failures(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text)
    _tell(output, data, choices, steps, options)


def is_terminal() -> bool:
    """Whether there is somebody to answer questions."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _check_free(output: Path, *, force: bool, asks: bool) -> None:
    if output.is_dir():
        raise UpitError(f"{output} is a folder; give the name of a file as --output.")
    if not os.path.lexists(output) or force:
        return
    if not (asks and click.confirm(f"{output} is there already. Replace it?", default=False)):
        raise UpitError(
            f"{output} is there already; give another --output, or pass --force to replace it."
        )


def _bases_beside(folder: Path, options: OpenOptions) -> list[FoundModel]:
    """Return models beside a folder that are named like a base, where people often have it."""
    parent = folder / ".." if folder.name in ("", "..") else folder.parent
    try:
        paths = [path for path in sorted(parent.iterdir()) if is_named_base(path)]
        places = [path for path in paths if path.is_dir() and not path.samefile(folder)]
    except OSError:
        return []
    found = (survey_folder(path, options).models for path in places[:_SHOWN])
    return [model for models in found for model in models if model.folder in places]


def _one_alone(entries: Sequence[str]) -> UpitError:
    return UpitError(
        f"There is one checkpoint only ({entries[0]}), and experts are grown from at least two; "
        "add more, or copy the one model, as recipes/sparse-upcycling.yml does."
    )


# ---- what is taken, found or asked -----------------------------------------------------------


def _ask(question: str, default: str | None, check: Callable[[str], None]) -> str:
    """Ask until the answer is one; Enter takes the default."""
    while True:
        answer = str(click.prompt(question, default=default)).strip()
        try:
            check(answer)
            return answer
        except UpitError as error:
            click.echo(error.message)


def _base(folder: Path, choices: RecipeChoices, options: InitOptions, *, asks: bool) -> str:
    def check(reference: str) -> None:
        model, adapter = split_reference(reference)
        if adapter is not None:
            raise UpitError(f"{reference} is an adapter on {model}; the base is that model alone.")
        if is_folder(reference) or looks_like_path(reference):  # else the Hub's to know
            resolve(reference, options.open, role="base_model")

    if options.base is not None:
        check(options.base)
        choices.take_base(options.base)
        return options.base
    if asks:
        if choices.base is None and choices.base_claim:
            click.echo(f"The base: {choices.base_claim}.")
        question = "Base model, as it was before the fine-tuning (a folder or a Hub id)"
        choices.take_base(_ask(question, choices.base, check))
    if choices.base is None:
        told = f" ({choices.base_claim})" if choices.base_claim else ""
        raise UpitError(
            f"Nothing says which model the checkpoints in {folder} were trained from{told}; name "
            "it with --base, a folder or a Hub id."
        )
    return choices.base


def _data(folder: Path, choices: RecipeChoices, options: InitOptions, *, asks: bool) -> str | None:
    def check(source: str) -> None:
        if source != _NONE and local_data(source) is not None:
            next(iter_examples(source), None)

    if options.no_data:
        return None
    if options.data is not None:
        check(options.data)
        return options.data
    if asks:
        if choices.other_data:
            click.echo(f"Data here: {', '.join(choices.other_data)}.")
        question = f"Data for the router (a file, folder or dataset id; {_NONE} for none)"
        answer = _ask(question, choices.data or _NONE, check)
        return None if answer == _NONE else answer
    if choices.other_data and not options.yes:
        raise UpitError(
            f"{folder} holds {len(choices.other_data)} data files "
            f"({', '.join(choices.other_data[:4])}{', …' * (len(choices.other_data) > 4)}); say "
            "which one the router is fitted to with --data, or --no-data."
        )
    return choices.data


def _num_experts(count: int, options: InitOptions, *, is_one_run: bool, asks: bool) -> int:
    if options.experts is not None:
        return options.experts
    offered = experts_for(count, is_one_run=is_one_run)
    if not asks:
        return offered
    question = f"Experts per layer, of {counted(count, 'checkpoint')}"
    return int(click.prompt(question, offered, type=click.IntRange(1)))


# ---- what is said ------------------------------------------------------------------------------


def _table(folder: Path, choices: RecipeChoices, options: InitOptions) -> Table:
    table = Table(title=f"What lies in {folder}", title_justify="left")
    for column in ("", "where", "what"):
        table.add_column(column, overflow="fold")
    base = options.base or choices.base
    told = "as you say" if options.base else choices.base_told or choices.base_claim or "not found"
    table.add_row("base", base or "?", told)
    if options.models:
        for entry in options.models:
            table.add_row("checkpoints", entry, "as you say")
    else:
        told = ", ".join(filter(None, (choices.description, choices.dtype)))
        for number, entry in enumerate(choices.entries):
            table.add_row("" if number else "checkpoints", entry, "" if number else told)
    if not options.no_data:
        named = options.data or choices.data
        several = f"or one of {len(choices.other_data) - 1} more" if choices.other_data else ""
        table.add_row("data", named or "none", "as you say" if options.data else several)
    for reference, sentence in [*choices.left_out.items()][:_SHOWN]:
        table.add_row("left out", one_line(reference), one_line(sentence))
    if (more := len(choices.left_out) - _SHOWN) > 0:
        table.add_row("", f"{more} more", "")
    return table


def _next_steps(output: Path, data: str | None) -> list[tuple[str, str]]:
    """Return the commands that take the recipe."""
    recipe, out = argument(output.as_posix()), free_folder("out")
    steps = [
        ("see what it makes and needs", f"upit-merge plan {recipe} {out}"),
        ("make it", f"upit-merge run {recipe} {out}"),
    ]
    if data is not None:
        asking = f"upit-merge plan {recipe} --data {argument(data)}"
        steps.insert(1, ("see whether it is worth it", asking))
    return steps


def _tell(
    output: Path,
    data: str | None,
    choices: RecipeChoices,
    steps: Sequence[tuple[str, str]],
    options: InitOptions,
) -> None:
    if not options.quiet:
        print(f"Wrote {output}.")
        if data is None:
            print(
                "Without data it has no router: block in effect: the gates will be random until "
                "they are trained."
            )
        elif choices.held_out is None and local_data(data) is not None:
            print(
                f"The router takes {data}. To keep a part of it for measuring, from the model and "
                f"the router alike: `upit-merge split {argument(data)}`, before the fine-tuning."
            )
    tell_next(*steps)
