"""What decides a run's result, and whether that is there already."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upit_merge import __version__
from upit_merge.config.recipe import PARAMETERS_SINCE, Parameters, Recipe
from upit_merge.config.router import CHOSEN_SINCE, NO_MATTER, RouterSettings
from upit_merge.errors import UpitError
from upit_merge.io.sources import DenseModel
from upit_merge.io.untrusted import read_json
from upit_merge.merge.inputs import Inputs
from upit_merge.models.mixture import inspect_mixture, mixture_config, opened_mixture
from upit_merge.output.identity import file_states
from upit_merge.output.staging import REPORT, check_output_is_free
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report


def run_identity(
    recipe: Recipe,
    models: Sequence[DenseModel],
    max_shard_bytes: int,
    seed_samples: str | None = None,
) -> dict[str, Any]:
    """Return what decides a run's bytes: one that differs in any of it cannot be continued.

    How much the router computes at a time is not among it: whoever ran out of memory may lower it.

    Input files are told apart by size and time of change, as build tools do: reading them would
    take as long as starting anew.
    """
    files = [path for model in models for path in model.files()]
    return {
        "upit-merge": __version__,
        "recipe": _without_sizes(recipe.model_dump(mode="json")),
        "--out-shard-size": max_shard_bytes,
        "what the tokenizer makes of the seed data": seed_samples,
        "file": file_states(files, recipe.router.data if recipe.router else ""),
    }


def _without_sizes(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe.pop("card")  # which no weight depends on
    router = recipe["router"] or {}
    for name in PARAMETERS_SINCE:
        if recipe["parameters"].get(name) == Parameters.model_fields[name].default:
            recipe["parameters"].pop(name)
    for name in NO_MATTER:
        router.pop(name, None)
    # Runs that were begun before there was a choice go on: the merge does not depend on it.
    for name in CHOSEN_SINCE:
        if router.get(name) == RouterSettings.model_fields[name].default:
            router.pop(name, None)
    if router:
        # Versions before it was chosen noted 1 where none was given: their merge goes on, too.
        given = router["temperature"]
        router["temperature"] = 1.0 if given is None else f"{given} (given)"
    return recipe


def result_digest(identity: Mapping[str, Any]) -> str:
    """Return a digest of what decides a command's result, without paths of anybody's disk in it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_as_reported(out: Path) -> bool:
    """Return whether no weights of a model were written after its report, which comes last."""
    reported = (out / REPORT).stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= reported for path in out.glob("*.safetensors"))


def is_repeated(out: Path, report: AnyReport, digest: str) -> bool:
    """Return whether the last change of a model was this very call; says so.

    Args:
        digest: Of what decides its result, see `result_digest`.
    """
    steps = report.document.get("history") or [{}]
    same = steps[-1].get("run_sha256") == digest and is_as_reported(out)
    if same:
        print(f"This very command was the last that changed {out}: nothing was computed.")
    return bool(same)


def result_digests(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of everything that decides a command's result, by its name."""
    return {name: result_digest({name: value}) for name, value in identity.items()}


_IN_WORDS = {
    "upit-merge": "the version of upit-merge",
    "what the tokenizer makes of the seed data": "the seed data",
    "file": "a file of a model or of the data, or its time of change",
    "copy_tokenizer": "--copy-tokenizer",
    "write_card": "--write-model-card",
    "name": "the name",
    "recipe": "the recipe",
}
# Of the model's page, which is written again later.
_OF_CARD = re.compile(
    r"README\.md|upit_\w+\.png|upit_report\.json|mergekit_config\.yml|config\.json"
)


def output_config(inputs: Inputs) -> dict[str, Any]:
    """Return the output's `config.json`."""
    return mixture_config(
        inputs.architecture,
        inputs.settings_donor,
        inputs.tokenizer or inputs.settings_donor,
        inputs.num_experts,
        inputs.experts_per_token,
        inputs.dtype,
    )


def as_chosen(inputs: Inputs, report: AnyReport) -> Inputs:
    """Return the inputs with what a run chose on its seed data, where the recipe leaves it open."""
    default, found = inputs.experts_per_token, report.document.get("experts_per_token")
    is_open = inputs.recipe.parameters.experts_per_token is None
    if is_open and isinstance(found, int) and 0 < found < default:
        return replace(inputs, experts_per_token=found)
    return inputs


def is_finished_run(out: Path, identity: Mapping[str, Any], inputs: Inputs) -> bool:
    """Return whether a folder holds, whole and unchanged, what a recipe's run makes.

    Args:
        out: The output folder, in which there is something.
        identity: Of the run, see `run_identity`, and of what it writes beside the weights.
        inputs: What the run reads.

    Raises:
        UpitError: naming what is there instead.
    """
    report = read_report(out)
    made = report.document.get("run")
    if not isinstance(made, dict):
        check_output_is_free(out)  # says so of anything that is there
        return False
    now = result_digests(identity)
    differing = [_IN_WORDS.get(name, name) for name in now if made.get(name) != now[name]]
    if differing:
        raise _not_free(out, f"another run's output, which differs in {' and '.join(differing)}")
    if steps := report.document.get("history"):
        done = ", then ".join(f"`upit-merge {step.get('command')}`" for step in steps)
        raise _not_free(out, f"this run's output, changed since by {done}")
    reported = (out / REPORT).stat().st_mtime_ns
    for name in report.files:
        path = out / name
        if not path.is_file():
            raise _not_free(out, f"this run's output, but {name} is gone")
        if not _OF_CARD.fullmatch(name) and path.stat().st_mtime_ns > reported:
            raise _not_free(out, f"this run's output, but {name} was written since")
    config = output_config(as_chosen(inputs, report))
    if read_json(out / "config.json", "the output") != json.loads(json.dumps(config)):
        raise _not_free(out, "this run's output, but config.json was written since")
    with opened_mixture(out, str(out)) as moe:
        inspect_mixture(moe)
    return True


def _not_free(out: Path, what: str) -> UpitError:
    return UpitError(
        f"The output folder {out} is not empty: it holds {what}; choose a new folder, or replace it "
        "with `upit-merge run --overwrite`."
    )
