"""The one entry to quantized products: checks the arguments, then picks an implementation."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qllama_kernels import fragments, pallas, reference, xla
from qllama_kernels.packing import pack_int4, unpack_int4
from qllama_kernels.reference import GroupSize

Backend = Literal["auto", "pallas", "xla", "reference", "interpret"]
BACKENDS: tuple[str, ...] = get_args(Backend)
LAYOUTS = ("natural", "wgmma4", "wgmma8")

_STORED_AS = {
    "int4": jnp.uint8,
    "float4_e2m1fn": jnp.uint8,
    "int8": jnp.int8,
    "float8_e4m3fn": jnp.float8_e4m3fn,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the layout of a kernel: what `quantized_matmul` takes beside `x`."""

    codes: jax.Array  # as `layout` says
    scales: jax.Array  # natural: as in the checkpoint; else [ceil(K/g), N], or [1, N] for rows
    zeros: jax.Array | None  # natural: int16 like scales; else bfloat16, like scales
    columns: jax.Array | None  # int32 [K], the order in which `codes` take the columns of x
    layout: str = field(metadata={"static": True})


def check_backend(backend: str) -> None:
    """Raise `ValueError` for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")


def kernels_run_here() -> bool:
    """Whether the first device runs the kernels: they are for Hopper, compute capability 9.0."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def has_kernel(
    weight_dtype: str,
    group_size: GroupSize,
    shape: tuple[int, int],
    *,
    quantized_input: bool,
    layout: str = "natural",
) -> bool:
    """Whether `backend="auto"` has a kernel here for a weight `[N, K] = shape` in `layout`."""
    try:
        wanted = pallas.kernel_layout(
            weight_dtype, group_size, shape, quantized_input=quantized_input
        )
    except NotImplementedError:
        return False
    return kernels_run_here() and layout == wanted


