"""Other models on the same held-out samples, to compare a mixture with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from upit_merge.commands.measured import Measured, keep, kept
from upit_merge.commands.measured_files import ModelFiles
from upit_merge.commands.preview import checkpoint_losses
from upit_merge.config.recipe import METHOD, parse_recipe
from upit_merge.errors import UpitError
from upit_merge.io.checkpoint import is_adapter
from upit_merge.io.hub import OpenOptions, resolve, split_reference
from upit_merge.io.language_part import language_settings
from upit_merge.io.untrusted import read_json
from upit_merge.merge.inputs import Inputs, opened
from upit_merge.models.formats import found_format
from upit_merge.models.mixture import inspect_mixture, opened_mixture
from upit_merge.models.published import PublishedMixture
from upit_merge.models.tokenizer import has_tokenizer, load_tokenizer
from upit_merge.router.evaluation import run_mixture
from upit_merge.router.pretrain import computed_mixture
from upit_merge.router.stage import RouterStage

LOG = logging.getLogger(__name__)


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


@contextlib.contextmanager
def opened_rival(
    rival: Rival, vocab_size: int, tokenizer_folder: Path, options: OpenOptions
) -> Iterator[PublishedMixture | Inputs]:
    """Open a model to compare with, a mixture or, as the inputs of a recipe, a dense model.

    Args:
        vocab_size, tokenizer_folder: Of the mixture it is compared with.

    Raises:
        UpitError: it cannot be read, or has another vocabulary.
    """
    base, adapter = split_reference(rival.reference)
    folder = resolve(base, options, role="model to compare with")
    if is_adapter(folder):
        raise UpitError(f"The model {rival.name} is an adapter; write BASE+{rival.reference}.")
    config = read_json(folder / "config.json", f"the model {rival.name}")
    found = language_settings(config).get("vocab_size")
    if found != vocab_size:
        raise UpitError(
            f"The model {rival.name} has a vocabulary of {found} tokens, the "
            f"mixture one of {vocab_size}: their perplexities cannot be compared; leave it out."
        )
    _check_same_tokenizer(rival, folder, tokenizer_folder)
    if found_format(config):
        if adapter:
            raise UpitError(
                f"The model {rival.name} is an adapter of a mixture, which cannot be compared; add "
                "it to the mixture's weights first."
            )
        with opened_mixture(folder, f"the model {rival.name}") as moe:
            inspect_mixture(moe)
            yield moe
        return
    # A dense model is a mixture with one expert.
    document = {
        "merge_method": METHOD,
        "base_model": str(folder),
        "models": [{"model": f"{folder}+{adapter}" if adapter else str(folder)}],
        "parameters": {"expansion": "copy"},
    }
    with opened(parse_recipe(document, f"the model {rival.name}"), options) as inputs:
        yield inputs


def check_rivals(
    rivals: Sequence[Rival], vocab_size: int, tokenizer_folder: Path, options: OpenOptions
) -> None:
    """Open every model to compare with once, before the long work.

    Raises:
        UpitError: as `opened_rival`; or two are called the same.
    """
    check_rival_names(rivals)
    for rival in rivals:
        with opened_rival(rival, vocab_size, tokenizer_folder, options):
            pass


def rival_losses(
    rival: Rival, held_out: RouterStage, held_out_folder: Path, options: OpenOptions
) -> Tensor:
    """Return the summed negative log-likelihood of each sample's targets, float64, (num_samples,).

    What an earlier call has measured of the same files on the same samples is not measured again.

    Args:
        held_out: The samples, as the mixture's own tokenizer has cut them; computed where it is.
        held_out_folder: The mixture's, with that tokenizer.

    Raises:
        UpitError: as `opened_rival`, or a loss is NaN or infinite.
    """
    model, processes = held_out.model, held_out.processes
    device, settings = model.device, held_out.settings
    named = zip(split_reference(rival.reference), ("model to compare with", "adapter"), strict=True)
    folders = [resolve(part, options, role=role) for part, role in named if part]
    files = ModelFiles.before_opening(*folders)
    with opened_rival(rival, model.vocab_size, held_out_folder, options) as other:
        members = [other] if isinstance(other, PublishedMixture) else other.models
        own = [path for member in members for path in member.files()]
        identity = {
            "files": files.identity(own),
            "samples": held_out.seeds.digest(),
            "compute": [model.arithmetic.identity(), device.type],
        }
        found = kept(identity) if processes.is_first and identity["files"] else None
        before = processes.gather(found)[0]
        if before is not None and _is_sums(before, len(held_out.everything)):
            LOG.info("The model %s was measured on these samples before.", rival.name)
            return before.tensors["sums"]
        if isinstance(other, PublishedMixture):
            mixture = computed_mixture(other, device, settings)
            sums = run_mixture(replace(held_out, model=mixture))[0]
        else:
            label, quiet = held_out.label, held_out.quiet
            losses = checkpoint_losses(
                other, held_out.seeds, settings, device, quiet=quiet, label=label
            )
            sums = losses.sums.sum(2)[:, 0]
        # Looked at once more: the files may have been written while they were read.
        if processes.is_first and identity["files"] and files.identity(own):
            keep(identity, Measured({"sums": sums}))
        return sums


def _is_sums(found: Measured, samples: int) -> bool:
    """Return whether these are numbers of so many samples."""
    sums = found.tensors.get("sums")
    return sums is not None and (sums.dtype, tuple(sums.shape)) == (torch.float64, (samples,))


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


def check_rival_names(rivals: Sequence[Rival]) -> None:
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
