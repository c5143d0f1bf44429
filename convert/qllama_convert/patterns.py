"""Regular expressions that come from a config file."""

import re
import warnings

from qllama.errors import CheckpointError


def compile_pattern(text: str, path: str) -> re.Pattern[str]:
    """Compile `text`; `CheckpointError` naming the JSON `path` when it is no valid expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that may change its meaning one day
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: {text!r} is no regular expression: {error}") from error
