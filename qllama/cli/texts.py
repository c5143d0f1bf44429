"""The text that a model is judged on, and how much of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qllama.llm import LLM

_WINDOW = 2048  # what published perplexities of Llama models use


def add_text(parser: argparse.ArgumentParser) -> None:
    """--text, --window, --limit and --json."""
    parser.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="the text, a UTF-8 file"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens of one window (default: {_WINDOW}, or as many as the model takes)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="windows to use at most (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def default_window(llm: "LLM") -> int:
    """The window where the user names none."""
    return min(_WINDOW, llm.max_model_len)


def read_file(path: Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    from qllama.gptq.rows import read_text

    try:
        return read_text(path, path.stat().st_size + 1)[0]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
