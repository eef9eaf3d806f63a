"""`upit-merge inspect`: where a mixture's router sends every token, as a page and as numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from upit_merge.commands.options import MixtureOptions
from upit_merge.commands.preflight import check_router_memory
from upit_merge.commands.session import RouterSession, router_session
from upit_merge.config.router import RouterSettings
from upit_merge.data.pieces import text_pieces
from upit_merge.errors import UpitError, counted, one_line
from upit_merge.io.disk import explained_failures
from upit_merge.io.results import check_is_not_data
from upit_merge.io.text_file import replace_text, write_json
from upit_merge.models.tokenizer import load_tokenizer
from upit_merge.output.staging import check_output_exists
from upit_merge.report.next_steps import SEED, seed_data_of
from upit_merge.report.routing_advice import advice_on, pairs_named
from upit_merge.report.routing_page import (
    MARK,
    MOST_KEPT,
    ShownSample,
    Views,
    most_tokens,
    routing_page,
)
from upit_merge.report.tables import show
from upit_merge.resizing.twins import (
    NEAR_SHARE,
    SAME_DISTANCE,
    SAME_ROUTING,
    Pair,
    compare_weights,
    pairs_of,
)
from upit_merge.router.choices import RARE_SHARE, Excerpt, Observation, observe
from upit_merge.router.counts import DEAD_SHARE
from upit_merge.router.evaluation import Groups
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.interrupt import ends_at_once
from upit_merge.runtime.parallel import progress_bar
from upit_merge.runtime.processes import check_single_process

# An expert's even share of fewer tokens than this says little about how it is used.
FEW_TOKENS = 100


@dataclass(frozen=True)
class InspectOptions(MixtureOptions):
    """What to look at, and where to put it.

    Args:
        group_by: Column of the data that tells kinds of text apart.
        html: Receives the page.
        json: Receives all numbers.
        tokens: How many the page shows.
        force: Replace a file that is no page of ours.
    """

    group_by: str | None = None
    html: Path | None = None
    json: Path | None = None
    tokens: int = 2000
    force: bool = False


def inspect_output(out: Path, settings: RouterSettings, options: InspectOptions) -> dict[str, Any]:
    """Look at the routers of the MoE folder `out`, layer by layer; nothing in it is changed.

    Args:
        settings: Of these, what says which data, how much of it, and in which batches.

    Returns:
        All numbers, as `--json` has them.

    Raises:
        UpitError: `out` is no MoE folder with a tokenizer, the data does not fit, or a file
            cannot be written.
    """
    check_single_process("inspect")
    check_output_exists(out)
    _check_files(out, settings.data or "", options)
    with (
        ends_at_once(lambda: "Interrupted; nothing was written."),
        router_session(out, "inspect", options, changes=False) as session,
        tempfile.TemporaryDirectory() as scratch,
    ):
        stage = session.stage(settings, Path(scratch), column=options.group_by)
        check_router_memory(stage.model, stage.lengths, settings, out, evaluated=True)
        if not options.quiet:
            print(stage.seeds.summary("Data"))
        groups = Groups.of(stage.seeds.samples)
        excerpt = _excerpt(stage, groups, options)
        seen = observe(stage, excerpt)
        pairs = _pairs(session, stage, seen)
        document = _document(out, stage, groups, excerpt, seen, pairs)
        if options.html is not None:
            page = _page(out, stage, groups, excerpt, seen, document, options)
            with explained_failures(options.html):
                replace_text(options.html, page)
        if options.json is not None:
            with explained_failures(options.json):
                write_json(options.json, document)
    if not options.quiet:
        _tell(out, document, options)
    return document


def _check_files(out: Path, data: str, options: InspectOptions) -> None:
    """Refuse files that cannot be written, or should not be, before anything is computed."""
    for path in (options.html, options.json):
        if path is None:
            continue
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UpitError(f"The folder of {path} does not exist; create it first.")
        if not os.access(folder, os.W_OK):
            raise UpitError(f"The folder of {path} cannot be written to; choose another.")
        check_is_not_data(path, data)
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UpitError(f"{path} lies in {out}, which is only looked at; choose another place.")
    page = options.html
    if page is None:
        return
    if options.json is not None and page.absolute() == options.json.absolute():
        raise UpitError(f"--html and --json both name {page}; give two files.")
    if options.force or not page.exists():
        return
    if not _is_ours(page):
        raise UpitError(
            f"{page} exists and is no page of `upit-merge inspect`; choose another name, or give "
            "--force."
        )


def _is_ours(page: Path) -> bool:
    """Return whether a file is a page of this command; pipes and devices are not even opened."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return file.read(len(MARK.encode())) == MARK.encode()


