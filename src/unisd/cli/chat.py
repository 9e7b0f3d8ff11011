"""`unisd chat`: talk with a saved model, and see what its base would have said."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisd.cli.parser import CommandParser, add_template_options, add_trust, at_least_one
from unisd.data.rendering import Messages, as_messages, naming, set_options
from unisd.data.text import MAX_TEXT
from unisd.errors import UserError, nearest
from unisd.files import ANSWERS, RESULTS, SAMPLES, left_by_run, read_lines
from unisd.models.adapters import check_base_is_kept, is_adapter
from unisd.models.inference import load_any

if TYPE_CHECKING:  # heavy
    from unisd.cli.conversation import Speaker
    from unisd.data.thoughts import Parts

logger = logging.getLogger(__name__)

HELP = {
    "/new": "start over: forget all turns (also /reset)",
    "/base": "what the base model answers to the last prompt",
    "/examples": "more prompts that the run was tested on; a number takes one",
    "/help": "these lines",
    "/quit": "end (also Ctrl-D)",
    "Ctrl-C": "stop an answer, and go on",
}
AT_START, A_PAGE = 3, 10  # examples that are shown


def chat_command(arguments: Sequence[str]) -> int:
    """Answer prompts, if wanted beside the base model."""
    options = _parser().parse(arguments)
    if options is None:
        return 0

    at_least_one(max_new_tokens=options.max_new_tokens)
    if options.temperature < 0:
        raise UserError(f"--temperature {options.temperature}: 0 or more is needed.")
    interactive = options.prompt is None and sys.stdin is not None and sys.stdin.isatty()
    from unisd.console import loading_libraries

    with loading_libraries():
        from unisd.models import load  # noqa: F401 (and torch)
    session = Session(options, interactive)
    if options.prompt is not None:
        session.ask(options.prompt)
    elif interactive:
        _talk(session)
    else:
        _answer_lines(session)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "chat",
        "Talk with a model: it reads the conversation so far with each prompt. In a terminal, /help"
        " lists the commands. Otherwise each line of standard input is a prompt or a command.",
    )
    parser.add_argument("folder", metavar="DIR", help="model or adapter folder, or a model name")
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="show another model's answers beside it; `base`: the model it was adapted from",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer only this prompt, then end")
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="the system turn; an empty text: none (default: the system turn of its training rows)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum tokens per answer (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 (default): greedy",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    add_trust(parser)
    add_template_options(parser)
    return parser


class Session:
    """The models, the conversation, and what the user can do with them."""

    def __init__(self, options: argparse.Namespace, interactive: bool) -> None:
        from unisd.cli.conversation import Conversation, Speaker
        from unisd.console import make_console

        self.options, self.interactive, self.console = options, interactive, make_console()
        self.speaker = Speaker(options.folder, *self._load(options.folder))
        self.other = None if options.compare is None else self._compared(options.compare)
        self.examples = _examples(options.folder)
        self.listed = 0  # examples that a number can take
        self.takes_numbers = False
        system = _system_of_run(options.folder, self.examples) if options.system is None else options.system
        self.start = Conversation(system or None)
        self.conversation = self.start
        self.asked: tuple[Messages, int] | None = None
        self._numbers = count()
        self._check_templates()

    def _load(self, name: str) -> tuple[Any, Any]:
        model, tokenizer = load_any(name, trust_remote_code=self.options.trust_remote_code)
        set_options(tokenizer, self.options.chat_template_kwargs)
        return model, tokenizer

    def _compared(self, name: str) -> Speaker:
        """The model to compare with; `base` shares the weights beneath an adapter."""
        from unisd.cli.conversation import Speaker

        if name == "base":
            if is_adapter(self.options.folder):
                check_base_is_kept(self.speaker.model.peft_config)
                return Speaker(name, self.speaker.model, self.speaker.tokenizer, bare=True)
            name = _base_of(self.options.folder)
        return Speaker(name, *self._load(name))

    def _check_templates(self) -> None:
        """Find out now which turns the models cannot be shown."""
        if self.options.system and not self.speaker.remembers:
            raise UserError("--system: the tokenizer has no chat template that could show it: leave it out.")
        if self.options.system:
            with naming("--system"):
                self.speaker.encode(self.start.prompt("question"))
        for speaker in filter(None, (self.speaker, self.other)):
            if not speaker.remembers and self.options.prompt is None:
                logger.warning("%s has no chat template: it reads each prompt separately.", speaker.name)

    # -- what a line does --------------------------------------------------------------------------

    def do(self, line: str) -> bool:
        """Carry out a line: a command, an example's number or a prompt; False: it ends the chat."""
        commands: dict[str, Callable[[], None]] = {
            "/new": self.new,
            "/reset": self.new,
            "/base": self.base,
            "/examples": self.show_examples,
            "/help": self.help,
        }
        if line == "/quit":
            return False
        if line.startswith("/") and line[1:].isalpha():
            if line not in commands:
                close = nearest(line, [*commands, "/quit"])
                hint = f"did you mean {close}?" if close else "/help lists them."
                raise UserError(f"unknown command {line}: {hint}")
            commands[line]()
        elif self.takes_numbers and line.isdecimal() and 1 <= int(line) <= self.listed:
            self.take(self.examples[int(line) - 1])
        else:
            if self.interactive and line.isdecimal() and 1 <= int(line) <= self.listed:
                print("(sent as text: a number takes a prompt only after /examples)")
            self.takes_numbers = False
            self.ask(line)
        return True

    def new(self) -> None:
        self.conversation, self.asked = self.start, None
        if self.interactive:
            print("a new conversation")

    def base(self) -> None:
        if self.asked is None:
            raise UserError("/base answers the last prompt again: ask something first.")
        print(f"{self._base.name}:")
        self._answer(self._base, *self.asked)

    @cached_property
    def _base(self) -> Speaker:
        if self.other is not None and self.options.compare == "base":
            return self.other
        return self._compared("base")

    def show_examples(self, most: int = A_PAGE) -> None:
        if not self.examples:
            raise UserError(f"{self.options.folder} has no {ANSWERS} with prompts that a run was tested on.")
        start = self.listed if self.listed < len(self.examples) else 0
        self.listed, self.takes_numbers = min(start + most, len(self.examples)), True
        width = shutil.get_terminal_size().columns if self.console.is_terminal else sys.maxsize
        for number in range(start, self.listed):
            line = f"{number + 1:>3}  {' '.join(str(self.examples[number][-1]['content']).split())}"
            print(line if len(line) <= width else f"{line[: width - 3]}...")

    def help(self) -> None:
        for name, does in HELP.items():
            print(f"  {name:<10} {does}")

    def take(self, example: Messages) -> None:
        """Ask an example as the run did, in a conversation of its own."""
        from unisd.cli.conversation import Conversation

        text = str(example[-1]["content"])
        if self.interactive:
            print(f"a new conversation: {text}" if self.conversation.turns else text)
        self.conversation = Conversation.of(example)
        if self.options.system is not None:
            self.conversation = replace(self.conversation, system=self.start.system)
        self.ask(text)

    def ask(self, text: str) -> None:
        """Answer a prompt, and remember both."""
        from unisd.cli.conversation import fitting, readable
        from unisd.console import show_answers

        speakers = [speaker for speaker in (self.other, self.speaker) if speaker is not None]
        kept = fitting(self.conversation, text, speakers, self.options.max_new_tokens)
        prompt, number = kept.prompt(text), next(self._numbers)
        said = [self._answer(speaker, prompt, number, len(speakers) == 1) for speaker in speakers]
        if len(speakers) > 1:
            names = (speaker.name for speaker in speakers)
            show_answers(self.console, [*zip(names, map(readable, said), strict=True)])
        self.asked = prompt, number
        if any(said[-1]):  # else the user has stopped it at once, say
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": said[-1].answer}]
            kept = replace(kept, turns=[*kept.turns, *turns])
        self.conversation = kept

    def _answer(self, speaker: Speaker, prompt: Messages, number: int, shown: bool = True) -> Parts:
        from unisd.cli.conversation import Writer
        from unisd.rollout.engine import Sampling

        sampling = Sampling(self.options.max_new_tokens, self.options.temperature or 1.0)
        key = (self.options.seed, 0, number, 0) if self.options.temperature > 0 else None
        writer = Writer(live=self.console.is_terminal) if shown else None
        return speaker.answer(prompt, sampling, key, writer, stoppable=self.interactive)


