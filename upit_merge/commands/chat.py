"""`upit-merge chat`: a conversation with a mixture, its experts, and other models beside it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upit_merge.commands.compare import Rival
from upit_merge.commands.dialogue.conversation import Conversation, check_system
from upit_merge.commands.dialogue.voices import Voice, VoiceOptions, check_expert, load_voices
from upit_merge.engine.choices import Choices
from upit_merge.engine.generation import Answer
from upit_merge.errors import UpitError, argument, first_line, one_line, shown
from upit_merge.report.next_steps import SEED, held_out_beside, next_lines, seed_data_of
from upit_merge.report.spoken import Screen
from upit_merge.runtime.interrupt import ends_at_once

LOG = logging.getLogger(__name__)

# Where neither the command line nor the model's generation_config.json says.
_MAX_NEW_TOKENS = 512
HELP = """\
/help               these lines
/experts            the last answer, coloured by its experts, and their shares
/experts layers     the shares layer by layer
/experts LAYER      the last answer, coloured by its experts in one layer
/experts on|off     colour every answer as it comes, or no longer
/expert N|off       let all tokens take expert N, or again those that they choose
/reset              begin a new conversation
/save FILE          write the conversation to a new file, as a line of training data
/quit               end, as Ctrl-D does; Ctrl-C stops an answer
A message that begins with / is written with a space before it."""


@dataclass(frozen=True)
class ChatOptions(VoiceOptions):
    """How a conversation is held.

    Args:
        system: A system message.
        max_new_tokens: Longest answer.
        temperature, top_p: Of sampling; None for what the model's settings say.
        greedy: Take the likeliest token always.
        seed: Of the sampling; None for another one each time.
        show_experts: Show which experts each token took.
        expert: Let all tokens take this expert.
        against: Models that are asked the same.
    """

    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int | None = None
    show_experts: bool = False
    expert: int | None = None
    against: Sequence[Rival] = field(default_factory=tuple)

    def generation(self) -> dict[str, Any]:
        """Return what `generate` is told, beside the length of the answer.

        Raises:
            UpitError: sampling and no sampling are both asked for.
        """
        sampled = {"temperature": self.temperature, "top_p": self.top_p}
        given = {key: value for key, value in sampled.items() if value is not None}
        if any(map(math.isnan, given.values())):
            raise UpitError("--temperature and --top-p take numbers, and nan is none.")
        if self.greedy or self.temperature == 0:
            if any(given.values()):
                raise UpitError(
                    "--greedy takes the likeliest token always, --temperature and --top-p draw "
                    "from several; leave out one or the other."
                )
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, **given} if given else {}


def chat(
    reference: str,
    options: ChatOptions,
    screen: Screen,
    *,
    prompts: Sequence[str] = (),
    lines: Iterable[str] | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk to a model: on the terminal, or until prompts or lines are answered.

    Args:
        reference: A mixture or a dense model: a folder, a Hub id, or `BASE+ADAPTER`.
        prompts: What is said.
        lines: Without prompts: messages and commands, one each; None to ask for them.
        read: Asks for a line.

    Raises:
        UpitError: a model cannot be loaded, or an option has no meaning for it; without a terminal,
            something cannot be answered.
    """
    options.generation()

    def check(name: str, tokenizer: Any, num_experts: int | None) -> None:
        check_system(name, tokenizer, options.system)
        if not checked and (options.show_experts or options.expert is not None):
            check_expert(name, num_experts, options.expert)
        checked.append(name)

    checked: list[str] = []
    with ends_at_once(lambda: "Interrupted."):
        voices = load_voices(reference, options.against, options, check)
    session = Session(voices, options, screen)
    if not prompts and lines is None:
        session.talk(read)
        if not options.quiet and session.has_spoken:
            for line in next_lines(*_next_steps(reference, voices[0])):
                screen.line(line)
        return
    with ends_at_once(lambda: "Interrupted."):  # nobody is there to go on after an answer
        for prompt in prompts:
            session.say(prompt)
        for line in lines or () if not prompts else ():
            if session.obey(line):
                return
    if not session.has_spoken:
        raise UpitError(
            "Nothing was said: standard input, which is no terminal, has no line; give --prompt."
        )


def _next_steps(reference: str, voice: Voice) -> Iterator[tuple[str, str]]:
    model = argument(reference)
    if voice.num_experts is None:
        yield "see what a mixture with it would be", "upit-merge plan recipe.yml out/"
        return
    seeds = seed_data_of(Path(reference))
    yield "measure what you saw", f"upit-merge evaluate {model} --data {held_out_beside(seeds)}"
    yield "fit the gates anew", f"upit-merge router {model} --data {argument(seeds or SEED)}"


