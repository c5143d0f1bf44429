"""What is said beside the results: errors, warnings and logs, one line each, on stderr."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TextIO

_LOGGERS = ("qllama", "qllama_convert", "qllama_kernels")


def one_line(message: object) -> str:
    """The text of an error or a warning, without line breaks."""
    return " ".join(str(message).split())


def complain(error: BaseException, *, verbose: bool) -> None:
    """Tell what went wrong; where, too, if `verbose`."""
    if verbose:
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def show_messages(*, verbose: bool) -> Iterator[None]:
    """Show warnings, and logs from their level on, as `warning: ...` while the block runs."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {one_line(message)}", file=sys.stderr)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in an ANSI style such as "2" (dim) or "1;32" (bold green), on a terminal only."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{style}m{text}\x1b[0m"


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {one_line(record.getMessage())}"
