"""The `qllama` command. Each verb is a module: a parser, and a call of a plain function.

Results go to stdout, all else to stderr. Exit codes: 0, or 1 where the machine is at fault, 2 where
the user is (with one line that says how), 130 after Ctrl-C, 141 after a closed pipe.

Nothing that takes time is imported before a verb runs: `qllama --help` starts no JAX.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from qllama.cli import (
    chat,
    compare,
    convert,
    doctor,
    generate,
    inspect,
    perplexity,
    quantize,
    verify,
)
from qllama.cli.messages import complain, show_messages
from qllama.cli.processes import joined, leave, lost_process, together

VERBS = {
    "generate": generate,
    "chat": chat,
    "quantize": quantize,
    "convert": convert,
    "verify": verify,
    "inspect": inspect,
    "perplexity": perplexity,
    "compare": compare,
    "doctor": doctor,
}

# How JAX's errors begin that tell of the machine or its settings, not of a mistake in qllama.
_MACHINE_ERRORS = ("RESOURCE_EXHAUSTED", "JAX finds no device")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, `sys.argv` by default, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    arguments = build_parser().parse_args(argv)
    with show_messages(verbose=arguments.verbose):
        try:
            code = _run(arguments)
        except Exception:
            if joined():
                traceback.print_exc()
                leave(1)
            raise
    if code and joined():
        leave(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    """Run the verb; what it raises becomes a line and an exit code."""
    try:
        with together(arguments):
            arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard(sys.stdout)
        return 141
    except (ValueError, NotImplementedError) as error:
        complain(error, verbose=arguments.verbose)
        return 2
    except OSError as error:
        complain(error, verbose=arguments.verbose)
        return 1
    except RuntimeError as error:
        if joined():
            complain(lost_process(error), verbose=arguments.verbose)
        elif any(words in str(error) for words in _MACHINE_ERRORS):
            complain(error, verbose=arguments.verbose)
        else:
            raise
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="qllama",
        description="Run, make and check quantized Llama 3 models.",
        epilog="MODEL is a checkpoint folder or a Hub id; without it, the embedded demo model is "
        "used. 'qllama VERB --help' explains a verb.",
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name, help=module.SUMMARY, description=f"{module.SUMMARY.capitalize()}."
        )
        verb.add_argument(
            "--verbose", action="store_true", help="show logs, choices, and where an error arose"
        )
        verb.set_defaults(run=module.run)
        module.configure_parser(verb)
    return parser


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, instead of the usage of everything."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"qllama {version('qllama')}")
        except PackageNotFoundError:
            print("qllama, run from its sources without being installed")
        parser.exit(0)


def _discard(stream: TextIO) -> None:
    """Let Python's own flush at exit go nowhere: the reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
