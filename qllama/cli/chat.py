"""`qllama chat`: a conversation in a terminal, or through a pipe, one message a line."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllama.cli.answers import chat_prompt, check_finite, write_stream
from qllama.cli.messages import one_line, styled
from qllama.cli.options import (
    add_engine_options,
    add_model,
    add_sampling_options,
    load_llm,
    sampling_params,
)

if TYPE_CHECKING:
    from qllama.engine.sampling_params import SamplingParams
    from qllama.llm import LLM
    from qllama.outputs import RequestOutput

SUMMARY = "talk with a model, in a terminal or through a pipe"

HELP = """\
/reset         forget the conversation, keep the system message
/system TEXT   set the system message; without TEXT, remove it
/save FILE     write the conversation as JSON
/stats         speeds of the last answer, and how full the window is
/help          this list
/exit          leave; so does Ctrl-D. Ctrl-C stops an answer"""

Message = dict[str, str]


def configure_parser(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message to begin with")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.epilog = "In the conversation, /help lists the commands."


def run(args: argparse.Namespace) -> None:
    llm = load_llm(args)
    params = sampling_params(args, llm)
    chat_prompt(llm, [{"role": "user", "content": "Hello"}])  # or say at once why it cannot be
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    session = Session(llm, params, args.system)
    if not interactive:
        for line in sys.stdin:
            if not session.take(line):
                return
        return
    what = (
        "the demo model, which can write but was never taught to talk"
        if args.model is None
        else args.model
    )
    say(f"This is {what}. /help lists the commands.")
    for line in typed_lines():
        with interruptible() as stopped:
            if not session.take(line, stopped):
                return


class Session:
    """A conversation with a model, and what has to be remembered of it."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None = None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.messages: list[Message] = []  # without the system message
        self.last: RequestOutput | None = None

    def take(self, line: str, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Answer a message or obey a command; False: the user wants to leave."""
        text = line.strip()
        if text in ("/exit", "/quit"):
            return False
        try:
            if text.startswith("/"):
                self._obey(*text[1:].partition(" ")[::2])
            elif text:
                self._answer(text, stopped)
        except (ValueError, OSError) as error:
            say(f"error: {one_line(error)}")
        return True

    def _obey(self, command: str, argument: str) -> None:
        argument = argument.strip()
        match command:
            case "reset":
                self.messages = []
                say("The conversation is forgotten.")
            case "system":
                self.system = argument or None
                say("The system message is set." if argument else "There is no system message now.")
            case "save":
                self._save(argument)
            case "stats":
                self._stats()
            case "help":
                say(HELP)
            case _:
                say(f"There is no command /{command}; /help lists them.")

    def _answer(self, text: str, stopped: Callable[[], bool]) -> None:
        kept = fitting(
            [*self.messages, {"role": "user", "content": text}],
            lambda messages: self._length(messages) <= self._room(),
        )
        forgotten = len(self.messages) + 1 - len(kept)
        if forgotten:
            say(f"(the first {forgotten} messages no longer fit, and are forgotten)")
        pieces = self.llm.stream(chat_prompt(self.llm, self._with_system(kept)), self.params)
        answer, self.last = write_stream(pieces, stopped=stopped)
        check_finite(self.last)
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        if stopped():
            say("(stopped)")
        elif self.last.outputs[0].finish_reason == "length":
            say("(cut at the most tokens an answer may have; --max-tokens sets it)")

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *messages]

    def _length(self, messages: Sequence[Message]) -> int:
        return len(chat_prompt(self.llm, self._with_system(messages))["prompt_token_ids"])

    def _room(self) -> int:
        """Tokens that history may take: the window less an answer, but at least half of it."""
        window = self.llm.max_model_len
        return window - min(self.params.max_tokens or window, window // 2)

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("say where to: /save FILE")
        conversation = {"messages": self._with_system(self.messages)}
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump(conversation, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError:
            raise ValueError(f"{name} exists; choose another name") from None
        say(f"{len(conversation['messages'])} messages are in {name}.")

    def _stats(self) -> None:
        from qllama.cli.statistics import memory_line, speed_lines

        if self.last is None or self.last.metrics is None:
            say("There is no answer yet.")
            return
        used = self._length(self.messages)
        window = f"window       {used} of {self.llm.max_model_len} tokens"
        say("\n".join([*speed_lines(self.last.metrics), memory_line(), window]))


def fitting(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The latest of `messages` that fit, from a user's message on.

    Raises:
        ValueError: not even the last message does.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in starts:
        if fits(messages[start:]):
            return messages[start:]
    raise ValueError("the message is too long for the model's window; shorten it")


def say(text: str) -> None:
    """A remark of the program, apart from the answers."""
    print(styled(text, "2", sys.stderr), file=sys.stderr)


def typed_lines() -> Iterator[str]:
    """What the user types at the prompt, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # gives input() its line editing

    # The marks tell readline which characters take no room on the line.
    prompt = styled(">>> ", "1;32", sys.stdout)
    prompt = prompt.replace("\x1b[1;32m", "\x01\x1b[1;32m\x02").replace(
        "\x1b[0m", "\x01\x1b[0m\x02"
    )
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say("(Ctrl-D or /exit leaves)")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is only noted, as the block's value tells when called.

    An exception raised by the signal could leave the engine between two of its steps. A second
    Ctrl-C is for when nothing else helps, and ends the program.
    """
    asked = False

    def note(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
