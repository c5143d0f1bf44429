"""Regular expressions that come from a config file, and do not keep anyone waiting.

An expression such as `(.*.*)*x` takes `re` longer than anyone waits, and checkpoints are not to be
trusted; the `regex` library gives up when it is told to. It writes counted repeats out while it
compiles, though, so that `(?:(?:.{1000}){1000}){1000}` would take all memory: counts are limited.
"""

import math
import re
import warnings
from reprlib import repr as shown

import regex

from qllama.errors import CheckpointError

_MAX_LENGTH = 1000
_MAX_COUNT = 100  # of all counted repeats together, as if each stood in the one before
_SECONDS = 1.0  # a sound expression needs microseconds


class Pattern:
    """A regular expression; made by `compile_pattern`."""

    def __init__(self, compiled: "regex.Pattern[str]", place: str) -> None:
        self._compiled = compiled
        self._place = place

    def match(self, path: str) -> bool:
        """Whether it matches the beginning of `path`, or all of it where it ends with `$`.

        Raises:
            CheckpointError: that takes longer than a second.
        """
        try:
            return self._compiled.match(path, timeout=_SECONDS) is not None
        except TimeoutError as error:
            raise CheckpointError(
                f"{self._place}: {shown(self._compiled.pattern)} takes longer than {_SECONDS:g} s "
                f"to match {path!r}; write it without nested repeats"
            ) from error


def compile_pattern(text: str, place: str) -> Pattern:
    """Compile `text`.

    Raises:
        CheckpointError: naming the JSON path `place`: it is no valid expression, very long, or
            repeats something very often.
    """
    problem = f"{place}: {shown(text)} is no regular expression"
    if len(text) > _MAX_LENGTH:
        raise CheckpointError(f"{problem} of at most {_MAX_LENGTH} characters")
    counts = [
        int(n) for braces in re.findall(r"\{[^}]*\}", text) for n in re.findall(r"\d+", braces)
    ]
    if math.prod(filter(None, counts)) > _MAX_COUNT:
        raise CheckpointError(f"{problem} that repeats at most {_MAX_COUNT} times")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that may change its meaning one day
            return Pattern(regex.compile(text), place)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{problem}: {error}") from error
