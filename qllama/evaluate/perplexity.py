"""Perplexity: how well a model predicts a text."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qllama.evaluate.windows import Text, blocks, cut_windows, protocol
from qllama.llm import LLM
from qllama.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """How well a text was predicted."""

    perplexity: float  # exp of mean_nll
    mean_nll: float  # negative log likelihood of a token, in nats
    tokens: int  # predicted
    windows: int
    window: int  # tokens of each
    protocol: str  # the same as a sentence


def perplexity(
    llm: LLM, text: Text, *, window: int = 2048, limit: int | None = None
) -> PerplexityResult:
    """The perplexity of a text, in consecutive windows; `windows.py` says exactly how.

    Comparable with figures of the same window and text alone.

    Args:
        llm: the model.
        text: a text, or its token ids.
        window: tokens of one window; the first of each is not predicted.
        limit: windows to use at most; None: all.

    Raises:
        ValueError: the text does not fill a window, a window is longer than the model takes, or
            the model computes NaN.
    """
    windows = cut_windows(llm, text, window, limit)
    head = llm.head()
    total = 0.0
    with progress_bar("Predicting", len(windows)) as advance:
        for ids in windows:
            for block in blocks(ids, llm.hidden_states(ids)):
                nll = np.asarray(_nll(head(block.hidden[0]), block.targets))[: block.valid]
                total += float(nll.sum(dtype=np.float64))
            check_finite(total, "the model")
            advance()
    tokens = windows.size - len(windows)
    return PerplexityResult(
        perplexity=math.exp(total / tokens),
        mean_nll=total / tokens,
        tokens=tokens,
        windows=len(windows),
        window=window,
        protocol=protocol(windows),
    )


def check_finite(nll: float, model: str) -> None:
    """Raise `ValueError` where a negative log likelihood is NaN or infinite."""
    if not math.isfinite(nll):
        raise ValueError(
            f"{model} computes NaN; dtype='float32' has more range, and if that does not help the "
            "checkpoint is broken"
        )


def nll_of(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """`[B]`, of `targets [B]` under `log_probs [B, V]`."""
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


@jax.jit
def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return nll_of(jax.nn.log_softmax(logits), targets)
