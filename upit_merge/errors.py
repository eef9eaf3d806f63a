"""The one error users see."""

import click


class UpitError(click.ClickException):
    """A mistake the user can mend, told in one sentence: what was found, where, and what to do.

    Being a `click.ClickException`, it is printed as `Error: …` with exit status 1 and without a
    traceback by both command lines, `mergekit-yaml` and `upit-merge`.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be quoted inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")
