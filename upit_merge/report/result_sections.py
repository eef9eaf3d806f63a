"""Sections of the model card: router, post-training, evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from upit_merge.errors import counted
from upit_merge.report.chosen import chosen_sentences, idle_sentence
from upit_merge.report.document import (
    BucketRow,
    Extension,
    PostTraining,
    Report,
    Router,
    Shrinking,
)
from upit_merge.report.evaluation_record import Evaluation
from upit_merge.report.evaluation_tables import markdown_comparison
from upit_merge.report.markdown import (
    amount,
    best_in_bold,
    code,
    escaped,
    fenced,
    picture,
    table,
    with_code,
    without_local_paths,
)
from upit_merge.report.plots import POST_TRAINING, ROUTING
from upit_merge.report.verdict import evaluation_verdict, hardly_used_sentence
from upit_merge.router.router_gain import ANSWER

_TRAINED = {
    "all": "with all its weights",
    "ffn": "in its experts and gates",
    "router": "in its gates only",
    "lora": "by LoRA adapters, merged into it afterwards,",
}


def router_section(report: Report) -> str:
    """Tell what the gates are, and which expert the seed samples went to."""
    sentences = [router_sentence(report.router)]
    fitted = report.router
    for command, record in report.changes():
        if command == "router" or (isinstance(record, Extension) and record.gates == "all"):
            sentences, fitted = [router_sentence(report.router)], report.router
        elif isinstance(record, Extension):
            samples = counted(record.router.data.samples, "sample")
            sentences.append(
                f"Expert {record.expert} was added later: its gate was fitted on {samples}, the "
                "others stayed as they were."
            )
        elif isinstance(record, Shrinking) and record.refitted:
            told = f"They were fitted anew when {record.before} experts became {record.after}."
            sentences, fitted = [router_sentence(report.router), told], report.router
        elif command == "shrink":
            told = "The gates are means of those the experts had before they were merged."
            if isinstance(record, Shrinking) and record.how == "drop":
                told = "The gates are what is left of them since some experts were dropped."
            sentences, fitted = [router_sentence(report.router), told], None
    parts = [" ".join(sentences)]
    if fitted is not None and fitted.buckets is not None:
        parts.append(_bucket_table(fitted.buckets.experts))
        if verdict := fitted.buckets.worth.get("verdict"):
            # What `evaluate` tells is on this very card, further down.
            known = report.evaluation is not None
            parts.append(with_code(str(verdict).removesuffix(f" {ANSWER}" if known else "")))
    if fitted is not None:
        said = [*chosen_sentences(fitted.chosen), idle_sentence(fitted.chosen)]
        if words := " ".join(filter(None, said)):
            parts.append(with_code(words))
    return "\n\n".join(parts)


def router_sentence(router: Router | None) -> str:
    """Say how the gates were made, from the router's part of the report."""
    if router is None:
        return "The gates are random: no seed data was given, the router is yet to be trained."
    settings = router.settings
    prompted = settings.get("prompts") is not None
    samples = counted(router.data.samples, "prompt" if prompted else "seed sample")
    assigned = "each written for its expert" if prompted else _assigned(settings.get("assign"))
    if settings.get("objective") == "kmeans":
        sentence = (
            f"The gates are the centroids of a spherical k-means, layer by layer, on the tokens of "
            f"{samples} (`kmeans`): each expert is given what lies in its direction."
        )
    elif router.buckets is None:
        sentence = "The gates are random."
    elif (settings.get("upit") or {}).get("train_experts"):
        sentence = (
            f"Every expert was trained together with its routing vectors on its own part of "
            f"{samples}, {assigned}."
        )
    else:
        sentence = (
            f"The gates were pre-trained layer by layer on {samples} "
            f"({code(str(settings.get('objective')))}), {assigned}."
        )
    if router.refined is not None:
        steps = (settings.get("refine") or {}).get("steps")
        sentence += (
            f" Then the gates were trained for {steps} steps on the loss of the whole mixture."
        )
    return sentence


def _assigned(rule: Any) -> str:
    if isinstance(rule, dict):
        return f"each assigned to an expert by its {code(str(rule.get('column')))}"
    if rule == "shuffled":
        return "each assigned to an expert at random (a control)"
    return "each assigned to an expert by its perplexity"


def _bucket_table(rows: list[BucketRow]) -> str:
    """Tabulate the buckets; the losses, in nats per token, only if they were computed."""
    if all(row.loss_all is None for row in rows):
        return table(
            [">expert", ">seed samples"], [[str(r.expert), f"{r.samples:,}"] for r in rows]
        )
    columns = [">expert", ">seed samples", ">loss on its own", ">loss on all"]
    cells = [
        [str(r.expert), f"{r.samples:,}", *map(_number, (r.loss_own, r.loss_all))] for r in rows
    ]
    return table(columns, cells)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def post_training_section(report: Report, pictures: Collection[str]) -> str:
    """Tell what the whole mixture was trained on, how, and how its loss fell."""
    record = report.post_training
    if record is None:
        return ""
    parts = [" ".join(_post_training_sentences(record))]
    if POST_TRAINING in pictures:
        first, last = record.history[0], record.history[-1]
        alternative = (
            f"Post-training: the loss goes from {first.loss:.3f} at step {first.step} to "
            f"{last.loss:.3f} at step {last.step}"
        )
        parts.append(picture(POST_TRAINING, alternative))
    return "\n\n".join(parts)


