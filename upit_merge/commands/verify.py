"""`upit-merge verify`: is an output folder what its recipe makes of its models?"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from upit_merge import __version__
from upit_merge.commands.finished import as_chosen, output_config
from upit_merge.commands.run import RunOptions, write_settings
from upit_merge.config.recipe import Recipe, load_recipe
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import Checkpoint
from upit_merge.io.tensor_file import TensorSpec
from upit_merge.io.text_file import json_text, write_json
from upit_merge.merge.experts import write_experts
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.merge.lineage import Lineage
from upit_merge.merge.passes import find_lineage, is_one_pass, measure_similarity, write_constants
from upit_merge.models.gates import gates_digest, tensors_digest
from upit_merge.models.mixture import mixture_specs, opened_mixture
from upit_merge.models.tokenizer import has_tokenizer
from upit_merge.models.tokenizer_files import CONFIG_FILE, GENERATION_FILE
from upit_merge.output.journal import Saver
from upit_merge.output.staging import REPORT, check_output_exists, output_files
from upit_merge.report.any_version import AnyReport, AnyRouter
from upit_merge.report.document import read_report
from upit_merge.report.tables import show
from upit_merge.report.write import RECIPE_COPY
from upit_merge.router.pretrain import computed_mixture, pretrain_router, seed_set_for
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.device import resolve_devices
from upit_merge.runtime.interrupt import ends_at_once

# Of the largest entry: gates fitted on another processor differ by rounding, of no consequence.
_GATE_TOLERANCE = 0.01


class Comparison:
    """A sink that writes nothing: it compares what it is given with an open model.

    Attributes:
        differing: Names of the tensors of which some element has other bits.
    """

    def __init__(self, moe: Checkpoint, names: Collection[str]) -> None:
        self.differing: set[str] = set()
        self._moe = moe
        self._names = names
        self._lock = threading.Lock()

    def wants(self, name: str) -> bool:
        return name in self._names

    def dtype(self, name: str) -> torch.dtype:
        return self._moe.specs[name].dtype

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Compare rows beginning at row `start`, bit by bit."""
        stored = self._moe.rows(name, start, start + rows.shape[0])
        expected = rows.to(device="cpu", dtype=stored.dtype).contiguous()
        # As integers: NaN would differ from itself, and zeros of both signs would be equal.
        if not torch.equal(expected.view(torch.uint8), stored.view(torch.uint8)):
            with self._lock:
                self.differing.add(name)


@dataclass(frozen=True)
class Finding:
    """One part of the output: how much of it was looked at, and what is wrong with it."""

    part: str
    looked_at: str
    faults: tuple[str, ...] = ()
    note: str = ""


def verify_output(
    out: Path, recipe_path: Path | None, options: RunOptions, *, gates: bool = False
) -> None:
    """Recompute an output from its recipe, report and models; print a table of what agrees.

    Args:
        out: The folder of an earlier run.
        recipe_path: The recipe; the copy in `out` if None.
        gates: Fit the gates again from the seed data; else their recorded digest is compared.

    Raises:
        UpitError: the output differs, with the first place; or it cannot be told, because the
            recipe, the report or a model is missing.
    """
    with ends_at_once(lambda: "Interrupted."):
        report = _report(out)
        findings = list(_findings(out, recipe_path, report, options, gates=gates))
    if not options.quiet:
        show(_table(findings))
    faults = [fault for finding in findings for fault in finding.faults]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        maker = report.versions.get("upit-merge", __version__)
        other = "" if maker == __version__ else f" (it was made by version {maker} of upit-merge)"
        raise UpitError(
            f"{out} is not what its recipe makes of these models{other}: {faults[0]}{more}; run "
            "the recipe again, or put the models and files back that it was made from."
        )
    if not options.quiet:
        print(f"{out} is what its recipe makes of these models.")


