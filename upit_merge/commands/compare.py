"""Other models on the same held-out samples, to compare a mixture with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from upit_merge.commands.preview import checkpoint_losses
from upit_merge.config.recipe import METHOD, parse_recipe
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import is_adapter
from upit_merge.io.hub import OpenOptions, resolve, split_reference
from upit_merge.io.language_part import language_settings
from upit_merge.io.untrusted import read_json
from upit_merge.merge.inputs import opened
from upit_merge.models.formats import found_format
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.tokenizer import has_tokenizer, load_tokenizer
from upit_merge.router.evaluation import run_mixture
from upit_merge.router.pretrain import computed_mixture
from upit_merge.router.stage import RouterStage


@dataclass(frozen=True)
class Rival:
    """A model to compare with.

    Args:
        name: What to call it.
        reference: A dense model or a mixture: a folder, a Hub id, or `BASE+ADAPTER`.
    """

    name: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> Rival:
        """Read `NAME=MODEL`, or `MODEL`, which is called by its last part."""
        name, named, reference = text.partition("=")
        if named and not Path(split_reference(text)[0]).is_dir():  # a path may have one, too
            return cls(name.strip(), reference.strip())
        return cls(Path(split_reference(text)[1] or text).name, text)


def rival_losses(
    rival: Rival, held_out: RouterStage, held_out_folder: Path, options: OpenOptions
) -> Tensor:
    """Return the summed negative log-likelihood of each sample's targets, float64, (num_samples,).

    Args:
        held_out: The samples, as the mixture's own tokenizer has cut them; computed where it is.
        held_out_folder: The mixture's, with that tokenizer.

    Raises:
        UpitError: it cannot be read, or has another vocabulary.
    """
    device = held_out.model.device
    base, adapter = split_reference(rival.reference)
    folder = resolve(base, options, role="model to compare with")
    if is_adapter(folder):
        raise UpitError(f"The model {rival.name} is an adapter; write BASE+{rival.reference}.")
    config = read_json(folder / "config.json", f"the model {rival.name}")
    vocab_size = language_settings(config).get("vocab_size")
    if vocab_size != held_out.model.vocab_size:
        raise UpitError(
            f"The model {rival.name} has a vocabulary of {vocab_size} tokens, the "
            f"mixture one of {held_out.model.vocab_size}: their perplexities cannot be compared; "
            "leave it out."
        )
    _check_same_tokenizer(rival, folder, held_out_folder)
    if found_format(config):
        if adapter:
            raise UpitError(
                f"The model {rival.name} is an adapter of a mixture, which cannot be compared; add "
                "it to the mixture's weights first."
            )
        with opened_mixture(folder, f"the model {rival.name}") as moe:
            model = computed_mixture(moe, device, held_out.settings)
            return run_mixture(replace(held_out, model=model))[0]
    # A dense model is a mixture with one expert.
    document = {
        "merge_method": METHOD,
        "base_model": str(folder),
        "models": [{"model": f"{folder}+{adapter}" if adapter else str(folder)}],
        "parameters": {"expansion": "copy"},
    }
    recipe = parse_recipe(document, f"the model {rival.name}")
    with opened(recipe, options) as inputs:
        losses = checkpoint_losses(
            inputs, held_out.seeds, held_out.settings, device, quiet=held_out.quiet
        )
    return losses.sums.sum(2)[:, 0]


def _check_same_tokenizer(rival: Rival, folder: Path, held_out_folder: Path) -> None:
    """Refuse another tokenizer of the same size: its numbers mean other pieces of text."""
    if not (has_tokenizer(folder) and has_tokenizer(held_out_folder)):
        return
    theirs, ours = (load_tokenizer(path).get_vocab() for path in (folder, held_out_folder))
    if any(theirs.get(token, number) != number for token, number in ours.items()):
        raise UpitError(
            f"The model {rival.name} has another tokenizer than the mixture: their perplexities "
            "cannot be compared; leave it out."
        )


def check_names(rivals: Sequence[Rival]) -> None:
    """Refuse names that do not tell the models apart.

    Raises:
        UpitError: naming one that is there twice.
    """
    names = [rival.name for rival in rivals]
    for name in names:
        if names.count(name) > 1:
            raise UpitError(
                f"Two models to compare with are called {name}; give names: --against NAME=MODEL."
            )
