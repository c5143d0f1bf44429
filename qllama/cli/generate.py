"""`qllama generate`: complete one prompt."""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from qllama.cli.answers import chat_prompt, check_finite, write_stream
from qllama.cli.options import (
    add_engine_options,
    add_model,
    add_process_options,
    add_sampling_options,
    load_llm,
    sampling_params,
)
from qllama.cli.processes import several

if TYPE_CHECKING:
    from qllama.llm import LLM
    from qllama.outputs import RequestOutput

SUMMARY = "complete a prompt; the text is written as it comes"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "-p",
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the text to go on from; '-' reads it from stdin, less one line break at its end",
    )
    parser.add_argument(
        "--chat",
        "--apply-chat-template",
        action="store_true",
        help="send the prompt as a user's message through the chat template (default: as it is)",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="with --chat: the system message before the prompt"
    )
    parser.add_argument("--echo", action="store_true", help="write the prompt before the text")
    parser.add_argument(
        "--json", action="store_true", help="write one JSON object with all of it, at the end"
    )
    parser.add_argument(
        "--stats", action="store_true", help="report speeds, memory and backends on stderr"
    )
    add_sampling_options(parser)
    parser.add_argument(
        "-n",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="completions of the prompt; several are numbered, and written when all are complete",
    )
    add_engine_options(parser)
    add_process_options(parser)


def run(args: argparse.Namespace) -> None:
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a conversation: it needs --chat")
    if args.echo and (args.json or args.chat):
        raise ValueError("--echo is for plain prompts written as text: leave --json and --chat out")
    if args.prompt == "-" and several(args):
        raise ValueError(
            "-p - reads stdin, which not every process of a run has; give the prompt itself"
        )
    text = _prompt_text(args.prompt)
    started = time.monotonic()
    llm = load_llm(args)
    loaded = time.monotonic() - started
    params = sampling_params(args, llm)
    prompt: Any = text
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt = chat_prompt(llm, [*system, {"role": "user", "content": text}])
    if args.json or params.n > 1:
        (output,) = llm.generate(prompt, params)
        _write_json(output) if args.json else _write_numbered(output, text if args.echo else "")
    else:
        _, output = write_stream(llm.stream(prompt, params), echo=text if args.echo else "")
    check_finite(output)
    if args.stats or args.verbose:
        _report(llm, output, loaded, params.n)


def _prompt_text(argument: str) -> str:
    """The text of `-p`: the argument, or stdin for "-"."""
    text = argument
    if argument == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the prompt is not valid UTF-8 text")
    return text


def _write_json(output: "RequestOutput") -> None:
    print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))


def _write_numbered(output: "RequestOutput", echo: str) -> None:
    for completion in output.outputs:
        print(f"[{completion.index + 1}] {echo}{completion.text}")


def _report(llm: "LLM", output: "RequestOutput", loaded: float, completions: int) -> None:
    from qllama.cli.backends import running
    from qllama.cli.statistics import memory_line, speed_lines

    lines = [f"loading      {loaded:.2f} s"]
    if output.metrics is not None:
        lines += speed_lines(output.metrics, completions)
    lines.append(memory_line())
    lines += [f"backend      {r.scheme} ({r.linears} Linears): {r.how}" for r in running(llm)]
    print("\n".join(lines), file=sys.stderr)