def _findings(
    out: Path,
    recipe_path: Path | None,
    report: AnyReport,
    options: RunOptions,
    *,
    gates: bool,
) -> Iterator[Finding]:
    recipe = _recipe(out, recipe_path, report)
    devices = resolve_devices(options.device, multi_gpu=options.multi_gpu)
    with (
        opened_mixture(out, str(out)) as moe,
        opened(recipe, options.open) as inputs,
    ):
        if inputs.labels != report.checkpoints:
            raise UpitError(
                f"{out} was made from {len(report.checkpoints)} checkpoints "
                f"({', '.join(report.checkpoints)}), but its recipe now finds "
                f"{', '.join(inputs.labels)}; restore the models it was made from."
            )
        architecture, extensions = inputs.architecture, report.extensions
        present = inputs.num_experts + len(extensions)
        body, gate_specs = mixture_specs(architecture, present, inputs.dtype)
        expected = {spec.name: spec for spec in [*body, *gate_specs]}
        misfits = dict(_misfits(moe, expected))
        yield Finding("tensors", f"{len(expected)} names and shapes", tuple(misfits.values()))
        gram = None
        if not is_one_pass(inputs):
            gram = measure_similarity(inputs, devices, quiet=options.quiet)
        lineage = find_lineage(inputs, gram)
        yield Finding(
            "lineage",
            f"{len(lineage)} experts",
            tuple(_lineage_faults(lineage, report.document["lineage"])),
        )
        names = {name for name in expected if name not in misfits}
        router = report.router if report.document["router"] else None  # {} is none, too
        if router or extensions:
            names -= {*architecture.gate_names()}
        trained = router and router.experts_sha256
        later_digests = {extension.expert: extension.sha256 for extension in extensions}
        if trained:
            later_digests |= dict(enumerate(trained))
        names -= {*architecture.expert_names(later_digests)}
        comparison = Comparison(moe, names)
        with Saver(None) as saver:
            write_experts(
                comparison,
                inputs,
                lineage,
                saver,
                devices=devices,
                quiet=options.quiet,
                description="verifying",
            )
        write_constants(comparison, inputs)
        yield from _weight_findings(inputs, names, comparison.differing)
        if later_digests:
            yield _recorded_finding(moe, later_digests, inputs)
        if router is None and extensions:
            router = extensions[-1].router
        if router is not None:
            yield _gate_finding(
                moe, router, inputs, options, refit=gates, extended=bool(extensions)
            )
        inputs = replace(as_chosen(inputs, report), num_experts=present)
        yield _file_finding(out, inputs, options)


def _report(out: Path) -> AnyReport:
    check_output_exists(out)
    if not (out / REPORT).is_file():
        raise UpitError(
            f"{out} has no {REPORT}; it is not the output of a upit recipe, so nothing can be "
            "verified."
        )
    report = read_report(out)
    for key in ("seed", "checkpoints", "lineage", "router"):
        if key not in report.document or (key == "lineage" and not report.lineage):
            raise UpitError(
                f"{out / REPORT} has no {key}; it is not the report of a upit run, so nothing can "
                "be verified."
            )
    if report.document.get("post_training"):
        raise UpitError(
            f"{out} was trained further by `upit-merge finetune`, so that it is not what its "
            "recipe makes any more; verify the model before that."
        )
    if report.shrunk:
        dropped = any(record.get("how") == "drop" for record in report.document["shrunk"])
        told = (
            f"Some experts of {out} were dropped"
            if dropped
            else f"The experts of {out} were merged"
        )
        raise UpitError(
            f"{told} by `upit-merge shrink`, so that it is not what its recipe makes any more; "
            "verify the model before that."
        )
    return report


def _recipe(out: Path, recipe_path: Path | None, report: AnyReport) -> Recipe:
    path = recipe_path or out / RECIPE_COPY
    if not path.is_file() and recipe_path is None:
        raise UpitError(f"There is no {RECIPE_COPY} in {out}; give the recipe with --recipe.")
    recipe, _text = load_recipe(path)
    # --random-seed may have replaced the recipe's own.
    return recipe.with_seed(report.seed)