def _excerpt(stage: RouterStage, groups: Groups, options: InspectOptions) -> Excerpt:
    model = stage.model
    top_k = model.format.chosen(model.architecture.config)
    tokens = most_tokens(len(model.mixture_layers), model.num_experts, top_k, options.tokens)
    members = [m for name, m in groups.members.items() if name != groups.whole]
    labelled = {index for group in members for index in group}
    rest = [index for index in stage.everything if index not in labelled]
    return Excerpt.of(stage.seeds.samples, [g for g in (*members, rest) if g], tokens)


def _pairs(session: RouterSession, stage: RouterStage, seen: Observation) -> list[Pair]:
    architecture, specs = stage.model.architecture, session.moe.specs
    names = architecture.expert_names(range(stage.model.num_experts))
    total = sum(specs[name].numel for name in names)
    with progress_bar(total, "comparing experts", quiet=stage.quiet, unit="weight") as bar:
        weights = compare_weights(session.moe, architecture, on_progress=bar.update)
    return pairs_of(weights, seen.correlation)


# ---- numbers -----------------------------------------------------------------------------------


def _document(
    out: Path,
    stage: RouterStage,
    groups: Groups,
    excerpt: Excerpt,
    seen: Observation,
    pairs: Sequence[Pair],
) -> dict[str, Any]:
    """Return all numbers: what `--json` writes, and the page and the terminal show."""
    model, lengths = stage.model, stage.lengths
    layers, experts = list(model.mixture_layers), model.num_experts
    counts = seen.routing.counts(stage.everything)
    top_k = model.format.chosen(model.architecture.config)
    data = stage.settings.data or ""
    document: dict[str, Any] = {
        "model": out.resolve().name,
        "format": model.format.title,
        "data": one_line(Path(data).name if Path(os.path.expanduser(data)).exists() else data),
        "samples": len(lengths),
        "tokens": sum(lengths),
        "shown": {"samples": len(excerpt.lengths), "tokens": excerpt.num_tokens},
        "num_experts": experts,
        "chosen": top_k,
        "layers": layers,
        "few_tokens": sum(lengths) * top_k / experts < FEW_TOKENS,
        "thresholds": {
            "dead": DEAD_SHARE,
            "rare": RARE_SHARE,
            "near": NEAR_SHARE,
            "same": SAME_DISTANCE,
            "routing": SAME_ROUTING,
        },
        "groups": {
            name: {
                "samples": len(members),
                "tokens": sum(lengths[index] for index in members),
                "shares": seen.routing.counts(members).shares.tolist(),
            }
            for name, members in groups.members.items()
        },
        "whole": groups.whole if groups.whole in groups.members else next(iter(groups.members)),
        "entropy": counts.mean_entropy(),
        "gate_weight": seen.weights.tolist(),
        **_usage(counts.shares, counts.chosen, layers),
        "pairs": [_pair_record(pair) for pair in pairs],
    }
    document["advice"] = advice_on(
        document, document["model"], Path(seed_data_of(out) or SEED).name
    )
    return document


def _pair_record(pair: Pair) -> dict[str, Any]:
    record = {**asdict(pair), "experts": list(pair.experts), "of_median": pair.typical}
    del record["typical"]
    return record


def _usage(shares: Tensor, chosen: Tensor, layers: Sequence[int]) -> dict[str, Any]:
    """Return who is hardly used, by expert and by place."""
    experts = shares.shape[1]
    kinds = {
        "never": chosen == 0,
        "dead": shares < DEAD_SHARE / experts,
        "rare": (shares < RARE_SHARE / experts) & (shares >= DEAD_SHARE / experts),
    }
    places = {
        kind: [{"layer": layers[row], "expert": expert} for row, expert in found.nonzero().tolist()]
        for kind, found in kinds.items()
    }
    rows = []
    for expert, share in enumerate(shares.mean(0).tolist()):
        state = "used"
        if share < RARE_SHARE / experts:
            state = "dead" if share < DEAD_SHARE / experts else "rare"
        inside = {
            f"{kind}_in": [place["layer"] for place in places[kind] if place["expert"] == expert]
            for kind in kinds
        }
        rows.append({"expert": expert, "share": share, "state": state, **inside})
    return {"experts": rows, "usage": places}


