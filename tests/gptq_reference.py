"""GPTQ in float64 NumPy, one column after the other, and inputs worth solving for."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np


def activations(tokens: int, k: int, *, seed: int = 0, outliers: int = 8) -> np.ndarray:
    """bfloat16 `[tokens, K]`: features with causes in common, a few channels far louder."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(tokens, 64)) / np.sqrt(1 + np.arange(64))
    x = 0.2 * rng.normal(size=(tokens, k)) + causes @ rng.normal(size=(64, k))
    x[:, rng.choice(k, outliers, replace=False)] *= rng.uniform(5, 20, outliers)
    return x.astype(ml_dtypes.bfloat16)


def heavy_weight(n: int, k: int, *, seed: int = 1) -> np.ndarray:
    """float32 `[N, K]` with heavier tails than a normal distribution."""
    draws = np.random.default_rng(seed).standard_t(5, size=(n, k))
    return (0.02 * draws).astype(np.float32)


def hessian(x: np.ndarray) -> np.ndarray:
    """`(2/n) sum_t x_t x_t^T` of `x [n, K]`, float64."""
    x = x.astype(np.float64)
    return 2 / len(x) * x.T @ x


def loss(errors: np.ndarray, h: np.ndarray) -> float:
    """`tr(D H D^T) / 2`."""
    errors = errors.astype(np.float64)
    return float(((errors @ h) * errors).sum() / 2)


@dataclass(frozen=True)
class Solved:
    codes: np.ndarray  # float64 [N, K]
    weight: np.ndarray  # float64 [N, K], dequantized
    loss: np.ndarray  # float64 [N]


def solve(
    weight: np.ndarray,
    h: np.ndarray,
    order: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    code_range: tuple[int, int],
) -> Solved:
    """The paper's algorithm 1, unblocked: `h` is damped, scales and zeros are `[N, K]`.

    With `H^-1 = U^T U`, U upper: what a column's rounding loses is subtracted from all columns
    that follow, by the column's row of U.
    """
    w = weight.astype(np.float64)[:, order]
    s, z = scales.astype(np.float64)[:, order], zeros.astype(np.float64)[:, order]
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    codes, total = np.zeros_like(w), np.zeros(len(w))
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / s[:, j] + z[:, j]), *code_range)
        error = (w[:, j] - (codes[:, j] - z[:, j]) * s[:, j]) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
        total += error**2 / 2
    back = np.argsort(order)
    return Solved(codes[:, back], ((codes - z) * s)[:, back], total)
