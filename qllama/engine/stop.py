"""Finding stop strings in text that arrives in pieces."""

from collections.abc import Sequence
from typing import NamedTuple


class Checked(NamedTuple):
    """What became of the texts of some tokens."""

    text: str  # to give to the user now
    stop: str | None  # the stop string that ended the text
    num_tokens: int  # tokens of these that belong to the output, the completing one included


class StopChecker:
    """Looks for stop strings and holds back the end of the text that may be the start of one.

    The string that is complete first wins, and of those complete at the same character the
    longest, so the result does not depend on how the text is cut into tokens.

    Args:
        stop: the strings, none of them empty.
        include: leave the stop string in the text.
        min_tokens: strings that are complete within so many tokens do not stop.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False, min_tokens: int = 0) -> None:
        self._stop = list(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include = include
        self._early = min_tokens
        self._held = ""

    @property
    def active(self) -> bool:
        """Whether there is any string to look for."""
        return bool(self._stop)

    def step(self, texts: Sequence[str]) -> Checked:
        """Take the texts of the next tokens, one string for each token."""
        given = ""
        for number, text in enumerate(texts, start=1):
            known = len(self._held)
            self._held += text
            self._early -= 1
            if self._early < 0 and (found := self._find(known)):
                begin, end = found
                given += self._held[: end if self._include else begin]
                stop, self._held = self._held[begin:end], ""
                return Checked(given, stop, number)
            given += self._release()
        return Checked(given, None, len(texts))

    def flush(self) -> str:
        """What was held back, when the text ends for another reason."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, known: int) -> tuple[int, int] | None:
        """Begin and end of the stop string that is complete first beyond `known` characters."""
        found = []
        for stop in self._stop:
            begin = self._held.find(stop, max(known - len(stop) + 1, 0))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def _release(self) -> str:
        """Hold only what can be the start of a stop string, and return the text before it."""
        begin = max(len(self._held) - self._longest, 0)
        while begin < len(self._held) and not self._may_begin(self._held[begin:]):
            begin += 1
        free, self._held = self._held[:begin], self._held[begin:]
        return free

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