def _misfits(moe: Checkpoint, expected: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    """Yield (tensor name, what is wrong with it) where tensors are not the planned ones."""
    for name, spec in expected.items():
        stored = moe.specs.get(name)
        if stored is None:
            yield name, f"{name} is missing"
        elif (stored.shape, stored.dtype) != (spec.shape, spec.dtype):
            yield name, f"{name} is {_form(stored)} instead of {_form(spec)}"
    for name in moe.specs:
        if name not in expected:
            yield name, f"{name} should not be there"


def _form(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def _lineage_faults(lineage: Lineage, recorded: Mapping[str, Any]) -> Iterator[str]:
    now = lineage.to_report()
    if len(recorded["experts"]) != len(now["experts"]):
        yield f"the report has {len(recorded['experts'])} experts, the recipe {len(now['experts'])}"
        return
    for index, (old, new) in enumerate(zip(recorded["experts"], now["experts"], strict=True)):
        if old != new:
            yield f"expert {index} is grown from other parents than the report says"
    old_units, new_units = ([*(part.get("units") or ())] for part in (recorded, now))
    if [unit["name"] for unit in old_units] != [unit["name"] for unit in new_units]:
        yield "the report speaks of other layers or tensors than the recipe grows by themselves"
        return
    for old, new in zip(old_units, new_units, strict=True):
        if old != new:
            yield f"the experts' {new['name']} is grown from other parents than the report says"


def _weight_findings(
    inputs: Inputs, names: Collection[str], differing: Collection[str]
) -> Iterator[Finding]:
    architecture = inputs.architecture
    constants = architecture.format.constants(architecture.settings, inputs.num_experts)
    backbone = {*architecture.backbone_names(), *(constant.name for constant in constants)}
    parts = {"backbone": backbone}
    for expert in range(inputs.num_experts):
        parts[f"expert {expert}"] = set(architecture.expert_names([expert]))
    parts["gates"] = set(architecture.gate_names())
    for part, members in parts.items():
        compared = members & set(names)
        faults = [f"{name} differs" for name in sorted(members & set(differing))]
        if compared:
            yield Finding(part, f"{len(compared)} tensors", tuple(faults))


def _recorded_finding(moe: Checkpoint, digests: Mapping[int, str], inputs: Inputs) -> Finding:
    """Compare experts that were trained or added after the merge with their recorded digests."""
    faults = []
    for expert, digest in digests.items():
        names = sorted(inputs.architecture.expert_names([expert]))
        if tensors_digest(moe.tensor(name) for name in names) != digest:
            faults.append(f"expert {expert} is not the one the report speaks of")
    note = "" if faults else "as recorded when they were trained or added"
    return Finding("later experts", f"{len(digests)} experts", tuple(faults), note)


def _gate_finding(
    moe: Checkpoint,
    router: AnyRouter,
    inputs: Inputs,
    options: RunOptions,
    *,
    refit: bool,
    extended: bool,
) -> Finding:
    architecture = inputs.architecture
    stored = [moe.tensor(name) for name in architecture.gate_names()]
    looked_at = f"{len(stored)} tensors"
    if router.gates_sha256 is None:
        return Finding("gates", looked_at, note="the report has no digest of them")
    if gates_digest(stored, stored[0].dtype) != router.gates_sha256:
        return Finding("gates", looked_at, ("the gates are not those the report speaks of",))
    if extended:
        return Finding("gates", looked_at, note="as recorded; an expert was added to them")
    if router.experts_sha256:
        return Finding("gates", looked_at, note="as recorded after the experts' training")
    if not refit:
        return Finding("gates", looked_at, note="as recorded; --gates fits them again")
    fitted = _fitted_gates(moe, router, options)
    largest = max(
        float((new.to(old.dtype).double() - old.double()).abs().max())
        for new, old in zip(fitted, stored, strict=True)
    )
    if largest == 0:
        return Finding("gates", looked_at, note="fitted again: the same bits")
    scale = max(float(old.double().abs().max()) for old in stored)
    note = f"fitted again: within {largest / scale:.1e} of the largest entry"
    if largest > _GATE_TOLERANCE * scale:
        return Finding(
            "gates", looked_at, (f"the gates differ by up to {largest:.3g} once fitted again",)
        )
    return Finding("gates", looked_at, note=note)


def _fitted_gates(
    moe: Checkpoint, router: AnyRouter, options: RunOptions
) -> Sequence[torch.Tensor]:
    recorded = router.fit()
    if recorded is None:
        raise UpitError(
            f"The report of {moe.label} does not say how its gates were fitted, or in another "
            "version's words; verify it without --gates."
        )
    settings, seed = recorded
    device = resolve_devices(options.device, multi_gpu=options.multi_gpu)[0]
    # As it was computed, whatever this machine would choose by itself.
    model = computed_mixture(moe, device, settings, quick=router.compute == "bfloat16")
    seeds = seed_set_for(
        model,
        moe.folder,
        settings,
        seed,
        trust_remote_code=options.open.trust_remote_code,
    )
    with tempfile.TemporaryDirectory() as scratch:
        stage = RouterStage(model, seeds, settings, seed, Path(scratch), quiet=options.quiet)
        return pretrain_router(stage).gates  # no expert is trained


def _file_finding(out: Path, inputs: Inputs, options: RunOptions) -> Finding:
    """Compare configuration and tokenizer with those made once more in a scratch folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy = options.copy_tokenizer and has_tokenizer(out)
        write_settings(folder, inputs, (), copy_tokenizer=copy)
        write_json(folder / "config.json", output_config(inputs))
        names = output_files(folder)
        faults = []
        for name in names:
            if not (out / name).is_file():
                faults.append(f"{name} is missing")
            elif (out / name).read_bytes() not in _made(folder / name, inputs):
                faults.append(f"{name} differs")
    return Finding("settings, tokenizer", f"{len(names)} files", tuple(faults))


def _made(path: Path, inputs: Inputs) -> list[bytes]:
    """Return what may be in a file that was made again: what is, or was up to version 0.5."""
    if path.name == "config.json":
        later = inputs.architecture.format.wanted_fields(output_config(inputs))
        earlier = {key: value for key, value in output_config(inputs).items() if key not in later}
        earlier["use_cache"] = inputs.settings_donor.config.get("use_cache", True)
        return [path.read_bytes(), json_text(earlier).encode()]
    donor = inputs.tokenizer or inputs.settings_donor
    original = donor.small_file(path.name)
    is_copy = path.name in (CONFIG_FILE, GENERATION_FILE) and original.is_file()
    return [path.read_bytes(), *([original.read_bytes()] if is_copy else [])]


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Recomputed and compared", title_justify="left")
    for column in ("part", "compared", "result"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        verdict = "identical" if not finding.faults else f"{len(finding.faults)} differ"
        table.add_row(finding.part, finding.looked_at, finding.note or verdict)
    return table
