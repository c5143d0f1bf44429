"""Quantized products by the Mosaic GPU kernels: arguments of `dispatch` in, kernels' operands out.

The only place that pads: tokens to 8, rows of an odd weight to 64, its columns to 128.
"""

import functools
import math

import jax
import jax.numpy as jnp

from qllama_kernels import tuning
from qllama_kernels.batch_matmul import batch_matmul
from qllama_kernels.decode_matmul import DecodeConfig, decode_matmul
from qllama_kernels.dequantize import dequantize
from qllama_kernels.fragments import COLUMNS, LAYOUTS, ROWS
from qllama_kernels.reference import GroupSize
from qllama_kernels.tuning import Config, Problem, Scheme
from qllama_kernels.xla import add_up, dot

_EIGHT_BIT: dict[str, Scheme] = {"int8": "w8a8", "float8_e4m3fn": "fp8"}
_WEIGHT_ONLY: dict[str, Scheme] = {"wgmma4": "w4a16", "wgmma8": "w8a16"}
GROUP_SIZES = (32, 64, 128)


BLOCK = (COLUMNS, COLUMNS)  # rows and columns of a float8 weight that share a scale


def column_group(group_size: GroupSize, n: int, k: int) -> int | None:
    """Columns that share a scale, or None for whole rows.

    Raises:
        NotImplementedError: blocks of several rows, or a group that the kernels have no step for.
    """
    rows, columns = group_size if isinstance(group_size, tuple) else (1, group_size or k)
    if columns >= k and rows in (1, n):
        return None
    if rows != 1 or columns not in GROUP_SIZES:
        raise NotImplementedError(
            f"scales over {rows}x{columns} weights; the kernels take rows or groups of "
            f"{', '.join(map(str, GROUP_SIZES))} columns"
        )
    return columns


def kernel_layout(
    weight_dtype: str, group_size: GroupSize, shape: tuple[int, int], *, quantized_input: bool
) -> str:
    """The layout in which the kernels want a weight: "wgmma4", "wgmma8" or "natural".

    Raises:
        NotImplementedError: no kernel takes such a weight.
    """
    n, k = shape
    if quantized_input and weight_dtype == "float8_e4m3fn" and group_size == BLOCK:
        if n % 8 or k % COLUMNS:
            raise NotImplementedError(
                f"weight {list(shape)} in blocks; the kernel takes N a multiple of 8, K of 128"
            )
        return "natural"
    group = column_group(group_size, n, k)
    if quantized_input:
        if weight_dtype not in _EIGHT_BIT or group is not None or n % 8 or k % COLUMNS:
            raise NotImplementedError(
                f"{weight_dtype} weight {list(shape)}, group_size={group_size}, with quantized "
                f"tokens: the kernels take 8-bit weights, N a multiple of 8, K of {COLUMNS}, one "
                "scale a row"
            )
        return "natural"
    if weight_dtype not in LAYOUTS:
        raise NotImplementedError(f"no kernel for {weight_dtype} weights and plain tokens")
    return LAYOUTS[weight_dtype]


def _scheme(x: jax.Array, codes: jax.Array, weight_dtype: str, layout: str) -> Scheme:
    if layout in _WEIGHT_ONLY:
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"layout={layout!r} needs bfloat16 or float16 tokens, got {x.dtype}"
            )
        return _WEIGHT_ONLY[layout]
    if weight_dtype not in _EIGHT_BIT or x.dtype != codes.dtype:
        raise NotImplementedError(
            f"{weight_dtype} weights in layout={layout!r} with {x.dtype} tokens; pack the weight "
            "first (`dispatch.pack`)"
        )
    return _EIGHT_BIT[weight_dtype]


def _device_kind() -> str:
    """Of the first device, for the tables; a program lowered elsewhere gets the heuristic."""
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else ""


