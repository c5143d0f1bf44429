"""The protocol: which tokens of a text are predicted, from what.

A text is tokenized as a whole, without special tokens, and cut into consecutive windows. Each is
run alone from position 0 and predicts all its tokens but the first; what does not fill a window is
left out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qllama.llm import LLM

Text = str | Sequence[int] | np.ndarray  # or its token ids
Head = Callable[[jax.Array], jax.Array]  # hidden states [N, D] to float32 logits [N, V]

_BLOCK = 256  # positions whose logits exist at a time


class Block(NamedTuple):
    """B positions of a window, of which the last may be padding."""

    valid: int  # of those that are none
    targets: jax.Array  # int32 [B], the tokens to predict
    hidden: Sequence[jax.Array]  # of each model, [B, D]


def cut_windows(llm: LLM, text: Text, window: int, limit: int | None) -> np.ndarray:
    """int32 `[n, window]`: at most `limit` windows of the text.

    Raises:
        ValueError: the text does not fill a window, or a window the model.
    """
    for name, value, least in (("window", window, 2), ("limit", limit, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r} must be an integer of {least} or more")
    if window > llm.max_model_len:
        raise ValueError(
            f"window={window} is more than the {llm.max_model_len} tokens the model is loaded for "
            "(max_model_len); give a smaller one"
        )
    if isinstance(text, str):
        if llm.tokenizer is None:
            raise ValueError("the model folder has no tokenizer; give token ids instead of a text")
        text = llm.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    ids = np.asarray(text)
    count = len(ids) // window
    if not count:
        raise ValueError(
            f"the text has {len(ids)} tokens, which do not fill a window of {window}; give a "
            "longer text, or a smaller window"
        )
    return ids[: count * window].reshape(count, window)[:limit]


def protocol(windows: np.ndarray) -> str:
    """What was predicted, as a sentence."""
    count, window = windows.shape
    return (
        f"{count * (window - 1)} predictions: the text tokenized as a whole without special "
        f"tokens, its first {windows.size} tokens cut into {count} windows of {window}, each run "
        f"alone from position 0 and predicting all its tokens but the first"
    )


def blocks(window: np.ndarray, *hidden: jax.Array) -> Iterator[Block]:
    """One window, some positions at a time, all blocks of one shape.

    Args:
        window: token ids `[T]`.
        hidden: of one or more models, `[T, D]`.
    """
    size = min(_BLOCK, len(window))
    for start in range(0, len(window) - 1, size):
        targets = window[start + 1 : start + 1 + size]
        padding = size - len(targets)
        parts = [state[start : start + len(targets)] for state in hidden]
        yield Block(
            valid=len(targets),
            targets=jnp.asarray(np.pad(targets, (0, padding))),
            hidden=[jnp.pad(part, ((0, padding), (0, 0))) for part in parts],
        )
