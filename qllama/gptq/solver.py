"""Rounding a weight column by column, each error made good by the columns still to come.

With the columns in processing order let `H + damping = U diag(p) U^T`, U unit upper triangular.
Column j is then rounded from `w_j + sum_{i<j} U_ij (w_i - q_i)`, and rounding it costs `p_j / 2`
times its squared error. This is GPTQ's recursion without an inverse (QuIP's LDLQ). The sum over
finished columns is the same formula at every level: products of matrices for super-blocks, blocks
and runs of a few columns, plain arithmetic inside a run. Rows never mix, so they may be spread over
devices.

Sources: arXiv 2210.17323 (GPTQ), 2307.13304 (QuIP), 2507.18553.
"""

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from qllama_kernels.xla import WITHOUT_TRITON

from qllama.gptq.scales import Grid, code_dtype, dequantize_code, round_to_code
from qllama.quantization.scheme import QuantScheme

BLOCK = 128
RUN = 8  # columns unrolled: each makes the program longer, and one pass over the rows shorter

_dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)


class Factor(NamedTuple):
    """`H + damping = U diag(p) U^T` in processing order. NaN where that does not exist."""

    feedback: jax.Array  # float32 [K, K], (U - I)^T: strictly lower triangular
    pivots: jax.Array  # float32 [K], p


def factor(moments: jax.Array, damping: jax.Array, order: jax.Array, *, wide: bool) -> Factor:
    """Factor `moments + diag(damping)`, columns taken in `order`.

    A Cholesky factor of the reversed matrix, reversed again. The failure of float32 shows as NaN.

    Args:
        moments: `H`, float32 `[K, K]`, symmetric.
        damping: float32 `[K]`, added to the diagonal.
        order: int32 `[K]`, the column processed first, second, ...
        wide: factor in float64. Costs 8 bytes an element, and is slow on GPUs made for play.
    """
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        return _factor(moments, damping, order, wide=wide)


@partial(jax.jit, static_argnames="wide")
def _factor(moments: jax.Array, damping: jax.Array, order: jax.Array, *, wide: bool) -> Factor:
    dtype = jnp.float64 if wide else jnp.float32
    reverse = order[::-1]
    matrix = moments[reverse][:, reverse].astype(dtype)
    index = jnp.arange(order.shape[0])
    matrix = matrix.at[index, index].add(damping[reverse].astype(dtype))
    upper = lax.linalg.cholesky(matrix, symmetrize_input=False)[::-1, ::-1]
    root = jnp.diagonal(upper)
    feedback = jnp.tril((upper / root).T, -1)
    return Factor(feedback.astype(jnp.float32), jnp.square(root).astype(jnp.float32))


