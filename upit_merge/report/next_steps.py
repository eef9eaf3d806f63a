"""What a command says at its end: which commands its user may want now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from upit_merge.config.router import DATA_SETTINGS, RouterSettings
from upit_merge.errors import UpitError, argument
from upit_merge.io.hub import OpenOptions
from upit_merge.report.document import read_report
from upit_merge.router.paired import FEWEST
from upit_merge.router.worth import MOST, Worth

# Set where a command is a step of a larger one, which says itself what comes next; a variable of
# the environment, because steps may be processes of their own.
_STEP = "UPIT_MERGE_STEP"
# Stand-ins for data that is not known here.
HELD_OUT, SEED = "HELD-OUT-DATA", "SEED-DATA"


@contextlib.contextmanager
def only_steps() -> Iterator[None]:
    """Let commands that are run inside, or started as processes, not say what comes next."""
    before = os.environ.get(_STEP)
    os.environ[_STEP] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_STEP]
        else:
            os.environ[_STEP] = before


def held_out_beside(data: str | None) -> str:
    """Return held-out data for a command: what `split` wrote beside the seed data, or a stand-in."""
    if data is not None:
        folder = Path(os.path.expanduser(data)).parent
        for found in sorted(folder.glob("held-out.*")) if folder.is_dir() else ():
            return argument(found.as_posix())
    return HELD_OUT


def seed_data_of(out: Path) -> str | None:
    """Return the seed data that the report of a mixture names, if that is a file or folder here."""
    try:
        router = read_report(out).document.get("router") or {}
    except UpitError:
        return None
    data = router.get("settings", {}).get("data")
    return data if isinstance(data, str) and Path(os.path.expanduser(data)).exists() else None


def seed_words(out: Path) -> str:
    """Return the option that reads a mixture's seed data once more: `--data TEXTS`, or a stand-in."""
    return f"--data {argument(seed_data_of(out) or SEED)}"


def data_words(settings: RouterSettings, names: Sequence[str] = DATA_SETTINGS) -> str:
    """Return the options that read the same data once more: `--data TEXTS --subset code`.

    Args:
        names: Of the settings that another command takes; those that are as always are left out.
    """
    given = ((name, getattr(settings, name)) for name in names)
    fields = RouterSettings.model_fields
    changed = [(name, value) for name, value in given if value != fields[name].default]
    words = (f"--{name.replace('_', '-')} {argument(value)}" for name, value in changed)
    return " ".join(words) if settings.data is not None else f"--data {SEED}"


def known_data_words(settings: Mapping[str, Any]) -> str:
    """Return what `data_words` does, of the router's settings as a report has them."""
    given = {name: settings[name] for name in DATA_SETTINGS if settings.get(name) is not None}
    if not isinstance(given.get("data"), str):
        return f"--data {SEED}"
    return data_words(RouterSettings.model_validate(given))


def steps_after_plan(
    making: str, asking: str, worth: Worth | None, dense_recipe: str | None
) -> Iterator[tuple[str, str]]:
    """Yield what to do after `plan`, what it advises first.

    Args:
        making: The words of `run`: recipe, folder and options.
        asking: Those of `plan` with data, whether it was called so or may be; empty without data.
        worth: What it has found out on the data; None without.
        dense_recipe: The mergekit recipe that it has printed of a better thing.
    """
    run, plan = f"upit-merge run {making}", f"upit-merge plan {asking}"
    if worth is None:
        if asking:
            yield "see whether it is worth it", plan
        yield "make it", run
        return
    if worth.outcome == "worth":
        yield "make it", run
        return
    if worth.outcome == "too_few":
        number = f"at least {FEWEST}" if worth.needed is None else f"about {worth.needed:,}"
        if (worth.needed or 0) <= MOST:
            yield f"ask again with more samples, {number}", plan
    elif dense_recipe is not None:
        recipe, folder = free_file("dense.yml"), free_folder("dense")
        yield f"save the recipe above as {recipe}; then", f"mergekit-yaml {recipe} {folder}"
    else:
        yield "ask again with other checkpoints in the recipe", plan
    yield "make the mixture all the same", run


def code_words(options: OpenOptions) -> str:
    """Return, after a space, the option without which the tokenizer of a model is not loaded."""
    return " --trust-remote-code" if options.trust_remote_code else ""


def free_folder(name: str) -> str:
    """Return the name of a folder that is not there yet: `out/`, or `out-2/` and so on."""
    return free_file(name) + "/"


def free_file(name: str) -> str:
    """Return the name of a file that is not there yet: `dense.yml`, or `dense-2.yml` and so on."""
    stem, ending = os.path.splitext(name)
    names = (name, *(f"{stem}-{number}{ending}" for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def tell_next(*steps: tuple[str, str]) -> None:
    """Print commands to go on with.

    Args:
        steps: What each is for, in a few words, and its command line.
    """
    if os.environ.get(_STEP):
        return
    for line in next_lines(*steps):
        print(line)


def next_lines(*steps: tuple[str, str]) -> list[str]:
    """Return what `tell_next` prints."""
    width = max(len(purpose) for purpose, _ in steps)
    # The purpose is not behind a `#`: in cmd, and in zsh as it comes, that would be an argument.
    return ["Next:", *(f"  {purpose:{width}}  {command}" for purpose, command in steps)]