class Session:
    """A conversation with one or several models.

    Args:
        voices: The models; the first is the one that commands are about.
        options: How it is held.
        screen: Where it is shown.

    Raises:
        UpitError: an option has no meaning for one of the models.
    """

    def __init__(self, voices: Sequence[Voice], options: ChatOptions, screen: Screen) -> None:
        import torch

        first = voices[0]
        if options.expert is not None or options.show_experts:
            first = first.with_expert(options.expert)
        self.screen = screen
        self.has_spoken = False
        self._options = options
        self._shows_experts = options.show_experts
        self._talks = [Conversation(v, options.system) for v in (first, *voices[1:])]
        self._is_interactive = False
        self._last: Answer | None = None
        for talk in self._talks:
            if not talk.has_template:
                LOG.warning(
                    "%s has no chat template, so it continues your text as it is.", talk.voice.name
                )
        if options.show_experts and options.expert is not None:
            LOG.warning(
                "All tokens take expert %d, so that there are no choices to show; leave out "
                "--show-experts or --expert.",
                options.expert,
            )
        if options.seed is not None:
            torch.manual_seed(options.seed)

    # ---- what is said --------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Say something, and show every model's answer.

        Raises:
            UpitError: it cannot be answered; then the conversation is as it was.
        """
        before = [list(talk.messages) for talk in self._talks]
        try:
            with self.screen.side_by_side([_name(talk.voice) for talk in self._talks]):
                for talk in self._talks:
                    self._say(talk, text)
                is_split = self.screen.is_split
        except UpitError:
            for talk, messages in zip(self._talks, before, strict=True):
                talk.messages = messages
            raise
        if is_split:  # below both
            self._show_shares()
        self.has_spoken = True

    def _say(self, talk: Conversation, text: str) -> None:
        if len(self._talks) > 1:
            self.screen.heading(_name(talk.voice))
        answer = self._answer(talk, text)
        talk.add(answer.text)
        if answer.is_interrupted:
            self.screen.interrupted()
            self.screen.line("(stopped)", "dim")
        elif not answer.is_complete and self._is_interactive:
            self.screen.line(f"(cut off after {len(answer.ids)} tokens)", "dim")
        if talk is self._talks[0]:
            self._last = answer
            if not self.screen.is_split:
                self._show_shares()

    def _show_shares(self) -> None:
        choices = self._last.choices if self._last else None
        if self._shows_experts and choices is not None:
            self.screen.shares(choices, self._talks[0].voice.num_experts or 0)

    def _answer(self, talk: Conversation, text: str) -> Answer:
        voice, settings = talk.voice, self._options.generation()
        own = voice.speaker.model.generation_config.max_new_tokens
        longest = self._options.max_new_tokens or own or _MAX_NEW_TOKENS
        ids = talk.ids(text, longest)
        if voice.context is not None:
            longest = min(longest, voice.context - len(ids))
        is_first = talk is self._talks[0]
        is_shown = is_first and self._shows_experts and voice.expert is None

        def show(piece: str, choices: Choices | None) -> None:
            owner, experts = None, voice.num_experts or 0
            if is_shown and choices is not None:
                owner = int(choices.owners(experts)[0])
            self.screen.piece(piece, owner, experts)

        try:
            answer = voice.speaker.answer(
                ids,
                show,
                recorded=is_first,
                expert=voice.expert,
                max_new_tokens=longest,
                **settings,
            )
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise UpitError(
                f"{voice.name} cannot answer ({one_line(first_line(error))}); try another device "
                "or dtype, and check its generation_config.json."
            ) from error
        self.screen.finish()
        return answer

    # ---- on the terminal -----------------------------------------------------------------------

    def talk(self, read: Callable[[str], str]) -> None:
        """Ask for messages and commands until there are no more."""
        if not self._options.quiet:
            self.screen.line(self._greeting(), "dim")
        self._is_interactive = True
        for line in _lines(read, self.screen):
            try:
                if self.obey(line):
                    return
            except UpitError as error:
                self.screen.line(f"Error: {error.message}", "red")
            except KeyboardInterrupt:  # between two answers, or while experts are shown
                self.screen.interrupted()

    def obey(self, line: str) -> bool:
        """Say a line, or do what it says after a /; return whether the session ends.

        Raises:
            UpitError: that cannot be done.
        """
        if line.startswith("/"):
            return self.command(line[1:].strip())
        if line.strip():
            self.say(line.strip())
        return False

    def _greeting(self) -> str:
        names = " and ".join(_name(talk.voice) for talk in self._talks)
        first = self._talks[0].voice
        experts = f", {first.num_experts} experts" if first.num_experts is not None else ""
        model = first.speaker.model
        dtype = str(model.dtype).removeprefix("torch.")
        return f"{names} ({dtype} on {model.device.type}{experts}). /help for help, /quit to end."

    def command(self, line: str) -> bool:
        """Do what a line says that began with /; return whether the session ends.

        Raises:
            UpitError: there is no such command, or it has no meaning now.
        """
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "help": lambda _rest: self.screen.line(HELP),
            "experts": self._experts,
            "expert": self._expert,
            "reset": self._reset,
            "save": self._save,
        }
        if name in ("quit", "exit", "q"):
            return True
        if name not in commands:
            raise UpitError(
                f"There is no command /{one_line(name)}; there are /{', /'.join(commands)} and "
                "/quit (a message that begins with / is written with a space before it)."
            )
        commands[name](rest.strip())
        return False

    def _reset(self, _rest: str) -> None:
        for talk in self._talks:
            talk.reset()
        self._last = None
        self.screen.line("A new conversation.", "dim")

    def _experts(self, what: str) -> None:
        voice = self._talks[0].voice.with_expert(self._talks[0].voice.expert)
        assert voice.num_experts is not None
        if what in ("on", "off"):
            self._shows_experts = what == "on"
            how = "with" if self._shows_experts else "without"
            self.screen.line(f"From now on answers are shown {how} their experts.", "dim")
            return
        if voice.expert is not None:
            raise UpitError(f"All tokens take expert {voice.expert}; /expert off ends that.")
        if self._last is None or self._last.choices is None:
            raise UpitError("There is no answer to show the experts of; say something first.")
        choices = self._last.choices
        if what in ("", "layers"):
            if not what:
                self.screen.experts(self._last, voice.num_experts)
            self.screen.shares(choices, voice.num_experts, by_layer=what == "layers")
            return
        if not what.isdecimal() or int(what) not in choices.layers:
            layers = f"{choices.layers[0]} to {choices.layers[-1]}"
            raise UpitError(
                f"/experts takes on, off, layers or a layer's number ({layers}), not {shown(what)}."
            )
        self.screen.experts(self._last, voice.num_experts, int(what))
        self.screen.shares(choices, voice.num_experts, layer=int(what))

    def _expert(self, what: str) -> None:
        if what != "off" and not what.isdecimal():
            raise UpitError(f"/expert takes an expert's number or off, not {shown(what)}.")
        talk = self._talks[0]
        talk.voice = talk.voice.with_expert(None if what == "off" else int(what))
        self.screen.line(f"Now talking to {_name(talk.voice)}.", "dim")

    def _save(self, name: str) -> None:
        if not name:
            raise UpitError("/save takes the name of a new file; write /save FILE.")
        if not any(talk.messages for talk in self._talks):
            raise UpitError("There is no conversation to save yet; say something first.")
        path = Path(os.path.expanduser(name))
        lines = [json.dumps(talk.document(), ensure_ascii=False) for talk in self._talks]
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except FileExistsError:
            raise UpitError(f"{path} is there already; give another name.") from None
        except (OSError, ValueError) as error:  # a name with a NUL in it is the latter
            reason = error.strerror if isinstance(error, OSError) else error
            raise UpitError(f"{path} cannot be written ({reason}).") from None
        self.screen.line(f"The conversation is in {path}.", "dim")


def _name(voice: Voice) -> str:
    """Return what a model, or the one expert of it that answers, is called."""
    if voice.expert is None or voice.name == f"expert:{voice.expert}":
        return voice.name
    return f"{voice.name}, expert {voice.expert}"


def _lines(read: Callable[[str], str], screen: Screen) -> Iterator[str]:
    """Yield the lines that are typed; Ctrl-C forgets one, Ctrl-D ends."""
    while True:
        try:
            try:
                line = read("> ")
            except EOFError:
                screen.line("")
                return
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt.__context__, EOFError):  # both keys in one burst
                return
            screen.interrupted()  # what the terminal had still to show is lost, ends of colours too
            screen.line("\n(/quit or Ctrl-D ends)", "dim")
            continue
        yield line
