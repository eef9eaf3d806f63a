"""`upit-merge router`: train the gates of an MoE that is already there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upit_merge import __version__
from upit_merge.commands.finished import is_repeated, result_digest
from upit_merge.commands.foretell import tell_router_time
from upit_merge.commands.options import MixtureOptions, ResizeOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.session import RouterSession, router_session
from upit_merge.config.explain import explain
from upit_merge.config.prompts import load_prompts
from upit_merge.config.router import NO_MATTER, ByColumn, RouterSettings
from upit_merge.data.prompts import PromptSource
from upit_merge.engine.arithmetic import has_fast_bfloat16
from upit_merge.errors import UpitError, argument, one_line, shown
from upit_merge.io.hub import OpenOptions
from upit_merge.io.text_file import write_json
from upit_merge.io.untrusted import read_json
from upit_merge.models.formats import MixtureFormat
from upit_merge.models.gates import named_gates
from upit_merge.models.published import complete_config
from upit_merge.output.edit import Edit
from upit_merge.output.patch import PatchedCopies
from upit_merge.output.staging import scratch_folder
from upit_merge.report.any_version import AnyReport
from upit_merge.report.document import read_report
from upit_merge.report.expert_names import expert_names
from upit_merge.report.next_steps import code_words, held_out_beside, tell_next
from upit_merge.report.tables import show_buckets
from upit_merge.report.write import write_report_and_card
from upit_merge.resizing.rewriting import PublishedCopies
from upit_merge.router.pretrain import RouterResult, pretrain_router
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.processes import joined


def parse_settings(values: Mapping[str, Any]) -> RouterSettings:
    """Read router settings from command line values, by option name (`refine_steps` is in `refine`).

    Raises:
        UpitError: naming the option and what would work.
    """
    nested: dict[str, Any] = {}
    source = PromptSource()
    for key, value in values.items():
        if value is None or value is False:  # an option, or a flag, that was not given
            continue
        if key == "prompts":
            source = PromptSource(Path(value))
            nested[key] = load_prompts(Path(value))
            continue
        block, _, inner = key.partition("_")
        if block in _BLOCKS:
            nested.setdefault(block, {})[inner] = _number(value)
        else:
            nested[key] = value if key in _TEXTS else _number(value)
    if not {"data", "prompts"} & {*nested}:
        raise UpitError(
            "--data is missing; name the seed data with it, or with --prompts a file of a few "
            "lines for each expert."
        )
    try:
        return RouterSettings.model_validate(nested).with_prompts_of(source)
    except ValidationError as error:
        told = explain(error, nested, {"": RouterSettings})
        key, _, rest = told.partition(" ")
        if key.partition(".")[0] not in RouterSettings.model_fields:
            raise UpitError(f"{told[0].upper()}{told[1:]}.") from None
        option = key.replace("_", "-").replace(".", "-")
        raise UpitError(f"--{option} {rest}.") from None


_BLOCKS = ("upit", "refine")
_TEXTS = ("data", "subset", "split", "assign", "objective", "stream", "compute")


def _number(value: Any) -> Any:
    """Read text as the number it is: `sample` takes a count (500) or a fraction (0.01)."""
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    return value


def train_router(out: Path, settings: RouterSettings, options: MixtureOptions) -> None:
    """Replace the gates of the MoE folder `out` by ones fitted to seed data.

    Under torchrun or `accelerate launch` all processes must call this; they share the samples.
    A call that was cut off goes on where it stopped, if it is repeated.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, or the data does not fit.
    """
    with (
        joined() as processes,
        router_session(out, "router", options, processes) as session,
        scratch_folder(out, processes.rank) as scratch,
    ):
        edit = session.edit
        # The processes may be on machines of several kinds, which must not be mixed.
        quick = all(processes.gather(has_fast_bfloat16()))
        with processes.together():
            before = read_report(out)
            stage = _with_named_experts(session.stage(settings, scratch, quick=quick), before, out)
            check_router_memory(stage.model, stage.lengths, settings, out)
        identity = router_identity(stage)
        if edit.was_finished(identity):
            return
        digest = result_digest(identity)
        if processes.gather(processes.is_first and is_repeated(out, before, digest))[0]:
            return
        stage = session.resumed(stage, identity)
        copies = _copies(session, stage)
        with edit.interruptible("the gates are as they were", keeps_files=True):
            _prepare(copies, stage)
            tell_router_time(stage)
            result = pretrain_router(stage, copies)
            processes.gather(None)  # nobody looks into the folders any more
            if processes.is_first:
                copies.write(named_gates(stage.model.architecture.gate_names(), result.gates))
                form = stage.model.format
                obsolete = _write_report_and_card(edit, result, before, copies, form, digest)
                edit.put_into_place(identity, obsolete)
        if processes.is_first and not options.quiet:
            print(stage.seeds.summary())
            show_buckets(result.report, argument(out))
            print(f"The gates in {out} are replaced.")
            tell_next(*_next_steps(out, settings.data, options.open))


def _next_steps(out: Path, data: str | None, opening: OpenOptions) -> Iterator[tuple[str, str]]:
    folder, code = argument(out), code_words(opening)
    yield "measure it", f"upit-merge evaluate {folder} --data {held_out_beside(data)}{code}"
    yield "talk to it", f"upit-merge chat {folder}{code}"


def _with_named_experts(stage: RouterStage, report: AnyReport, out: Path) -> RouterStage:
    """Return the stage with an expert for each label, where the labels are names of models.

    Raises:
        UpitError: a label is neither a number nor the name of an expert's model.
    """
    rule, samples = stage.settings.assign, stage.seeds.samples
    if not isinstance(rule, ByColumn) or rule.experts is not None:
        return stage
    labels = dict.fromkeys(str(sample.label).strip() for sample in samples)
    if all(label.isdecimal() for label in labels):
        return stage
    names, experts = expert_names(report), dict[str | int, int]()
    for label in labels:
        number = int(label) if label.isdecimal() else names.get(label.casefold())
        if number is None:
            source = next(s.source for s in samples if str(s.label).strip() == label)
            raise UpitError(
                f"{source} has {shown(label)} in the column `{rule.column}`, which is no expert's "
                f"number and no name of a model that {out} was made from; say which expert each "
                f"label means: --assign {_example(rule.column, labels)}."
            )
        experts[label] = number
    if stage.processes.is_first and not stage.quiet:
        told = ", ".join(f"{one_line(str(label))} is {n}" for label, n in experts.items())
        print(f"Experts by the names of their models: {told}.")
    by_name = rule.model_copy(update={"experts": experts})
    return replace(stage, settings=stage.settings.model_copy(update={"assign": by_name}))


def _example(column: str, labels: Iterable[str]) -> str:
    """Return an example of an assignment, of a few labels."""
    few = [f"{one_line(label)}={number}" for number, label in zip(range(3), labels, strict=False)]
    return f"column:{column}:{','.join(few)}"


def router_identity(stage: RouterStage) -> dict[str, Any]:
    """Return what decides the gates, but for the model: where any of it differs, it starts over."""
    values = stage.settings.model_dump(mode="json", exclude=set(NO_MATTER))
    identity = {
        "settings": values,
        "compute": stage.model.arithmetic.identity(),
        "seed": stage.seed,
        "samples": stage.seeds.digest(),
    }
    # As it is read back from a file: JSON has texts for keys only.
    return dict(json.loads(json.dumps({"upit-merge": __version__, **identity})))


def _copies(session: RouterSession, stage: RouterStage) -> PatchedCopies:
    """Return the files that will take the place of the model's own."""
    moe, folder, options = session.moe, session.edit.model, session.options
    if moe.is_published:
        return PatchedCopies(moe, folder)
    shard_bytes = ResizeOptions.max_shard_bytes
    return PublishedCopies(moe, folder, stage.model.architecture, shard_bytes, options.quiet)


