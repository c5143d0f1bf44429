"""Reading a JSON object strictly: whatever has the wrong type is an error that names its path.

Everywhere `null` means absent, as in the files themselves. A JSON `true` is not the number 1.
"""

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping

from qllama.errors import CheckpointError

_SMALLEST, _LARGEST = -(2**31), 2**31 - 1


class Section:
    """One object of a config file, with its place in that file.

    Args:
        value: what the JSON held there; anything but an object raises `CheckpointError`.
        file: the name of that file, for messages.
        path: of the object in it, such as "quantization_config.config_groups"; "" for all of it.
    """

    def __init__(self, value: object, file: str, path: str = "") -> None:
        self.file = file
        self._path = path
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.place()} must be an object, found {shown(value)}")
        self._values = value

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __bool__(self) -> bool:
        return bool(self._values)

    def __iter__(self) -> Iterator[str]:
        """All keys in the order of the file, those with `null` included."""
        return iter(self._values)

    def value(self, key: str) -> object:
        """Whatever JSON stands there; None when absent."""
        return self._values.get(key)

    def spelling(self, *keys: str) -> str:
        """The first of several spellings of a key that is present; the first one if none is."""
        return next((key for key in keys if key in self), keys[0])

    def place(self, key: str = "") -> str:
        """Where `key` is, or the object itself, for messages: "<file>: <path>.<key>"."""
        path = self._below(key) if key else self._path
        return f"{self.file}: {path}" if path else self.file

    def error(self, key: str, message: str) -> CheckpointError:
        """An error about `key`, to be raised by the caller."""
        return CheckpointError(f"{self.place(key)} {message}")

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """An error that says what `key` must be and what it is."""
        found = shown(self._values[key]) if key in self else "nothing"
        return self.error(key, f"must be {expected}, found {found}")

    def string(self, key: str) -> str | None:
        """The string at `key`, or None."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """The boolean at `key`."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integer(self, key: str) -> int | None:
        """The integer at `key`, within 32 bits, or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        if not _SMALLEST <= value <= _LARGEST:
            raise self.wrong(key, f"an integer between {_SMALLEST} and {_LARGEST}")
        return value

    def positive_number(self, key: str) -> float:
        """The finite number above zero that must stand at `key`."""
        value = self.value(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number) and number > 0:
                return number
        raise self.wrong(key, "a finite number above zero")

    def strings(self, key: str) -> tuple[str, ...]:
        """The list of strings at `key`; empty when absent."""
        value = self.value(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def pair(self, key: str) -> tuple[int, int] | None:
        """The list of two positive integers at `key`, or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2:
            first, second = value
            if type(first) is type(second) is int and min(value) > 0 and max(value) <= _LARGEST:
                return first, second
        raise self.wrong(key, "two positive integers, such as [128, 128]")

    def section(self, key: str) -> "Section | None":
        """The object at `key`, or None."""
        value = self.value(key)
        return None if value is None else self.child(key, value)

    def section_or_empty(self, key: str) -> "Section":
        """The object at `key`, empty when absent."""
        return self.section(key) or self.child(key, {})

    def with_value(self, key: str, value: object) -> "Section":
        """The same object with another value at `key`."""
        return Section({**self._values, key: value}, self.file, self._path)

    def child(self, key: str, value: object) -> "Section":
        """An object as if it stood at `key`."""
        return Section(value, self.file, self._below(key))

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raise if there is a key outside `known`."""
        allowed = set(known)
        for key in self._values:
            if key not in allowed:
                raise self.error(key, f"is unknown; known here are {', '.join(sorted(allowed))}")

    def _below(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def shown(value: object) -> str:
    """A JSON value as text short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return reprlib.repr(value)