# ---- the page ----------------------------------------------------------------------------------


def _page(
    out: Path,
    stage: RouterStage,
    groups: Groups,
    excerpt: Excerpt,
    seen: Observation,
    document: Mapping[str, Any],
    options: InspectOptions,
) -> str:
    tokenizer = load_tokenizer(out, trust_remote_code=options.open.trust_remote_code)
    group_of = {
        index: name
        for name, members in groups.members.items()
        if name != groups.whole
        for index in members
    }
    samples = []
    for index, length in excerpt.lengths.items():
        ids = stage.seeds.samples[index].input_ids
        # A character that is cut in two is decoded with what follows it.
        pieces = text_pieces(ids, tokenizer)[:length]
        samples.append(ShownSample(index + 1, group_of.get(index), len(ids), ids[:length], pieces))
    vocabulary = {
        token: str(tokenizer.convert_ids_to_tokens(token))
        for sample in samples
        for token in sample.ids
    }
    return routing_page(document, samples, _views(seen, stage.model.num_experts), vocabulary)


def _views(seen: Observation, num_experts: int) -> Views:
    choices = seen.choices
    kept = min(choices.experts.shape[2], MOST_KEPT)
    experts, shares = choices.summed(num_experts)
    return Views(
        torch.cat([experts.unsqueeze(0), choices.experts])[:, :, :kept],
        torch.cat([shares.unsqueeze(0).float(), choices.shares])[:, :, :kept],
        torch.cat([shares[:, :1].T.float(), seen.certainty]),
    )


# ---- the terminal ------------------------------------------------------------------------------


def _tell(out: Path, document: Mapping[str, Any], options: InspectOptions) -> None:
    show(_experts(document))
    usage, limits = document["usage"], document["thresholds"]
    even = document["tokens"] * document["chosen"] / document["num_experts"]
    print(
        f"Of {counted(document['tokens'], 'token')}, an even share is {even:,.0f}. Dead (under "
        f"{limits['dead']:.0%} of it) in {counted(len(usage['dead']), 'place')}, rare (under "
        f"{limits['rare']:.0%}) in {len(usage['rare'])}, of "
        f"{len(document['layers']) * document['num_experts']}."
    )
    twins = [pair for pair in document["pairs"] if pair["by_weights"] or pair["by_routing"]]
    print(f"Twins: {pairs_named([pair['experts'] for pair in twins]) or 'none'}.")
    for advice in advice_on(document, str(out), seed_data_of(out) or SEED):
        print(advice["text"])
        if "command" in advice:
            print(f"  {advice['command']}")
    if options.html is not None:
        print(f"The page is {options.html}; open it in a browser.")
    else:
        print("To see it token by token, give --html FILE.")


def _experts(document: Mapping[str, Any]) -> Table:
    layers = counted(len(document["layers"]), "layer")
    title = f"What the router does with every expert, in {layers}"
    table = Table(title=title, title_justify="left")
    # As narrow as it can be: it has to fit on 80 columns.
    columns = ("expert", "share", "", "dead in", "rare in", "nearest", "distance", "of median")
    for column in columns:
        table.add_column(column, justify="right")
    nearest: dict[int, Mapping[str, Any]] = {}
    for pair in sorted(document["pairs"], key=lambda pair: pair["distance"]):
        for expert in pair["experts"]:
            nearest.setdefault(expert, pair)
    for row in document["experts"]:
        near = nearest.get(row["expert"])
        beside = ("", "", "")
        if near is not None:
            (other,) = (e for e in near["experts"] if e != row["expert"])
            typical = near["of_median"]
            beside = (
                str(other),
                f"{near['distance']:.2g}",
                "" if typical is None else f"{typical:.2f}",
            )
        table.add_row(
            str(row["expert"]),
            f"{row['share']:.1%}",
            "" if row["state"] == "used" else row["state"],
            str(len(row["dead_in"]) or ""),
            str(len(row["rare_in"]) or ""),
            *beside,
        )
    return table
