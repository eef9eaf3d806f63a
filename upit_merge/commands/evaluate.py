"""`upit-merge evaluate`: how good a mixture is on held-out data, and what its router does."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from upit_merge.commands.compare import Rival, check_rivals, rival_losses
from upit_merge.commands.measured_files import ModelFiles
from upit_merge.commands.measured_mixture import MixtureMeasurement
from upit_merge.commands.options import MixtureOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.rivals import Rivals, Sources, opened_sources, source_folders
from upit_merge.commands.session import RouterSession, router_session
from upit_merge.config.router import RouterSettings
from upit_merge.errors import UpitError, argument
from upit_merge.io.results import check_is_not_data
from upit_merge.io.text_file import write_json
from upit_merge.models.mixture import inspect_mixture, read_mixture
from upit_merge.output.edit import Edit
from upit_merge.output.staging import REPORT, check_output_exists
from upit_merge.report.document import read_report
from upit_merge.report.evaluation_record import Evaluation as Record
from upit_merge.report.evaluation_record import with_earlier_others
from upit_merge.report.evaluation_tables import terminal_comparison
from upit_merge.report.heatmap import check_format, draw_routing
from upit_merge.report.next_steps import (
    code_words,
    data_words,
    free_folder,
    seed_words,
    tell_next,
)
from upit_merge.report.tables import show
from upit_merge.report.verdict import evaluation_verdict, hardly_used_sentence
from upit_merge.report.write import write_report_and_card
from upit_merge.resizing.extracting import ExtractedModel
from upit_merge.router.buckets import assign_by_loss
from upit_merge.router.evaluation import Evaluation, Groups, dense_bytes, disk_bytes, rows
from upit_merge.router.stage import RouterStage
from upit_merge.router.worth import Rival as Measured
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.processes import joined


@dataclass(frozen=True)
class EvaluateOptions(MixtureOptions):
    """What to look at, and where to put it.

    Args:
        group_by: Column of the data that tells kinds of text apart.
        json: Receives all numbers.
        plot: Receives the routing heat map.
        card: Put the results on the model card, and into the report.
        experts: Compare with every expert as a dense model, which costs a run for each.
        control: Compare with gates fitted to shuffled buckets, the router's seed data at hand.
        rivals: Compare with the dense models that can be made of the same checkpoints, and with
            random gates.
        against: Other models to compare with.
    """

    group_by: str | None = None
    json: Path | None = None
    plot: Path | None = None
    card: bool = False
    experts: bool = True
    control: bool = False
    rivals: bool = True
    against: tuple[Rival, ...] = ()


def evaluate_output(out: Path, settings: RouterSettings, options: EvaluateOptions) -> Evaluation:
    """Evaluate the MoE folder `out`, layer by layer; prints tables.

    Nothing is changed but, with `options.card`, the model card and the report.

    Under torchrun or `accelerate launch` all processes must call this; they share the samples.

    Args:
        settings: Of these, what says which data, how much of it, and in which batches.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, the data does not fit, or a file
            cannot be written.
    """
    check_output_exists(out)
    assert settings.data is not None
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UpitError(f"The folder of {path} does not exist; create it first.")
        if path is not None:
            check_is_not_data(path, settings.data or "")
    if options.plot is not None:
        check_format(options.plot)
    files = ModelFiles.before_opening(out)
    with (
        joined() as processes,
        ends_at_once(lambda: "Interrupted."),
        router_session(out, "evaluate", options, processes, changes=options.card) as session,
        tempfile.TemporaryDirectory() as scratch,
        contextlib.ExitStack() as stack,
    ):
        edit = session.edit
        if options.card:
            with processes.together():
                _check_report(out)
            stack.enter_context(
                edit.interruptible("the model card and the report are as they were")
            )
        if options.against:
            with processes.together():
                vocab_size = read_mixture(session.moe).dense_settings()["vocab_size"]
                check_rivals(options.against, vocab_size, out, options.open)
        evaluation, beside, samples = _evaluate(session, files, settings, options, Path(scratch))
        if processes.is_first:
            record = condensed(evaluation, beside, settings.data, samples)
            _tell(evaluation, record, out, options)
            if options.card:
                _keep(edit, record, quiet=options.quiet)
            if not options.quiet:
                on_card = options.card or _is_on_card(out, record)
                steps = _next_steps(session, evaluation, settings, options, on_card=on_card)
                tell_next(*steps)
    return evaluation


def _next_steps(
    session: RouterSession,
    evaluation: Evaluation,
    settings: RouterSettings,
    options: EvaluateOptions,
    *,
    on_card: bool,
) -> Iterator[tuple[str, str]]:
    """Yield what can be done next: nothing that was done, and nothing that would be refused.

    Args:
        on_card: This very evaluation is on the card, or there is none to put it on.
    """
    folder, code = argument(session.edit.out), code_words(options.open)
    data = data_words(settings)
    if options.seed:
        data += f" --seed {options.seed}"
    if options.group_by:
        data += f" --group-by {argument(options.group_by)}"
    averaged = any(rival.kind == "average" for rival in evaluation.rivals)
    if not options.against and not averaged and _has_average(session):
        mean = free_folder("mean")
        yield "write the average of its experts", f"upit-merge extract {folder} --average {mean}"
        against = f"upit-merge evaluate {folder} {data} --against {mean}{code}"
        yield "measure that beside it", against
    if evaluation.dead():
        seeds = seed_words(session.edit.out)
        yield "leave out experts", f"upit-merge shrink {folder} --experts N {seeds}{code}"
    page = f"upit-merge inspect {folder} {data} --html routing.html{code}"
    yield "see where every token goes", page
    if not on_card:
        shown = data + " --no-experts" * (not options.experts) + " --control" * options.control
        shown += " --no-rivals" * (not options.rivals)
        for rival in options.against:
            shown += f" --against {argument(f'{rival.name}={rival.reference}')}"
        yield "put this on the card", f"upit-merge evaluate {folder} {shown} --card{code}"


def _has_average(session: RouterSession) -> bool:
    """Return whether a dense model computes what the mean of the experts does."""
    try:
        architecture = inspect_mixture(session.moe)
        ExtractedModel(session.moe, architecture, range(architecture.num_experts))
    except UpitError:
        return False
    return True


def _is_on_card(out: Path, record: dict[str, Any]) -> bool:
    """Return whether card and report say this very thing, or there is no report to say it in."""
    document = read_report(out).document
    earlier = document.get("evaluation") or {}
    merged = json.loads(json.dumps({"others": [], **with_earlier_others(earlier, record)}))
    return not document or {"others": [], **earlier} == merged


def _check_report(out: Path) -> None:
    if not read_report(out).document:
        raise UpitError(
            f"{out} has no {REPORT} to keep the results in; leave out --card, or take --json."
        )


def _keep(edit: Edit, record: dict[str, Any], *, quiet: bool) -> None:
    """Put an evaluation into report and card; what else was measured on the same text stays."""
    before = read_report(edit.out)
    record = with_earlier_others(before.document.get("evaluation") or {}, record)
    edit.emptied()
    gone = write_report_and_card(edit, before, {"evaluation": record}, same_model=True)
    edit.put_into_place({}, gone)
    if not quiet:
        print(f"The results are in the report of {edit.out} and on its card.")


def condensed(
    evaluation: Evaluation, beside: Rivals | None, data: str, samples_sha256: str
) -> dict[str, Any]:
    """Return what the report keeps of an evaluation: `to_report` without what is per sample.

    Args:
        beside: The dense models of the same checkpoints.
        data: Where the samples are from; of a file only its name is kept.
        samples_sha256: Digest of the samples' tokens.
    """
    report = evaluation.to_report()
    groups, whole = report["groups"], evaluation.groups.whole
    if whole not in groups:  # there is one kind of text, which is all
        (whole,) = groups
    by_layer = groups[whole]["routing"]
    for name, shares in rows(evaluation):
        groups[name] = {key: v for key, v in groups[name].items() if key != "entropy"}
        groups[name]["routing"] = shares
    worth = report.get("worth")
    if worth and beside is not None:
        recipe = beside.recipe(evaluation.worth)
        left_out = " ".join(filter(None, (beside.left_out, beside.no_recipe(evaluation.worth))))
        worth |= {"left_out": left_out} if left_out else {}
        worth |= {"recipe": recipe} if recipe else {}
    return {
        "data": Path(data).name if Path(data).expanduser().exists() else data,
        "samples_sha256": samples_sha256,
        "whole": whole,
        "groups": groups,
        "by_layer": by_layer,
        "dead_places": len(report["dead"]),
        "entropy": evaluation.entropy(range(len(evaluation.samples))),
        "agreement": report.get("agreement"),
        **({"estimated": True} if evaluation.is_estimated else {}),
        **{key: report[key] for key in ("hardly_used", "others") if key in report},
        **({"worth": worth} if worth else {}),
    }


def _evaluate(
    session: RouterSession,
    files: ModelFiles,
    settings: RouterSettings,
    options: EvaluateOptions,
    scratch: Path,
) -> tuple[Evaluation, Rivals | None, str]:
    """Return the evaluation, the models beside it, and a digest of what it was made on."""
    out = session.edit.out
    processes = session.edit.processes
    with contextlib.ExitStack() as stack:
        with processes.together():
            control = _control(session, scratch) if options.control else None
            held_out = session.stage(settings, scratch, column=options.group_by)
            sources = Sources(None)
            if options.rivals:
                files = files.and_of(*source_folders(session))
                sources = stack.enter_context(opened_sources(session))
        parts = ["mixture"]
        if options.experts and held_out.model.num_experts > 1:
            parts.append("experts")
        if control is not None:
            parts.append("control")
        beside = "rivals" if "experts" in parts else "blends"
        if options.rivals:
            parts.append(beside)
        measured = MixtureMeasurement.of(session, files, held_out, control, sources, parts)
        if options.against or not measured.before.keys() >= set(parts):
            with processes.together():
                check_router_memory(held_out.model, held_out.lengths, settings, out, evaluated=True)
        if processes.is_first and not options.quiet:
            print(held_out.seeds.summary("Data"))
            for sentence in measured.told(parts):
                print(sentence)
        sums, routing = measured.mixture(_label(1, "this mixture", options))
        samples = held_out.seeds.samples
        evaluation = Evaluation(samples, Groups.of(samples), sums, routing)
        whole, of_expert = disk_bytes(held_out.model)
        evaluation = replace(
            evaluation,
            mixture_bytes=whole,
            expert_bytes=of_expert,
            dense_bytes=dense_bytes(held_out.model),
        )
        losses = measured.experts() if "experts" in parts else None
        if losses is not None:
            evaluation = replace(evaluation, buckets=assign_by_loss(losses, "lowest"))
        if control is not None:
            evaluation = replace(evaluation, control=measured.shuffled())
        label = _label(2, "dense models of its checkpoints", options)
        found = measured.rivals(beside, losses, label) if options.rivals else None
        rivals = [*found.models] if found else []
        for number, rival in enumerate(options.against, 2 + options.rivals):
            stage = replace(held_out, label=_label(number, rival.name, options))
            own = rival_losses(rival, stage, out, options.open)
            rivals.append(Measured("other", rival.name, own))
    return replace(evaluation, rivals=rivals), found, held_out.seeds.digest()


def _label(number: int, name: str, options: EvaluateOptions) -> str:
    """Return what a progress bar says of one model of several."""
    models = 1 + options.rivals + len(options.against)
    return f"model {number} of {models} ({name})" if models > 1 else ""


def _control(session: RouterSession, scratch: Path) -> RouterStage:
    """Return the stage that made the mixture's gates, but with shuffled buckets."""
    out = session.edit.out
    router = read_report(out).router
    recorded = router.fit() if router else None
    if router is None or recorded is None:
        raise UpitError(
            f"{out} has no record of how its gates were trained, so there is nothing to compare "
            "shuffled buckets with; leave out --control, or train them with `upit-merge router`."
        )
    settings, seed = recorded
    if not settings.needs_buckets or settings.trains_experts:
        raise UpitError(
            f"The gates of {out} come from objective: {settings.objective}"
            f"{' with train_experts' * settings.trains_experts}, which has no control; leave out "
            "--control."
        )
    shuffled = settings.model_copy(update={"assign": "shuffled"})
    return session.stage(shuffled, scratch, seed=seed, quick=router.compute == "bfloat16")