def problem_of(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    weight_dtype: str,
    group_size: GroupSize,
    g_idx: jax.Array | None,
    input_scale: jax.Array | None,
    input_zero: jax.Array | None,
    layout: str,
) -> Problem:
    """What the kernels would have to do.

    Raises:
        NotImplementedError: they cannot.
    """
    scheme = _scheme(x, codes, weight_dtype, layout)
    packed = layout != "natural"
    n, k = (scales.shape[1] if packed else codes.shape[0]), x.shape[-1]
    m = math.prod(x.shape[:-1])
    if scheme == "fp8" and group_size == BLOCK and (n, k) != BLOCK:
        kernel_layout(weight_dtype, group_size, (n, k), quantized_input=True)
        if input_scale is None or input_scale.shape[-1:] != (k // COLUMNS,):
            raise NotImplementedError(f"weights in blocks with tokens not scaled by {COLUMNS}")
        return Problem(scheme="fp8_block", m=m, n=n, k=k, group_size=COLUMNS)
    if packed and scales.shape == (1, 1):
        n = codes.shape[0] * ROWS
    group = column_group(group_size, n, k)
    if not packed:
        kernel_layout(weight_dtype, group_size, (n, k), quantized_input=True)
    if g_idx is not None:
        raise NotImplementedError("g_idx: `dispatch.pack` sorts the columns and gives their order")
    if input_zero is not None:
        raise NotImplementedError("activations with a zero point")
    if input_scale is not None and input_scale.ndim and input_scale.shape[-1] != 1:
        raise NotImplementedError("activations with a scale per group of columns")
    return Problem(scheme=scheme, m=m, n=n, k=k, group_size=group)


def xla_is_faster(problem: Problem) -> bool:
    """Whether `backend="auto"` should leave this to XLA."""
    return tuning.xla_is_faster(problem, _device_kind())


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    problem: Problem,
    input_scale: jax.Array | None = None,
    out_dtype: jnp.dtype | type = jnp.float32,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`[..., N]` in `out_dtype`; arguments as `partial_sums`."""
    sums = partial_sums(
        x,
        codes,
        scales,
        zeros,
        problem=problem,
        input_scale=input_scale,
        out_dtype=out_dtype,
        config=config,
        interpret=interpret,
    )
    return add_up(sums).astype(out_dtype)


def partial_sums(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    problem: Problem,
    input_scale: jax.Array | None = None,
    out_dtype: jnp.dtype | type = jnp.float32,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`[S, ..., N]`, to be added up; float32, or if S is 1 `out_dtype`.

    Arguments as `dispatch.quantized_matmul`. `config` None: the tuned one; weight-only products of
    many tokens then go through a dequantized copy of the weight and the library's product.
    """
    lead, n = x.shape[:-1], problem.n
    if problem.m == 0:
        return jnp.zeros((1, *lead, n), out_dtype)
    if config is None and not (_weight_only(problem) and problem.m >= tuning.DENSE_M):
        config = tuning.choose(problem, _device_kind())
    out = _product(
        x.reshape(problem.m, problem.k),
        codes,
        scales,
        zeros,
        None if input_scale is None else _kernel_input_scale(input_scale, problem),
        problem=problem,
        config=config,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    return out.reshape(-1, *lead, n)


def _weight_only(problem: Problem) -> bool:
    return tuning.X_BYTES[problem.scheme] == 2


def _kernel_input_scale(input_scale: jax.Array, problem: Problem) -> jax.Array:
    """float32 `[]` or `[m]`; `[K/128, m]` for a weight in blocks."""
    m = problem.m
    input_scale = input_scale.astype(jnp.float32)
    if problem.scheme == "fp8_block":
        return input_scale.reshape(m, -1).T
    return input_scale.reshape(() if input_scale.size == 1 and m > 1 else input_scale.size)


# A jit of its own, so that the layers of a model that share a kernel trace and lower it once.
@functools.partial(jax.jit, static_argnames=("problem", "config", "out_dtype", "interpret"))
def _product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    input_scale: jax.Array | None,
    *,
    problem: Problem,
    config: Config | None,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """`[S, M, N]`. `config` None: through a dequantized copy of the weight."""
    m, k = problem.m, problem.k
    n = -(-problem.n // ROWS) * ROWS  # of the result: whole tiles, for TMA
    if codes.dtype == jnp.int32:
        k = -(-k // COLUMNS) * COLUMNS
        x = jnp.pad(x, ((0, 0), (0, k - problem.k)))
    elif problem.scheme == "fp8_block":
        scales = scales.astype(jnp.float32)
        scales = jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % 4)))  # rows of 16 bytes, for TMA
    else:
        scales = scales.reshape(1, -1)
    if scales.shape != (1, 1) and problem.scheme != "fp8_block":
        scales = jnp.pad(scales, ((0, 0), (0, n - problem.n)))
    zeros = None if zeros is None else jnp.pad(zeros, ((0, 0), (0, n - problem.n)))
    group_size = problem.group_size
    if zeros is not None and group_size is None:
        # The kernels know zero points of groups alone: let each run of columns have the row's.
        group_size = COLUMNS
        scales, zeros = (jnp.broadcast_to(a, (k // COLUMNS, n)) for a in (scales, zeros))
    if config is None:
        weight = dequantize(
            codes,
            scales,
            zeros,
            n=n,
            k=k,
            group_size=group_size,
            dtype=x.dtype,
            interpret=interpret,
        )
        return dot(x, weight, out_dtype)[None, :, : problem.n]
    if m % 8 and (m > 8 or problem.scheme == "fp8_block"):
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
        if input_scale is not None and input_scale.ndim:
            padding = [(0, 0)] * (input_scale.ndim - 1) + [(0, -m % 8)]
            input_scale = jnp.pad(input_scale, padding)
    matmul = decode_matmul if isinstance(config, DecodeConfig) else batch_matmul
    out = matmul(
        x,
        codes,
        scales,
        zeros,
        input_scale,
        n=n,
        group_size=group_size,
        config=config,  # type: ignore[arg-type]
        out_dtype=out_dtype,
        interpret=interpret,
    )
    return out[:, :m, : problem.n]
