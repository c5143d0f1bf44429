"""The scales of a weight, chosen before its codes and, if asked, fitted again after them."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qllama.quantization.rtn import code_range, quantize_rtn, round_to
from qllama.quantization.scheme import QuantScheme

Observer = Literal["absmax", "mse", "hdiag"]

_STEPS = 80  # candidates of a search, each a hundredth of the absmax scale below the last


class Grid(NamedTuple):
    """The values a weight may take: `(code - zero) * scale`.

    Stored: `QuantScheme.scale_shape`, scales in the weight's dtype and zeros int16. Wide, as the
    solver reads it: both float32 `[K/c, N]`, one for each row and each run of c columns.
    """

    scales: jax.Array
    zeros: jax.Array | None


@partial(jax.jit, static_argnames=("scheme", "observer"))
def choose_scales(
    weight: jax.Array, scheme: QuantScheme, observer: Observer, importance: jax.Array
) -> Grid:
    """The grid of `weight [N, K]`, chosen before any of it is rounded.

    The searches shrink the absmax scale and keep, for each block, the one with the smallest error
    after rounding to nearest. Candidates are first rounded to the dtype they are stored in.

    Args:
        weight: bfloat16, float16 or float32, finite.
        scheme: any that `quantize_rtn` takes.
        observer: "absmax", the smallest scale that reaches every weight; "mse", least
            `sum |w - q|^2.4`; "hdiag", least `sum h_kk (w - q)^2`, the output error that there
            would be if features were uncorrelated.
        importance: `diag H`, float32 `[K]`; used by "hdiag" alone.

    Raises:
        ValueError: what `quantize_rtn` refuses.
    """
    start = quantize_rtn(weight, scheme, input_scale=1.0)
    zeros = start.zeros
    # A float16 scale below the smallest normal number has lost bits.
    smallest = float(jnp.finfo(weight.dtype).smallest_normal)
    scales = jnp.maximum(start.scales.astype(jnp.float32), smallest)
    if observer == "absmax":
        return Grid(scales.astype(weight.dtype), zeros)

    n, k = weight.shape
    rows, columns = scheme.scale_block((n, k))
    # Columns first: sums then run over whole vectors of rows, which CPUs need to be quick.
    w = weight.astype(jnp.float32).T.reshape(k // columns, columns, n)
    zeros_wide = None if zeros is None else _wide(zeros, scheme, n)[:, None]
    weights = importance.reshape(k // columns, columns, 1)
    first, power = (1.05, 2.0) if observer == "hdiag" else (0.99, 2.4)

    def error(scales: jax.Array) -> jax.Array:
        wide = _wide(scales, scheme, n)[:, None]
        codes = round_to_code(w / wide, zeros_wide, scheme)
        rounded = dequantize_code(codes, wide, zeros_wide)
        if observer == "hdiag":
            distance = weights * jnp.square(w - rounded)
        else:
            distance = jnp.abs(w - rounded) ** power
        per_row = jnp.pad(jnp.sum(distance, axis=1), [(0, 0), (0, -n % rows)])
        return jnp.sum(per_row.reshape(k // columns, -1, rows), axis=2).T

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best_scales, best_error = best
        candidate = round_to(weight.dtype.name, scales * (first - 0.01 * i))
        candidate = jnp.maximum(candidate, smallest)
        now = error(candidate)
        better = now < best_error
        return jnp.where(better, candidate, best_scales), jnp.where(better, now, best_error)

    found, _ = lax.fori_loop(0, _STEPS, step, (scales, error(scales)))
    return Grid(found.astype(weight.dtype), zeros)


@partial(jax.jit, static_argnames=("heights", "scheme"))
def widen(grids: Sequence[Grid], heights: tuple[int, ...], scheme: QuantScheme) -> Grid:
    """The stored grids of weights with `heights` rows, one wide grid for all rows in turn."""

    def wide(parts: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate(
            [_wide(part, scheme, n) for part, n in zip(parts, heights, strict=True)], axis=1
        )

    scales, zeros = zip(*grids, strict=True)
    return Grid(wide(scales), None if scheme.symmetric else wide(zeros))


def code_dtype(scheme: QuantScheme) -> type:
    """What codes are kept in, one to an element."""
    return jnp.float8_e4m3fn if scheme.weight_dtype == "float8_e4m3fn" else jnp.int8


def round_to_code(scaled: jax.Array, zeros: jax.Array | None, scheme: QuantScheme) -> jax.Array:
    """The nearest code of `scaled = weight / scale`, half to even, as a float32 number."""
    low, high = code_range(scheme)
    if scheme.weight_dtype == "float8_e4m3fn":
        return _round_to_float8(jnp.clip(scaled, low, high))
    return jnp.clip(jnp.round(scaled if zeros is None else scaled + zeros), low, high)


def dequantize_code(codes: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """float32 codes as the weights they stand for."""
    return (codes if zeros is None else codes - zeros) * scales


@jax.jit
def refit_scales(weight: jax.Array, codes: jax.Array, grid: Grid, moments: jax.Array) -> Grid:
    """The scales that lose least output for codes that stay: least squares, row by row.

    For row w with codes z in group g, `min_s |w - sum_g s_g z_g|_H` is the linear system
    `(Z H Z^T) s = Z H w`. A row whose solution is not positive, or no better once it is rounded
    to the dtype of the scales, keeps what it had.

    Args:
        weight: `[N, K]`, what was quantized.
        codes: int8 or float8 `[N, K]`, one to an element.
        grid: stored, one scale for K/G columns of one row: `[N, G]`.
        moments: `H`, damped, float32 `[K, K]`.
    """
    scales, zeros = grid
    (n, k), groups = weight.shape, scales.shape[1]
    columns = k // groups
    z = codes.astype(jnp.float32).reshape(n, groups, columns)
    if zeros is not None:
        z = z - zeros.astype(jnp.float32)[:, :, None]

    def times(errors: jax.Array, rows: jax.Array) -> jax.Array:  # [N, c], [c, K] -> [N, G]
        product = jnp.dot(errors, rows, precision=lax.Precision.HIGHEST)
        return jnp.sum(product.reshape(n, groups, columns) * z, axis=2)

    target = times(weight.astype(jnp.float32), moments)
    matrix = lax.map(
        lambda group: times(*group),
        (jnp.moveaxis(z, 1, 0), moments.reshape(groups, columns, k)),
    )
    matrix = jnp.moveaxis(matrix, 0, 1)  # [N, G, G]

    # Unit diagonal, for a well-conditioned factor; a group without a code other than 0 stays out.
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    size = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    unit = matrix / (size[:, :, None] * size[:, None, :])
    unit += jnp.eye(groups) * (diagonal <= 0)[:, None, :]
    factor = lax.linalg.cholesky(unit, symmetrize_input=False)
    back = partial(lax.linalg.triangular_solve, factor, left_side=True, lower=True)
    fitted = back(back((target / size)[:, :, None]), transpose_a=True)[:, :, 0] / size

    old = scales.astype(jnp.float32)
    new = round_to(scales.dtype.name, jnp.where(diagonal > 0, fitted, old))
    move = new - old
    slope = jnp.einsum("ngh,nh->ng", matrix, old + new, precision=lax.Precision.HIGHEST)
    change = jnp.sum(move * (slope - 2 * target), axis=1)  # of the loss, twice
    smallest = float(jnp.finfo(scales.dtype).smallest_normal)
    usable = jnp.isfinite(new) & (new >= smallest)
    keep = jnp.all(usable, axis=1) & (change < 0)
    return Grid(jnp.where(keep[:, None], new, old).astype(scales.dtype), zeros)


def _wide(values: jax.Array, scheme: QuantScheme, n: int) -> jax.Array:
    rows, _ = scheme.scale_block((n, 0))
    return jnp.repeat(values.astype(jnp.float32).T, rows, axis=1)[:, :n]


def _round_to_float8(x: jax.Array) -> jax.Array:
    # A cast there and back may be optimised away. float8_e4m3 has 3 bits of fraction, and below
    # 2^-6 the constant step 2^-9; multiplying by a power of two is exact.
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    step_exponent = jnp.maximum(exponent, 127 - 6) - 3

    def power(biased: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(biased << 23, jnp.float32)

    return jnp.round(x * power(254 - step_exponent)) * power(step_exponent)