def _post_training_sentences(record: PostTraining) -> Iterator[str]:
    settings = record.settings
    how = _TRAINED.get(str(settings.get("train_modules")), "")
    amounts = [
        counted(number, what)
        for number, what in ((record.samples, "sample"), (record.steps, "step"))
        if number is not None
    ]
    if record.tokens is not None:
        amounts.append(f"{amount(record.tokens)} tokens")
    if record.seconds is not None:
        amounts.append(f"{record.seconds:,.0f} s")
    on = f" on {escaped(record.data)}" if record.data else ""
    told = f" ({', '.join(amounts)})" if amounts else ""
    yield f"After the merge the whole mixture was trained{f' {how}' * bool(how)}{on}{told}."
    named = {
        "learning_rate": "learning rate",
        "num_train_epochs": "epochs",
        "router_aux_loss_coef": "load-balancing coefficient",
    }
    values = [
        f"{word} {settings[key]:g}" for key, word in named.items() if _is_number(settings, key)
    ]
    if values:
        yield f"{', '.join(values).capitalize()}."
    if record.history:
        last = record.history[-1]
        yield f"The loss was {record.history[0].loss:.3f} at first and {last.loss:.3f} at the end."
        if last.dead_experts is not None:
            yield f"Experts hardly used at the end: {last.dead_experts}."


def _is_number(settings: dict[str, Any], key: str) -> bool:
    return isinstance(settings.get(key), int | float)


def evaluation_section(report: Report, pictures: Collection[str]) -> str:
    """Give perplexities on held-out text, and tell what the router does with it."""
    found = report.evaluation
    if found is None:
        return ""
    whole = found.groups[found.whole]
    parts = [
        f"Perplexity on {counted(whole.samples, 'held-out sample')} of {escaped(found.data)} "
        f"({counted(whole.targets, 'predicted token')}); lower is better.",
        markdown_comparison(found),
        evaluation_verdict(found, escaped, with_code),
        _instead(found),
        _experts_alone(found),
    ]
    if ROUTING in pictures:
        parts.append(picture(ROUTING, _routing_in_words(found)))
    parts.append(" ".join(_routing_sentences(found)))
    return "\n\n".join(part for part in parts if part)


def _instead(found: Evaluation) -> str:
    """Show the recipe of the dense model that is the better thing, if it is one that has one."""
    if found.worth is None or not found.worth.recipe:
        return ""
    recipe = fenced(without_local_paths(found.worth.recipe), "yaml")
    return f"mergekit's recipe of that:\n\n{recipe}"


def _experts_alone(found: Evaluation) -> str:
    """Tabulate the experts, each as a dense model; nothing if they were not measured."""
    names = found.columns
    columns = [found.groups[name].experts_alone for name in names]
    if any(column is None for column in columns) or len(columns[-1] or []) < 2:
        return ""
    rows = list(zip(*filter(None, columns), strict=True))
    cells = best_in_bold(rows)
    how = ", estimated to first order" if found.estimated else ""
    lines = [[str(expert), *values] for expert, values in enumerate(cells)]
    text = table([">expert", *(f">{escaped(name)}" for name in names)], lines)
    return f"Every token through one expert alone{how}:\n\n{text}"


def _routing_in_words(found: Evaluation) -> str:
    shares = []
    for name, group in list(found.kinds.items())[:6]:
        most = max(group.routing)
        shares.append(f"{name} mostly to expert {group.routing.index(most)} ({most:.0%})")
    return f"Heat map of the routing, expert by kind of text and by layer: {', '.join(shares)}"


def _routing_sentences(found: Evaluation) -> Iterator[str]:
    if {"token", "load"} <= found.entropy.keys():
        yield (
            f"Entropy of the routing, 1 is even: {found.entropy['token']:.2f} per token, "
            f"{found.entropy['load']:.2f} over all tokens."
        )
    places = len(found.by_layer) * len(found.by_layer[0])
    yield (
        f"Of {places} experts in {len(found.by_layer)} layers, {found.dead_places} get less than a "
        "tenth of an even share."
    )
    if idle := hardly_used_sentence(found):
        yield idle
    if found.agreement is not None and {"first", "chance"} <= found.agreement.keys():
        yield (
            f"The expert that predicts a sample best is the first choice for "
            f"{found.agreement['first']:.0%} of its tokens (chance: {found.agreement['chance']:.0%})."
        )
