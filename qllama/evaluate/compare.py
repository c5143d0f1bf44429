"""Two models on one text: how far the second one's predictions are from the first one's."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qllama_convert.hub import resolve

from qllama.evaluate.perplexity import check_finite, nll_of
from qllama.evaluate.windows import Head, Text, blocks, cut_windows, protocol
from qllama.llm import LLM
from qllama.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """How far model b's predictions are from model a's. Divergences are in nats."""

    kl_mean: float  # of KL(a || b) = sum p_a (ln p_a - ln p_b), over all predictions
    kl_p99: float  # only one prediction in a hundred diverges more
    top1_agreement: float  # share of predictions in which both have the same likeliest token
    perplexity_a: float
    perplexity_b: float
    tokens: int  # predicted
    windows: int
    window: int  # tokens of each
    protocol: str  # the same as a sentence


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is kept of a model to compare others with."""

    windows: np.ndarray  # int32 [n, T]
    hidden: Iterable[Any]  # of each window, [T, D]: what the head reads
    head: Head
    vocab_size: int


def compare(
    llm_a: LLM | str | Path,
    llm_b: LLM | str | Path,
    text: Text,
    *,
    window: int = 2048,
    limit: int | None = None,
) -> ComparisonResult:
    """Compare the predictions of two models with one tokenizer, position by position.

    Nothing is approximated: both distributions are there in full. A model that is given as a folder
    or Hub id is loaded for its turn only, and the other one's hidden states are kept meanwhile, on
    the host; so two models that do not fit into memory together can be compared. Models that are
    loaded may be on different devices.

    Args:
        llm_a: the original.
        llm_b: what it is compared with, such as a quantized form.
        text: a text, or its token ids.
        window: tokens of one window; the first of each is not predicted.
        limit: windows to use at most; None: all.

    Raises:
        ValueError: the models have different vocabularies, one computes NaN, or as `perplexity`.
        CheckpointError: a folder cannot be loaded.
    """
    # What is missing should be missed before the first model has run.
    a, b = (x if isinstance(x, LLM) else resolve(x) for x in (llm_a, llm_b))
    if isinstance(a, LLM):
        windows = cut_windows(a, text, window, limit)
        reference = _reference(a, windows, map(a.hidden_states, windows))
    else:
        with LLM(a) as llm:
            reference = remember(llm, text, window=window, limit=limit)
    if isinstance(b, LLM):
        return compare_with(reference, b, text)
    with LLM(b) as llm:
        return compare_with(reference, llm, text)


def remember(llm: LLM, text: Text, *, window: int = 2048, limit: int | None = None) -> Reference:
    """All there is to know of model a, which may be closed afterwards."""
    windows = cut_windows(llm, text, window, limit)
    with progress_bar("Predicting", len(windows)) as advance:
        hidden = []
        for ids in windows:
            hidden.append(np.asarray(llm.hidden_states(ids)))
            advance()
    return _reference(llm, windows, hidden)


def compare_with(reference: Reference, llm: LLM, text: Text) -> ComparisonResult:
    """Compare model b, which is `llm`, with a reference that was made of the same text."""
    windows = _same_windows(reference, llm, text)
    head_a, head_b = reference.head, llm.head()
    found: list[dict[str, np.ndarray]] = []
    with progress_bar("Comparing", len(windows)) as advance:
        for ids, hidden in zip(windows, reference.hidden, strict=True):
            states = jnp.asarray(hidden), llm.hidden_states(ids)
            for block in blocks(ids, *states):
                a, b = block.hidden
                logits = head_b(b)
                part = jax.device_get(_compare(_beside(logits, head_a(a)), logits, block.targets))
                found.append({name: values[: block.valid] for name, values in part.items()})
            for name, model in (("nll_a", "the first model"), ("nll_b", "the second model")):
                check_finite(float(found[-1][name].sum()), model)
            advance()
    figures = {name: np.concatenate([f[name] for f in found]).astype(float) for name in found[0]}
    return ComparisonResult(
        kl_mean=float(figures["kl"].mean()),
        kl_p99=float(np.percentile(figures["kl"], 99)),
        top1_agreement=float(figures["agree"].mean()),
        perplexity_a=math.exp(figures["nll_a"].mean()),
        perplexity_b=math.exp(figures["nll_b"].mean()),
        tokens=len(figures["kl"]),
        windows=len(windows),
        window=windows.shape[1],
        protocol=protocol(windows),
    )


def _beside(there: jax.Array, logits: jax.Array) -> jax.Array:
    """`logits` on the devices of `there`: the two models may be on different meshes."""
    if logits.sharding.device_set == there.sharding.device_set:
        return logits
    return jax.device_put(logits, there.sharding)


def _reference(llm: LLM, windows: np.ndarray, hidden: Iterable[Any]) -> Reference:
    vocab_size = llm.config.vocab_size
    return Reference(windows=windows, hidden=hidden, head=llm.head(), vocab_size=vocab_size)


def _same_windows(reference: Reference, llm: LLM, text: Text) -> np.ndarray:
    windows, vocab_size = reference.windows, llm.config.vocab_size
    if vocab_size != reference.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {reference.vocab_size} and {vocab_size} tokens, so "
            "their predictions cannot be compared"
        )
    if llm.tokenizer is None:
        text = windows.ravel()
    mine = cut_windows(llm, text, windows.shape[1], len(windows))
    if not np.array_equal(mine, windows):
        raise ValueError(
            "the two models' tokenizers make different tokens of the text, so their predictions "
            "cannot be compared"
        )
    return windows


@jax.jit
def _compare(logits_a: jax.Array, logits_b: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    """Figures of each of B predictions, from logits `[B, V]`."""
    a, b = jax.nn.log_softmax(logits_a), jax.nn.log_softmax(logits_b)
    # A rounding error may make it a little negative.
    divergence = jnp.maximum(jnp.sum(jnp.exp(a) * (a - b), axis=1), 0.0)
    return {
        "kl": divergence,
        "agree": jnp.argmax(a, axis=1) == jnp.argmax(b, axis=1),
        "nll_a": nll_of(a, targets),
        "nll_b": nll_of(b, targets),
    }