# -- where lines come from -----------------------------------------------------------------------


def _answer_lines(session: Session) -> None:
    """Take each line of standard input; only answers come out. A mistake costs its own line only.

    Raises:
        UserError: there was a mistake, or no line.
    """
    number, mistakes = 0, 0
    for number, line in enumerate(_piped(), 1):
        try:
            with naming(f"line {number}"):
                if not session.do(line):
                    break
        except UserError as error:
            print(f"unisd: error: {error}", file=sys.stderr)
            mistakes += 1
    if mistakes:
        raise UserError(f"{mistakes} of {number} lines were not answered.")
    if not number:
        raise UserError("there is no prompt: give --prompt TEXT, or lines on standard input.")


def _piped() -> Iterator[str]:
    """The lines of standard input that hold something; none where that is closed."""
    try:
        for line in iter(sys.stdin.readline, "") if sys.stdin is not None else ():
            if line.strip():
                line.encode()  # fails on bytes that the terminal's encoding has only let through
                yield line.strip()
    except (OSError, ValueError) as error:  # closed, or not in its encoding
        raise UserError(f"standard input cannot be read ({error}): give --prompt TEXT.") from None


def _talk(session: Session) -> None:
    """Read and answer on a terminal; what is typed is kept in memory only."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401 (edits the lines of `input`)

    print(f"{session.options.folder}: /help lists the commands, Ctrl-D ends.")
    if session.start.system is not None:
        print(f"system turn: {session.start.system}")
    if session.examples:
        print("Prompts that the run was tested on; a number takes one:")
        session.show_examples(AT_START)
    while True:
        try:
            if (line := input("> ").strip()) and not session.do(line):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line, or before the answer begins
            print()
        except (UserError, UnicodeDecodeError) as error:  # of this line alone
            print(f"error: {error}")


# -- what a run's folder says --------------------------------------------------------------------


def _examples(folder: str) -> list[Messages]:
    """The prompts of the run's evaluations whose texts are kept, as they were asked."""
    path = Path(folder).expanduser() / ANSWERS
    if not path.is_file():
        return []
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        return [prompt for part in parts.values() for prompt in _prompts(part["examples"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): there are no examples.", path, error)
        return []


def _prompts(records: Sequence[dict[str, Any]]) -> list[Messages]:
    """The prompts of records that are not cut."""
    whole = (record for record in records if len(record["prompt"]) < MAX_TEXT)
    return [as_messages(record.get("messages") or record["prompt"]) for record in whole]


def _system_of_run(folder: str, examples: Sequence[Messages]) -> str | None:
    """The system turn that all rows of a run share: of those it trained on, else was tested on."""
    trained = [one for one in read_lines(Path(folder).expanduser() / SAMPLES) if "prompt" in one]
    prompts = _prompts(trained) or examples
    found = {str(p[0]["content"]) if p[0]["role"] == "system" else None for p in prompts}
    if len(found) > 1:
        logger.warning("the run's rows do not share one system turn: none is used; --system TEXT sets one.")
    return found.pop() if len(found) == 1 else None


def _base_of(folder: str) -> str:
    """The model that a run of ours started from."""
    name = left_by_run(folder, RESULTS).get("model")
    if name is None:
        raise UserError(f"{folder} has no {RESULTS} that names its base: give it with --compare MODEL.")
    return str(name)