def _tell(
    evaluation: Evaluation, record: dict[str, Any], out: Path, options: EvaluateOptions
) -> None:
    if options.json is not None:
        kept = {key: record[key] for key in ("worth",) if key in record}
        write_json(options.json, evaluation.to_report() | kept)
    if not options.quiet:
        _print(evaluation, Record.model_validate(record), out)
    if options.plot is not None:
        whole = evaluation.groups.whole
        groups = [row for row in rows(evaluation) if row[0] != whole] or list(rows(evaluation))
        everything = range(len(evaluation.samples))
        draw_routing(options.plot, groups, evaluation.shares(everything).tolist())


def _print(evaluation: Evaluation, record: Record, out: Path) -> None:
    everything = range(len(evaluation.samples))
    show(terminal_comparison(record))
    show(_routing(evaluation))
    entropy = evaluation.entropy(everything)
    print(
        f"Entropy of the routing, 1 is even: {entropy['token']:.2f} per token, "
        f"{entropy['load']:.2f} over all tokens."
    )
    dead = evaluation.dead()
    places = ", ".join(f"{expert} in layer {layer}" for layer, expert in dead[:6])
    more = ", …" if len(dead) > 6 else ""
    print(f"Experts with less than a tenth of an even share: {places + more if dead else 'none'}.")
    if idle := hardly_used_sentence(record, argument(out), seed_words(out)):
        print(idle)
    if (agreement := evaluation.agreement()) is not None:
        print(
            f"The expert that predicts a sample best is the first choice for "
            f"{agreement['first']:.0%} of its tokens (chance: {agreement['chance']:.0%}), and "
            f"among the chosen for {agreement['chosen']:.0%}."
        )
    print(evaluation_verdict(record))
    if record.worth is not None and record.worth.recipe:
        print(f"The recipe that makes it, for mergekit-yaml:\n\n{record.worth.recipe}")


def _routing(evaluation: Evaluation) -> Table:
    table = Table(title="Share of the routed places, mean over the layers", title_justify="left")
    table.add_column("expert", justify="right")
    groups = list(rows(evaluation))
    for name, _shares in groups:
        table.add_column(name, justify="right")
    for expert in range(len(groups[0][1])):
        table.add_row(str(expert), *(f"{shares[expert]:.1%}" for _name, shares in groups))
    return table