def _prepare(copies: PatchedCopies, stage: RouterStage) -> None:
    """Copy the files that will change while the stage runs."""
    model = stage.model
    with stage.processes.together():
        if not stage.processes.is_first:
            return
        if not stage.progress.has("tuned-"):
            shutil.rmtree(copies.folder, ignore_errors=True)
        copies.folder.mkdir(parents=True, exist_ok=True)
        copies.prepare(model.architecture.gate_names())
        if stage.settings.trains_experts:
            experts = range(model.num_experts)
            copies.prepare(model.architecture.expert_names(experts))


def _write_report_and_card(
    edit: Edit,
    result: RouterResult,
    before: AnyReport,
    copies: PatchedCopies,
    form: MixtureFormat,
    digest: str,
) -> list[str]:
    """Write card and report that speak of the new gates; return the names of files that go.

    Args:
        digest: By which the same call is known.
    """
    # Experts that were trained before are so still.
    earlier = before.router and before.router.experts_sha256
    kept = {"experts_sha256": earlier} if earlier else {}
    changes = {"router": {**kept, **result.report}}
    obsolete = write_report_and_card(edit, before, changes, copies.obsolete, digest=digest)
    config, complete = edit.model / "config.json", complete_config(copies.config, form)
    if complete != read_json(edit.out / "config.json", "the mixture"):
        write_json(config, complete)
    elif len(list(edit.model.glob("*.safetensors"))) > 1:
        # Between the first and the last of them the folder must not load as a model.
        shutil.copyfile(edit.out / "config.json", config)
    return obsolete
