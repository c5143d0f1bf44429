"""A quantized weight: codes, scales and whatever else its scheme needs to be read as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qllama_kernels import dispatch, reference

from qllama.quantization.scheme import QuantScheme

Array = Any  # np.ndarray on the host, jax.Array on a device

_CODE_DTYPE = {"int4": "uint8", "float4_e2m1fn": "uint8", "int8": "int8"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QTensor:
    """The quantized weight `[N, K]` of one Linear. Arrays are numpy on the host, jax on a device.

    Always true, and enforced by `validate`:

    - the weight is `(code - zero) * scale`, with block `(n // r, k // c)` of `scales` and `zeros`,
      where `(r, c) = scheme.scale_block(shape)`; with `g_idx`, column k is in group `g_idx[k]`;
    - `codes` is int8 or float8_e4m3fn `[N, K]`, or uint8 `[N, ceil(K/2)]` for 4-bit types, two
      codes to a byte, the even column low (`qllama_kernels.packing`);
    - `scales` is `scheme.scale_shape(shape)`, in the dtype of the checkpoint, finite, not negative;
    - `zeros` is int16 like `scales`, present just when the scheme is asymmetric. One value above
      the signed code range is allowed: GPTQ v1 can store it;
    - `g_idx` is int32 `[K]`, only for strategy "group", only when not simply `k // group_size`;
      a part of the columns of such a weight keeps the scales and zeros of all groups;
    - `layout` is "natural": all of the above is said of it. `packed` gives another one, that of a
      kernel (`qllama_kernels.dispatch.pack`), with the `columns` in which it takes its input;
    - `input_scale` is a float32 scalar, present just when activations are static; `input_zero` an
      int8 scalar, present just when they are asymmetric too.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    g_idx: Array | None = None
    input_scale: Array | None = None
    input_zero: Array | None = None
    columns: Array | None = None
    scheme: QuantScheme = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})
    layout: str = field(default="natural", metadata={"static": True})

    @property
    def group_size(self) -> tuple[int, int]:
        """`(rows, columns)` that share a scale, as the kernels take it."""
        return self.scheme.scale_block(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
        """The weight `[N, K]`: in float32, rounded once to `dtype`. Natural layout only."""
        if self.layout != "natural":
            raise ValueError(f"a weight in layout {self.layout!r} is for its kernel alone")
        return _dequantize(
            self.codes,
            self.scales,
            self.zeros,
            self.g_idx,
            k=self.shape[1],
            weight_dtype=self.scheme.weight_dtype,
            group_size=self.group_size,
            dtype=jnp.dtype(dtype),
        )

    def packed(self) -> "QTensor":
        """The same weight, on the device, in the layout its kernel wants. Once, at load.

        Raises:
            NotImplementedError: no kernel takes such a weight.
        """
        packed = dispatch.pack(
            self.codes,
            self.scales,
            self.zeros,
            k=self.shape[1],
            weight_dtype=self.scheme.weight_dtype,
            group_size=self.group_size,
            g_idx=self.g_idx,
            quantized_input=self.scheme.activations is not None,
        )
        return replace(
            self,
            codes=packed.codes,
            scales=packed.scales,
            zeros=packed.zeros,
            g_idx=self.g_idx if packed.layout == "natural" else None,
            columns=packed.columns,
            layout=packed.layout,
        )

    def validate(self) -> None:
        """Raise `ValueError` unless the invariants above hold. Reads values: host arrays only."""
        n, k = self.shape
        scheme = self.scheme
        dtype = _CODE_DTYPE.get(scheme.weight_dtype, scheme.weight_dtype)
        columns = -(-k // 2) if scheme.bits == 4 else k
        _expect("codes", self.codes, dtype, (n, columns))
        grid = scheme.scale_shape(self.shape)
        if self.g_idx is not None and self.scales.ndim == 2:
            grid = grid[0], max(grid[1], self.scales.shape[1])
        _expect("scales", self.scales, None, grid)
        _check_scales(np.asarray(self.scales, np.float32))
        if (self.zeros is not None) == scheme.symmetric:
            raise ValueError(f"symmetric={scheme.symmetric} but zeros are {_presence(self.zeros)}")
        if self.zeros is not None:
            _expect("zeros", self.zeros, "int16", grid)
            low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)
            zeros = np.asarray(self.zeros)
            if zeros.size and (zeros.min() < low or zeros.max() > high):
                raise ValueError(
                    f"zero points span [{zeros.min()}, {zeros.max()}], outside [{low}, {high}]"
                )
        if self.g_idx is not None:
            _expect("g_idx", self.g_idx, "int32", (k,))
            g_idx = np.asarray(self.g_idx)
            if k and (g_idx.min() < 0 or g_idx.max() >= grid[1]):
                raise ValueError(
                    f"g_idx spans [{g_idx.min()}, {g_idx.max()}] but there are {grid[1]} groups"
                )
            largest = int(np.bincount(g_idx, minlength=1).max())
            if scheme.group_size is None or largest > scheme.group_size:
                raise ValueError(
                    f"g_idx puts {largest} columns in one group of {scheme.group_size}"
                )
        acts = scheme.activations
        static = acts is not None and not acts.dynamic
        if static != (self.input_scale is not None):
            raise ValueError(
                f"static activations: {static}, but input_scale is {_presence(self.input_scale)}"
            )
        if self.input_scale is not None:
            _expect("input_scale", self.input_scale, "float32", ())
            scale = float(np.asarray(self.input_scale))
            if not np.finfo(np.float32).tiny <= scale < np.inf:  # else 1 / scale is infinite
                raise ValueError(
                    f"input_scale is {scale}; it must be finite, positive and no subnormal number"
                )
        offset = static and acts is not None and not acts.symmetric
        if offset != (self.input_zero is not None):
            raise ValueError(
                f"asymmetric static activations: {offset}, but input_zero is "
                f"{_presence(self.input_zero)}"
            )


@partial(jax.jit, static_argnames=("k", "weight_dtype", "group_size", "dtype"))
def _dequantize(
    codes: Array,
    scales: Array,
    zeros: Array | None,
    g_idx: Array | None,
    *,
    k: int,
    weight_dtype: str,
    group_size: tuple[int, int],
    dtype: jnp.dtype,
) -> jax.Array:
    # One program, so that the float32 steps between are never whole arrays in memory.
    weight = reference.dequantize(
        codes,
        scales,
        zeros,
        k=k,
        weight_dtype=weight_dtype,
        group_size=group_size,
        g_idx=g_idx,
    )
    return weight.astype(dtype)


def stack_rows(tensors: Sequence[QTensor]) -> QTensor | None:
    """One QTensor whose rows are those of all `tensors`, host arrays; None where not exact.

    Exact means: every weight and every quantized input stays what it was. Per-tensor scales become
    per-row ones. Not exact, and left to separate products: different schemes, scale dtypes,
    column groups or input scales, and blocks that would straddle two tensors.
    """
    first = tensors[0]
    scheme = first.scheme
    for other in tensors[1:]:
        if other.scheme != scheme or other.shape[1] != first.shape[1]:
            return None
        if other.scales.dtype != first.scales.dtype:
            return None
        for name in ("g_idx", "input_scale", "input_zero"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                return None
            if mine is not None and not np.array_equal(mine, theirs):
                return None
    if scheme.block_size is not None and any(
        t.shape[0] % scheme.block_size[0] for t in tensors[:-1]
    ):
        return None
    scales = [t.scales for t in tensors]
    zeros = [t.zeros for t in tensors if t.zeros is not None]
    if scheme.strategy == "tensor":
        scheme = replace(scheme, strategy="channel")
        scales = [np.broadcast_to(t.scales, (t.shape[0], 1)) for t in tensors]
        zeros = [np.broadcast_to(t.zeros, (t.shape[0], 1)) for t in tensors if t.zeros is not None]
    return replace(
        first,
        codes=np.concatenate([t.codes for t in tensors]),
        scales=np.concatenate(scales),
        zeros=np.concatenate(zeros) if zeros else None,
        scheme=scheme,
        shape=(sum(t.shape[0] for t in tensors), first.shape[1]),
    )


def _presence(array: Array | None) -> str:
    return "missing" if array is None else "present"


def _expect(name: str, array: Array, dtype: str | None, shape: tuple[int, ...]) -> None:
    if (dtype is not None and array.dtype != jnp.dtype(dtype)) or tuple(array.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype or 'float'} {list(shape)}, got {array.dtype} "
            f"{list(array.shape)}"
        )


def _check_scales(scales: np.ndarray) -> None:
    bad = ~np.isfinite(scales) | (scales < 0)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{int(bad.sum())} of {scales.size} scales are NaN, infinite or negative, the first "
            f"at {list(first)}: {scales[first]}"
        )
