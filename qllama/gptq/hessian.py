"""The second moments of a Linear's inputs, summed over calibration tokens.

`H = (2/n) sum_t x_t x_t^T`, so that `tr(D H D^T) / 2` is the mean of `|D x_t|^2` over the tokens.
Products of two bfloat16 or float16 numbers are exact in float32; therefore inputs are never scaled
before the product, and the factor 2/n is applied once, at the end.

Source: arXiv 2210.17323 (GPTQ), section 3.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from qllama_kernels.xla import WITHOUT_TRITON

# What a damping fraction is of: the mean of diag H, or the mean with each entry cut to ten
# medians, so that a few massive channels do not raise everyone's damping.
DampeningReference = Literal["mean", "clipmean"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Hessian:
    """What the calibration tokens say about one input. Two of them add up leaf by leaf."""

    total: jax.Array  # float32 [K, K], sum of x x^T; valid on and above the diagonal
    tokens: jax.Array  # int32 [], how many were summed
    dropped: jax.Array  # int32 [], how many were left out because they were not finite

    @classmethod
    def zeros(cls, k: int) -> "Hessian":
        """No token seen yet, for inputs of `k` features."""
        return cls(
            total=jnp.zeros((k, k), jnp.float32),
            tokens=jnp.zeros((), jnp.int32),
            dropped=jnp.zeros((), jnp.int32),
        )


def accumulate(hessian: Hessian, x: jax.Array, mask: jax.Array | None = None) -> Hessian:
    """Add tokens to `hessian`, whose buffers are reused: do not touch it afterwards.

    A token with a NaN, an infinity or an overflowing square is left out and counted in `dropped`.
    Give chunks of 16k tokens or more, so that reading and writing the sum is hidden.

    Args:
        hessian: of the same K.
        x: bfloat16, float16 or float32 `[..., K]`. float32 is multiplied in full float32.
        mask: bool `[...]`, True for the tokens that count (not padding); None: all.

    Raises:
        ValueError: another dtype, K or shape of `mask`.
    """
    k = hessian.total.shape[0]
    if x.dtype.name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"activations are {x.dtype}; give bfloat16, float16 or float32")
    if x.shape[-1] != k:
        raise ValueError(f"activations are {list(x.shape)}, but the Hessian is of K={k} features")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask is {list(mask.shape)}, but the tokens are {list(x.shape[:-1])}")
    return _accumulate(hessian, x, mask)


@jax.jit(donate_argnums=0, compiler_options=WITHOUT_TRITON)
def _accumulate(hessian: Hessian, x: jax.Array, mask: jax.Array | None) -> Hessian:
    k = x.shape[-1]
    x = x.reshape(-1, k)
    counts = jnp.ones(x.shape[:1], bool) if mask is None else mask.reshape(-1)
    finite = jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1))
    x = jnp.where((counts & finite)[:, None], x, 0)

    total = hessian.total
    for start, stop in _panels(k, 8):
        panel = lax.dot_general(
            x[:, start:stop],
            x[:, start:],
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        total = total.at[start:stop, start:].add(panel)
    return Hessian(
        total=total,
        tokens=hessian.tokens + jnp.sum(counts & finite, dtype=jnp.int32),
        dropped=hessian.dropped + jnp.sum(counts & ~finite, dtype=jnp.int32),
    )


@jax.jit
def second_moments(hessian: Hessian) -> jax.Array:
    """`H = (2/n) sum_t x_t x_t^T`, float32 `[K, K]`, exactly symmetric; zeros without tokens."""
    upper = jnp.triu(hessian.total)
    scale = 2.0 / jnp.maximum(hessian.tokens, 1).astype(jnp.float32)
    return (upper + jnp.triu(upper, 1).T) * scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """`H`, and what there is to know about it before it is factored."""

    matrix: jax.Array  # [K, K]; the identity where calibration is of no use
    order: jax.Array  # int32 [K], columns by falling diagonal
    dead: jax.Array  # bool [K], features that were zero in every token
    mean: float  # of the diagonal, without the dead
    reference: float  # what a damping fraction is of
    tokens: int
    dropped: int
    dead_columns: int
    diag_ratio: float  # largest over median diagonal, without the dead
    trouble: str | None  # why there should be no solve

    def damping(self, frac: float) -> jax.Array:
        """What to add to the diagonal, float32 `[K]`.

        A dead feature, which is coupled to no other, gets the mean besides: any positive number
        does, and this one leaves mean and condition as they were.
        """
        return _damping(self.dead, frac * self.reference, self.mean)


def examine(hessian: Hessian, reference: DampeningReference = "mean") -> Moments:
    """Normalize the sum and look at it, waiting for the device."""
    matrix, *facts = _normalize(hessian)
    diagonal, finite, tokens, dropped = jax.device_get(facts)
    # On the host, where nothing is to be compiled: K numbers are few.
    k = diagonal.size
    falling = np.argsort(-diagonal, kind="stable")
    dead = diagonal <= 0
    dead_columns = int(np.count_nonzero(dead))
    live = diagonal[falling][: k - dead_columns].astype(np.float64)
    trouble, usable = None, True
    if not finite:
        trouble, usable = "the sum over the calibration tokens is not finite", False
    elif dead_columns == k:
        trouble, usable = f"nothing but zeros in {tokens} calibration tokens", False
    elif tokens < k / 8:
        trouble = f"{tokens} calibration tokens are too few for {k} features; give {4 * k} or more"
    if not usable:
        matrix, dead, live = jnp.eye(k), np.zeros(k, bool), np.ones(k)
    mean, median = float(live.mean()), float(np.median(live))
    clipmean = float(np.minimum(live, 10 * median).mean())
    return Moments(
        matrix=matrix,
        order=jnp.asarray(falling, jnp.int32),
        dead=jnp.asarray(dead),
        mean=mean,
        reference=mean if reference == "mean" else clipmean,
        tokens=int(tokens),
        dropped=int(dropped),
        dead_columns=dead_columns,
        diag_ratio=float(live[0] / median),
        trouble=trouble,
    )


@jax.jit
def _normalize(hessian: Hessian) -> tuple[jax.Array, ...]:
    matrix = second_moments(hessian)
    finite = jnp.isfinite(matrix).all() & jnp.isfinite(jnp.trace(matrix))
    return matrix, jnp.diagonal(matrix), finite, hessian.tokens, hessian.dropped


@jax.jit
def _damping(dead: jax.Array, damping: float, of_dead: float) -> jax.Array:
    return damping + jnp.where(dead, jnp.float32(of_dead), 0.0)


def default_dampening_frac(tokens: int, k: int) -> float:
    """The damping for `tokens` calibration tokens and `k` features, as a fraction of mean(diag H).

    The fewer tokens a feature has, the more of their correlation is chance.
    Measured on held-out data, not derived.
    """
    if tokens < k:
        return 0.1
    return 0.05 if tokens < 4 * k else 0.01


@jax.jit
def energy(errors: jax.Array, moments: jax.Array) -> jax.Array:
    """`d H d^T / 2` of every row d: the mean of `(d x_t)^2` over the tokens.

    Args:
        errors: `[N, K]`, usually W - Q.
        moments: `H`, float32 `[K, K]`, symmetric.

    Returns:
        float32 `[N]`.
    """
    k = moments.shape[0]
    errors = errors.astype(jnp.float32)
    total = jnp.zeros(errors.shape[0], jnp.float32)
    for start, stop in _panels(k, 2):
        # What lies left of a diagonal block equals what lies below it.
        column = moments[start:, start:stop].at[stop - start :].multiply(2.0)
        product = jnp.dot(errors[:, start:], column, precision=lax.Precision.HIGHEST)
        total += jnp.sum(product * errors[:, start:stop], axis=1)
    return total / 2


def _panels(k: int, count: int) -> list[tuple[int, int]]:
    """`count` column ranges of a symmetric matrix, fewer where they would be narrow. Working right
    of the diagonal alone saves 1/4 with two of them and 7/16 with eight; each is compiled."""
    width = max(1024, -(-k // (count * 128)) * 128)
    return [(start, min(start + width, k)) for start in range(0, k, width)]
