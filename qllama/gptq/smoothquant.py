"""SmoothQuant: outliers of activations moved into the weights, where they do less harm.

Source: arXiv 2211.10438.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from qllama.gptq.hessian import Hessian

_SMALLEST = 1e-5  # of a magnitude, as in llm-compressor


def smoothing_factors(
    absmax: np.ndarray, weights: Sequence[np.ndarray], strength: float
) -> np.ndarray:
    """`max|x_k|^a / max|W_k|^(1-a)`: what each input feature k is to be divided by.

    Args:
        absmax: float32 `[K]`, the largest magnitude of each feature.
        weights: `[N_i, K]`, all that read this input.
        strength: a, from 0 (weights stay as they are) to 1.

    Returns:
        float32 `[K]`, above zero; 1 for features that were never seen.
    """
    columns = [np.max(np.abs(w.astype(np.float32)), axis=0) for w in weights]
    widest = np.maximum(np.max(columns, axis=0), _SMALLEST)
    factors = np.maximum(absmax, _SMALLEST) ** strength / widest ** (1 - strength)
    return np.where(absmax > 0, factors, 1.0).astype(np.float32)


def fold_into_norm(norm: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight of an RMSNorm whose output is divided by `factors`, in the dtype it has.

    Returns:
        That weight, and the factors float32 `[K]` that it divides by after rounding.
    """
    wide = norm.astype(np.float32)
    smoothed = (wide / factors).astype(norm.dtype)
    rounded = smoothed.astype(np.float32)
    # A weight of zero, or one that would come to lie outside the dtype, stays what it was.
    usable = np.isfinite(rounded) & (np.abs(rounded) >= float(jnp.finfo(norm.dtype).tiny))
    smoothed = np.where(usable, smoothed, norm)
    return smoothed, np.where(usable, wide / np.where(usable, rounded, 1.0), 1.0)


def smooth_weight(weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """`weight [N, K]` for an input that is divided by `factors [K]`, in the dtype it has."""
    return (weight.astype(np.float32) * factors).astype(weight.dtype)


def smooth_hessian(hessian: Hessian, factors: np.ndarray) -> Hessian:
    """The second moments of an input that is divided by `factors [K]`."""
    return replace(hessian, total=_scale(hessian.total, jnp.asarray(factors, jnp.float32)))


@jax.jit
def _scale(total: jax.Array, factors: jax.Array) -> jax.Array:
    return total / factors[:, None] / factors[None, :]
