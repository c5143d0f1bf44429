"""From token ids to text while they arrive, never cutting a character in two."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8, or not yet, decode to
_MAX_WINDOW = 64  # tokens


class Detokenizer:
    """The growing text of one request.

    What `step` and `flush` return, joined, is `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` of all ids, except that the prompt decides, as it should,
    whether a tokenizer that drops a text's first space does so here.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: what comes before the text.
        skip_special_tokens: leave special tokens out.
    """

    # A few tokens are decoded again with each new one, as the text of a token depends on those
    # before it. `_window` is what is decoded: the tokens of the last complete piece of text, the
    # first `_context` of them, and those that came since. `_done` characters of it are out.

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = self._end_of_prompt(prompt_ids)
        self._context = len(self._window)
        self._done = len(self._decode(self._window))

    def step(self, ids: Sequence[int]) -> str:
        """The text that `ids`, one token or several, complete."""
        self._window += ids
        text = self._decode(self._window)
        marks = len(text) - len(text.rstrip(REPLACEMENT))
        endless = len(self._window) > _MAX_WINDOW  # no text, or bytes that will not become text
        if endless:
            marks = min(marks, 3)  # the most that a character of four bytes can still change
        complete = len(text) - marks
        new = text[self._done : complete]
        self._done = max(self._done, complete)
        if endless:
            self._forget(len(self._window) - _MAX_WINDOW // 2, text)
        elif new and not marks:
            self._forget(self._context, text)
        return new

    def flush(self) -> str:
        """What is left at the end: marks for the bytes of a character that was never completed."""
        text = self._decode(self._window)
        rest = text[self._done :]
        self._done = len(text)
        return rest

    def _forget(self, tokens: int, text: str) -> None:
        """Drop the first tokens of the window; as many characters at its end stay to be given."""
        pending = len(text) - self._done
        del self._window[:tokens]
        self._context = len(self._window)
        self._done = len(self._decode(self._window)) - pending

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _end_of_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """The shortest end, 4 to 23 tokens, that does not begin or end within a character."""
        for length in range(4, 24):
            end = list(prompt_ids[-length:])
            if REPLACEMENT not in self._decode(end):
                return end
        return []
