"""What commands that run data through a mixture begin with: the mixture, opened, and the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upit_merge.commands.options import MixtureOptions
from upit_merge.config.router import RouterSettings
from upit_merge.io.disk import explained_failures
from upit_merge.io.sources import TensorSource
from upit_merge.models.mixture import opened_mixture
from upit_merge.models.published import PublishedMixture
from upit_merge.output.edit import Edit
from upit_merge.output.identity import file_states
from upit_merge.router.pretrain import computed_mixture, seed_set_for
from upit_merge.router.progress import Progress
from upit_merge.router.stage import RouterStage
from upit_merge.runtime.device import resolve_devices
from upit_merge.runtime.processes import ALONE, Processes


@dataclass(frozen=True)
class RouterSession:
    """A mixture that a command runs data through.

    Attributes:
        edit: What the command changes of it.
        moe: The open folder.
        options: The command's.
    """

    edit: Edit
    moe: PublishedMixture
    options: MixtureOptions

    def stage(
        self,
        settings: RouterSettings,
        scratch: Path,
        *,
        source: TensorSource | None = None,
        seed: int | None = None,
        column: str | None = None,
        quick: bool = False,
    ) -> RouterStage:
        """Read data, and return what runs it through the mixture.

        Args:
            settings: Which data, and what to do with it.
            scratch: A folder of this process for hidden states.
            source: Instead of the folder: what it is to become.
            seed: Instead of the options'.
            column: Becomes the samples' label, see `load_seed_set`.
            quick: On the CPU, `compute: auto` means products in bfloat16, see `Arithmetic`.

        Raises:
            UpitError: the folder is no mixture with a tokenizer, or the data does not fit.
        """
        options, seed = self.options, self.options.seed if seed is None else seed
        model = computed_mixture(
            source or self.moe, resolve_devices(options.device)[0], settings, quick=quick
        )
        seeds = seed_set_for(
            model,
            self.edit.out,
            settings,
            seed,
            trust_remote_code=options.open.trust_remote_code,
            column=column,
        )
        return RouterStage(
            model, seeds, settings, seed, scratch, self.edit.processes, quiet=options.quiet
        )

    def resumed(self, stage: RouterStage, identity: Mapping[str, Any]) -> RouterStage:
        """Return the stage with what an earlier call of this identity, cut off, has done of it."""
        identity = {**identity, "files": file_states(self.moe.files(), "")}
        return replace(stage, progress=Progress(self.edit.progress, identity, self.edit.processes))


@contextlib.contextmanager
def router_session(
    out: Path,
    command: str,
    options: MixtureOptions,
    processes: Processes = ALONE,
    *,
    changes: bool = True,
) -> Iterator[RouterSession]:
    """Open a mixture for a command that runs data through it.

    Args:
        out: Its folder.
        command: The command's name.
        processes: Those that share the samples; all of them must call this.
        changes: Whether the mixture will be changed, so that nobody else may meanwhile.

    Raises:
        UpitError: `out` is no folder with a model, is in use, or half changed by another command.
        ResumableError: instead of what the operating system refuses inside.
    """
    with explained_failures(out), contextlib.ExitStack() as stack:
        edit = Edit(out, command, processes)
        with processes.together():
            if changes and processes.is_first:
                stack.enter_context(edit.begun())
        with processes.together():
            moe = stack.enter_context(opened_mixture(out, str(out)))
        yield RouterSession(edit, moe, options)