def pack(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    k: int,
    weight_dtype: str,
    group_size: GroupSize = None,
    g_idx: jax.Array | None = None,
    quantized_input: bool = False,
) -> PackedWeight:
    """A checkpoint's weight in the layout that its kernel wants. Once, at load; shard first.

    Args:
        codes, scales, zeros, weight_dtype, group_size, g_idx: as `quantized_matmul` takes them.
        k: K.
        quantized_input: whether the tokens will come as codes.

    Raises:
        NotImplementedError: no kernel takes this weight; keep it as it is.
    """
    n = codes.shape[0]
    layout = pallas.kernel_layout(weight_dtype, group_size, (n, k), quantized_input=quantized_input)
    if layout == "natural":
        return PackedWeight(codes=codes, scales=scales, zeros=zeros, columns=None, layout=layout)
    group = pallas.column_group(group_size, n, k)
    columns = None
    if g_idx is not None:
        order = np.argsort(np.asarray(g_idx), kind="stable")
        if group is None or (np.asarray(g_idx)[order] != np.arange(k) // group).any():
            raise NotImplementedError(
                f"g_idx whose groups do not hold group_size={group} columns each"
            )
        values = unpack_int4(codes, k) if weight_dtype == "int4" else codes
        values = values[:, order]
        codes = pack_int4(values) if weight_dtype == "int4" else values
        columns = jnp.asarray(order, jnp.int32)
    return PackedWeight(
        codes=fragments.pack(codes, k=k, weight_dtype=weight_dtype),
        scales=fragments.pack_scales(scales, n=n),
        zeros=None if zeros is None else fragments.pack_scales(zeros, n=n).astype(jnp.bfloat16),
        columns=columns,
        layout=layout,
    )


def unpack(packed: PackedWeight, *, k: int, weight_dtype: str) -> PackedWeight:
    """The inverse of `pack`, with `columns` undone and scales one a row at least.

    What remains of a `g_idx` is `columns`: column `columns[j]` was in group `j // group_size`.
    """
    if packed.layout == "natural":
        return packed
    n = packed.scales.shape[1]
    codes = fragments.unpack(packed.codes, n=n, k=k, weight_dtype=weight_dtype)
    if packed.columns is not None:
        values = unpack_int4(codes, k) if weight_dtype == "int4" else codes
        values = jnp.zeros_like(values).at[:, packed.columns].set(values)
        codes = pack_int4(values) if weight_dtype == "int4" else values
    return PackedWeight(
        codes=codes,
        scales=packed.scales.T,
        zeros=None if packed.zeros is None else packed.zeros.T.astype(jnp.int16),
        columns=packed.columns,
        layout="natural",
    )


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    weight_dtype: str,
    group_size: GroupSize = None,
    g_idx: jax.Array | None = None,
    columns: jax.Array | None = None,
    layout: str = "natural",
    input_scale: jax.Array | None = None,
    input_zero: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: jnp.dtype | type | None = None,
    partial_sums: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """`x · dequantize(codes)ᵀ + bias`.

    Args:
        x: `[..., K]`. Float for weight-only schemes. int8 or float8_e4m3fn codes where the
            activations are quantized too; then `input_scale` is required.
        codes: int8 or float8_e4m3fn `[N, K]`; 4-bit codes as uint8 `[N, ceil(K/2)]`, see
            `packing`. With another `layout`, codes, scales and zeros as `pack` returns them.
        scales: `[A, B]`, any float: one per tensor `[1, 1]`, row `[N, 1]`, group `[N, ceil(K/g)]`
            or block `[ceil(N/r), ceil(K/c)]`.
        zeros: int16 like `scales`, in the units of the signed codes; None: all zero.
        weight_dtype: "int4", "int8", "float8_e4m3fn" or "float4_e2m1fn".
        group_size: columns per scale, or `(rows, columns)`; None: one scale along K.
        g_idx: int32 `[K]`, the group of each column where groups are not consecutive.
        columns: int32 `[K]`, the order in which packed codes take the columns of x; see `pack`.
        layout: "natural", "wgmma4" or "wgmma8".
        input_scale: float32, `[]` per tensor, `[..., 1]` per token, `[..., K/g]` per token group.
        input_zero: zero point of int8 activations, shaped like `input_scale`; None: zero.
        bias: `[N]`, added in float32.
        out_dtype: of the result; None: `x.dtype`, or float32 where `x` holds codes.
        partial_sums: leave it to the caller to add up what there may be of partial sums, and to
            round. Not with a bias.
        backend: "reference" (the oracle), "xla", "pallas" (kernels for Hopper), "interpret" (the
            same kernels simulated on the CPU), or "auto": the fastest that runs here.

    Returns:
        `[..., N]`. Sums, scales and bias are float32 (int32 for int8 x int8); rounded once. With
        `partial_sums` `[S, ..., N]`, float32, or if S is 1 `out_dtype`.

    Raises:
        ValueError: arguments that do not fit together.
        NotImplementedError: a named backend that cannot run this.
    """
    check_backend(backend)
    if partial_sums and bias is not None:
        raise ValueError("partial_sums with a bias, which is added to their sum")
    k = x.shape[-1]
    _check(x, codes, weight_dtype, input_scale, layout)
    if columns is not None:
        x = x[..., columns]
    if out_dtype is None:
        out_dtype = jnp.float32 if input_scale is not None else x.dtype
    problem = None
    if backend in ("pallas", "interpret") or (backend == "auto" and kernels_run_here()):
        try:
            problem = pallas.problem_of(
                x,
                codes,
                scales,
                weight_dtype=weight_dtype,
                group_size=group_size,
                g_idx=g_idx,
                input_scale=input_scale,
                input_zero=input_zero,
                layout=layout,
            )
        except NotImplementedError:
            if backend != "auto":
                raise
        if problem is not None and backend == "auto" and pallas.xla_is_faster(problem):
            problem = None
    if problem is not None:
        sums = pallas.partial_sums(
            x,
            codes,
            scales,
            zeros,
            problem=problem,
            input_scale=input_scale,
            out_dtype=out_dtype if bias is None else jnp.float32,
            interpret=backend == "interpret",
        )
    else:
        if layout != "natural":
            packed = PackedWeight(
                codes=codes, scales=scales, zeros=zeros, columns=None, layout=layout
            )
            natural = unpack(packed, k=k, weight_dtype=weight_dtype)
            codes, scales, zeros = natural.codes, natural.scales, natural.zeros
        implementation = reference if backend == "reference" else xla
        sums = implementation.quantized_matmul(
            x,
            codes,
            scales,
            zeros,
            weight_dtype=weight_dtype,
            group_size=group_size,
            g_idx=g_idx,
            input_scale=input_scale,
            input_zero=input_zero,
        )[None]
    if partial_sums:
        return sums if sums.shape[0] > 1 else sums.astype(out_dtype)
    out = xla.add_up(sums)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(out_dtype)


def _check(
    x: jax.Array, codes: jax.Array, weight_dtype: str, input_scale: jax.Array | None, layout: str
) -> None:
    k = x.shape[-1]
    if weight_dtype not in _STORED_AS:
        raise ValueError(f"weight_dtype={weight_dtype!r}; use one of {', '.join(_STORED_AS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if layout != "natural":
        blocks = -(-k // fragments.COLUMNS)
        words = 2 * (4 if layout == "wgmma4" else 8)
        if (
            codes.dtype != jnp.int32
            or codes.ndim != 4
            or codes.shape[1:] != (blocks, words, fragments.THREADS)
            or fragments.LAYOUTS.get(weight_dtype) != layout
        ):
            raise ValueError(
                f"{weight_dtype} codes of layout={layout!r} for K={k} must be int32 "
                f"[ceil(N/64), {blocks}, {words}, {fragments.THREADS}], got {codes.dtype} "
                f"{list(codes.shape)}"
            )
    else:
        columns = -(-k // 2) if weight_dtype in ("int4", "float4_e2m1fn") else k
        if codes.dtype != _STORED_AS[weight_dtype] or codes.ndim != 2 or codes.shape[1] != columns:
            raise ValueError(
                f"{weight_dtype} codes for K={k} must be {jnp.dtype(_STORED_AS[weight_dtype])} "
                f"[N, {columns}], got {codes.dtype} {list(codes.shape)}"
            )
    if (x.dtype in (jnp.int8, jnp.float8_e4m3fn)) != (input_scale is not None):
        raise ValueError(
            f"x is {x.dtype} and input_scale is {'missing' if input_scale is None else 'given'}: "
            "codes need their scale, floats have none"
        )