@partial(
    jax.jit, static_argnames=("scheme", "rows", "super_block"), compiler_options=WITHOUT_TRITON
)
def solve(
    weight: jax.Array,
    factor: Factor,
    order: jax.Array,
    grid: Grid,
    scheme: QuantScheme,
    *,
    rows: NamedSharding | None = None,
    super_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The codes of a weight whose scales are settled. Compiled once per shape and scheme.

    Args:
        weight: `[N, K]`, any float dtype; computed in float32.
        factor: of the Hessian of its input.
        order: int32 `[K]`, as given to `factor`.
        grid: wide; a group is K/G columns that are neighbours in the original order.
        scheme: how codes are rounded.
        rows: of `weight`, if its rows are spread over devices. Each solves its own by the program
            that one device would run; XLA's for CPUs crashes if left to divide it (jax 0.11.2).
        super_block: a multiple of 128. So many columns meet all finished ones in one matmul; more
            of them make a shorter program and more multiplications by zero. None: half of them,
            2048 at least.

    Returns:
        codes int8 or float8_e4m3fn `[N, K]` in the original order of columns, not packed; and
        float32 `[N]`, each row's `d (H + damping) d^T / 2` with d = w - q, as the recursion adds
        it up: it agrees with the product only if the factor is accurate.
    """
    if super_block is None:
        super_block = max(2048, -(-weight.shape[1] // (2 * BLOCK)) * BLOCK)
    here = partial(_solve_rows, scheme=scheme, super_block=super_block)
    if rows is None:
        return here(weight, factor, order, grid)
    every, (axis,) = PartitionSpec(), rows.spec
    return jax.shard_map(
        here,
        mesh=rows.mesh,
        in_specs=(rows.spec, every, every, PartitionSpec(None, axis)),
        out_specs=rows.spec,
        check_vma=False,  # loops begin with zeros, which are the same on all devices
    )(weight, factor, order, grid)


def _solve_rows(
    weight: jax.Array,
    factor: Factor,
    order: jax.Array,
    grid: Grid,
    scheme: QuantScheme,
    super_block: int,
) -> tuple[jax.Array, jax.Array]:
    n, k = weight.shape
    pad = -k % BLOCK  # columns of zeros, after all others
    columns = jnp.pad(weight.astype(jnp.float32).T[order], [(0, pad), (0, 0)])
    group = jnp.pad(order // (k // grid.scales.shape[0]), (0, pad))
    feedback = jnp.pad(factor.feedback, (0, pad))
    pivots = jnp.pad(factor.pivots, (0, pad))

    errors, codes = jnp.zeros((0, n), jnp.float32), jnp.zeros((0, n), code_dtype(scheme))
    loss = jnp.zeros(n, jnp.float32)
    for start in range(0, k + pad, super_block):
        stop = min(start + super_block, k + pad)
        block_errors, block_codes, loss = _solve_super_block(
            columns[start:stop],
            _dot(feedback[start:stop, :start], errors),
            feedback[start:stop, start:stop],
            pivots[start:stop],
            group[start:stop],
            grid,
            loss,
            scheme,
        )
        errors = jnp.concatenate([errors, block_errors])
        codes = jnp.concatenate([codes, block_codes])
    place = jnp.zeros_like(order).at[order].set(jnp.arange(k, dtype=order.dtype))
    return codes[place].T, loss


def _solve_super_block(
    columns: jax.Array,  # [W, N] weights as they were
    carried: jax.Array,  # [W, N] what the columns before this super-block hand on
    feedback: jax.Array,  # [W, W]
    pivots: jax.Array,  # [W]
    group: jax.Array,  # [W]
    grid: Grid,  # wide
    loss: jax.Array,  # [N]
    scheme: QuantScheme,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def step(i: jax.Array, state: tuple) -> tuple:
        errors, codes, loss = state
        start = i * BLOCK
        here = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        rows, groups = here(feedback), here(group)
        # Errors of columns not reached yet are zero, so the product needs no mask.
        block_errors, block_codes, loss = _solve_block(
            here(columns),
            here(carried) + _dot(rows, errors),
            here(rows, axis=1),
            here(pivots),
            jax.tree.map(lambda x: x[groups], grid),
            loss,
            scheme,
        )
        errors = lax.dynamic_update_slice_in_dim(errors, block_errors, start, 0)
        return errors, lax.dynamic_update_slice_in_dim(codes, block_codes, start, 0), loss

    start = (jnp.zeros_like(columns), jnp.zeros(columns.shape, code_dtype(scheme)), loss)
    return lax.fori_loop(0, columns.shape[0] // BLOCK, step, start)


def _solve_block(
    columns: jax.Array,  # [BLOCK, N]
    carried: jax.Array,  # [BLOCK, N]
    feedback: jax.Array,  # [BLOCK, BLOCK]
    pivots: jax.Array,  # [BLOCK]
    grid: Grid,  # of each column, [BLOCK, N]
    loss: jax.Array,  # [N]
    scheme: QuantScheme,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def step(i: jax.Array, state: tuple) -> tuple:
        errors, codes, loss = state
        start = i * RUN
        here = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=RUN)
        w, p = here(columns), here(pivots)
        s, z = here(grid.scales), [None] * RUN if grid.zeros is None else here(grid.zeros)
        rows = here(feedback)
        back = list(here(carried) + _dot(rows, errors))
        near = here(rows, axis=1)
        run_errors: list[jax.Array] = []
        run_codes: list[jax.Array] = []
        for j in range(RUN):
            for i_before, error in enumerate(run_errors):
                back[j] = back[j] + near[j, i_before] * error
            code = round_to_code((w[j] + back[j]) / s[j], z[j], scheme)
            error = w[j] - dequantize_code(code, s[j], z[j])
            loss = loss + 0.5 * p[j] * jnp.square(error + back[j])
            run_errors.append(error)
            run_codes.append(code.astype(codes.dtype))
        errors = lax.dynamic_update_slice_in_dim(errors, jnp.stack(run_errors), start, 0)
        return errors, lax.dynamic_update_slice_in_dim(codes, jnp.stack(run_codes), start, 0), loss

    start = (jnp.zeros_like(columns), jnp.zeros(columns.shape, code_dtype(scheme)), loss)
    return lax.fori_loop(0, BLOCK // RUN, step, start)
