# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""What lies between the products, in Pallas Mosaic GPU (sm_90a): one CTA a row.

A row is cut into pieces, one for each warp, that stay in registers from the first read to the last
write. A warp reduces its own piece by shuffles; the results of all pieces meet in shared memory.
(To reduce over a whole warpgroup, Mosaic would take scratch memory that all warpgroups share.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array

from qllama_kernels import mosaic
from qllama_kernels.codes import float8_scale, int8_scale, to_float8, to_int8
from qllama_kernels.xla import add_up

WARPS = 4  # of a warpgroup
LANES = 32
MAX_WARPGROUPS = 8  # of a CTA
MAX_SUMMED = 512  # columns of a piece of gates and ups; more leave no registers for their addends


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a row is spread over the warps of a CTA."""

    pieces: int
    columns: int  # of a piece
    vector: int  # neighbouring columns in one thread

    @property
    def warpgroups(self) -> int:
        """If they have more warps than there are pieces, the last one begins within those of the
        one before, and both do the same."""
        return -(-self.pieces // WARPS)

    @property
    def layout(self) -> plgpu.Layout:
        """Of `[WARPS, columns]` in the registers of a warpgroup."""
        tiling = fragmented_array.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def cut_row(columns: int) -> Cut:
    """The widest vectors, then the smallest pieces of which there are not too many.

    Raises:
        NotImplementedError: there is no such cut.
    """
    for vector in (8, 4, 2, 1):
        step = LANES * vector
        for piece in range(step, columns // WARPS + 1, step):
            pieces, rest = divmod(columns, piece)
            if not rest and pieces <= WARPS * MAX_WARPGROUPS:
                return Cut(pieces=pieces, columns=piece, vector=vector)
    raise NotImplementedError(
        f"rows of {columns} columns; the kernels take those that divide into {WARPS} to "
        f"{WARPS * MAX_WARPGROUPS} pieces of a multiple of {LANES}"
    )


class _Row:
    """One row in the hands of one warpgroup. Values are float32 `[WARPS, columns]`."""

    def __init__(self, cut: Cut, partials: jax.Array, met: jax.Array) -> None:
        """`partials`: shared float32 `[n, pieces]`, `met`: n barriers, for n calls of `reduce`."""
        self.cut = cut
        self.partials = partials
        self.met = met
        self.reduced = 0
        self.index = lax.axis_index("row")
        self.warpgroup = lax.axis_index("wg")
        self.first = jnp.minimum(self.warpgroup * WARPS, cut.pieces - WARPS)

    def load(self, ref: jax.Array, start: int = 0) -> jax.Array:
        """From `[pieces, columns]`, which begins `start` pieces into the ref."""
        ref = ref.at[pl.ds(self.first + start, WARPS)]
        return plgpu.load(ref, layout=self.cut.layout, optimized=False).astype(jnp.float32)

    def load_sum(self, addends: jax.Array, dtype: jnp.dtype, start: int = 0) -> jax.Array:
        """`[S, M, pieces, columns]` added up over S, rounded to `dtype`."""
        total = self.load(addends.at[0, self.index], start)
        for s in range(1, addends.shape[0]):
            total = total + self.load(addends.at[s, self.index], start)
        return rounded(total, dtype)

    def store(self, ref: jax.Array, values: jax.Array) -> None:
        """To `[M, pieces, columns]`."""
        ref[self.index, pl.ds(self.first, WARPS)] = values.astype(ref.dtype)

    def reduce(
        self,
        values: jax.Array,
        over: Callable[..., jax.Array],
        both: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """A scalar of the whole row: `over(values, axis)` of each piece, `both` of any two."""
        partials, met = self.partials.at[self.reduced], self.met.at[self.reduced]
        self.reduced += 1
        partials[pl.ds(self.first, WARPS)] = over(values, axis=1)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        result = partials[0]
        for piece in range(1, self.cut.pieces):
            result = both(result, partials[piece])
        return result

    def store_output(
        self, values: jax.Array, outputs: list[jax.Array], given_scale: jax.Array | None
    ) -> None:
        """As they are, or as codes; `outputs` and `given_scale` as for `_run`."""
        out, *scales = outputs
        if given_scale is not None:
            values = to_float8(values * (1.0 / given_scale[0]))
        elif scales:
            absmax = self.reduce(jnp.abs(values), jnp.max, jnp.maximum)
            if out.dtype == jnp.int8:
                scale = int8_scale(absmax)
                values = to_int8(values, absmax)
            else:
                scale = float8_scale(absmax)
                values = to_float8(values * (1.0 / scale))

            @pl.when(self.warpgroup == 0)
            def _():
                scales[0][self.index] = scale

        self.store(out, values)


def rounded(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32, but only numbers that `dtype` has."""
    return values.astype(dtype).astype(jnp.float32)


def residual_norm(
    x: jax.Array,
    addends: jax.Array | None,
    weight: jax.Array,
    given_scale: jax.Array | None = None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> list[jax.Array]:
    """Sums of the product before, the residual stream, the norm, and codes for the product after.

    Args:
        x: `[M, D]`, the residual stream, bfloat16, float16 or float32.
        addends: `[S, M, D]`, float32 or the dtype of x, what is to be added to it; or None.
        weight: `[D]`, of the norm, in the dtype of x.
        given_scale: float32 `[1]`, of float8 codes; None: each row gets its own.
        eps: of the norm.
        out_dtype: that of x, or int8 or float8_e4m3fn for codes.
        interpret: simulate on the CPU.

    Returns:
        x with the addends, if there are any; the normed rows or their codes, `[M, D]`; and, where
        codes have no given scale, float32 `[M]`, a scale each.

    Raises:
        NotImplementedError: rows that cannot be cut.
    """
    dtype = x.dtype
    cut = cut_row(x.shape[1])

    def kernel(row, inputs, given_scale, outputs):
        x_ref, weight_ref, *addend_refs = inputs
        values = row.load(x_ref.at[row.index])
        weights = row.load(weight_ref)
        if addend_refs:
            values = rounded(values + row.load_sum(addend_refs[0], dtype), dtype)
            row.store(outputs[0], values)
            outputs = outputs[1:]
        mean = row.reduce(values * values, jnp.sum, lax.add) / x.shape[1]
        if dtype == jnp.float32:
            inverse = 1.0 / jnp.sqrt(mean + eps)
        else:
            inverse = lax.rsqrt(mean + eps)
        values = rounded(weights * rounded(values * inverse, dtype), dtype)
        row.store_output(values, outputs, given_scale)

    inputs = [_pieces(cut, x), _pieces(cut, weight)]
    summed = []
    if addends is not None:
        inputs.append(_pieces(cut, addends))
        summed.append(dtype)
    return _run(kernel, cut, x.shape[0], inputs, given_scale, [*summed, out_dtype], 1, interpret)


def swiglu(
    gate_up: jax.Array,
    given_scale: jax.Array | None = None,
    *,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> list[jax.Array]:
    """`silu(gate) * up`, rounded to `dtype` where a model in that dtype would.

    Args:
        gate_up: `[S, M, 2F]`, float32 or `dtype`, to be added up; the gates come first.
        given_scale, out_dtype, interpret: as for `residual_norm`.
        dtype: bfloat16, float16 or float32.

    Returns:
        `[M, F]`, and scales as from `residual_norm`.

    Raises:
        NotImplementedError: rows that cannot be cut.
    """
    cut = cut_row(gate_up.shape[2] // 2)
    if cut.columns > MAX_SUMMED:
        gate_up = add_up(gate_up)[None]

    def kernel(row, inputs, given_scale, outputs):
        gate = row.load_sum(inputs[0], dtype)
        up = row.load_sum(inputs[0], dtype, start=cut.pieces)
        silu = rounded(gate * (1.0 / (1.0 + jnp.exp(-gate))), dtype)
        row.store_output(rounded(silu * up, dtype), outputs, given_scale)

    inputs = [_pieces(cut, gate_up)]
    return _run(kernel, cut, gate_up.shape[1], inputs, given_scale, [out_dtype], 0, interpret)


def quantize(
    x: jax.Array,
    given_scale: jax.Array | None = None,
    *,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> list[jax.Array]:
    """Codes of `[M, K]` and scales; arguments, results and errors as for `residual_norm`."""
    cut = cut_row(x.shape[1])

    def kernel(row, inputs, given_scale, outputs):
        row.store_output(row.load(inputs[0].at[row.index]), outputs, given_scale)

    inputs = [_pieces(cut, x)]
    return _run(kernel, cut, x.shape[0], inputs, given_scale, [out_dtype], 0, interpret)


def _pieces(cut: Cut, array: jax.Array) -> jax.Array:
    return array.reshape(*array.shape[:-1], -1, cut.columns)


def _run(
    body: Callable[..., None],
    cut: Cut,
    m: int,
    inputs: list[jax.Array],
    given_scale: jax.Array | None,
    out_dtypes: list[jnp.dtype],
    reductions: int,
    interpret: bool,
) -> list[jax.Array]:
    """A CTA for each of `m` rows.

    Args:
        body: called with a `_Row`, the refs of `inputs`, that of `given_scale`, and those of the
            outputs: a `[m, pieces, columns]` for each of `out_dtypes`, and, if the last is of codes
            with no given scale, a float32 `[m]`.
        cut: of the row.
        m: rows.
        inputs: what the kernel reads.
        given_scale: float32 `[1]` or None.
        out_dtypes: see `body`.
        reductions: that the body makes, besides that for a scale.
        interpret: simulate on the CPU.
    """
    scaled = jnp.dtype(out_dtypes[-1]).itemsize == 1 and given_scale is None
    outputs = [jax.ShapeDtypeStruct((m, cut.pieces, cut.columns), dtype) for dtype in out_dtypes]
    if scaled:
        outputs.append(jax.ShapeDtypeStruct((m,), jnp.float32))
    scales = [] if given_scale is None else [given_scale]
    reductions += scaled

    def row_kernel(*refs):  # its name is what a profile shows
        refs = list(refs)
        inputs_here = [refs.pop(0) for _ in inputs]
        scale = refs.pop(0) if scales else None
        outputs_here = [refs.pop(0) for _ in outputs]
        body(_Row(cut, *(refs or (None, None))), inputs_here, scale, outputs_here)

    scratch = [
        plgpu.SMEM((reductions, cut.pieces), jnp.float32),
        plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=reductions),
    ]
    results = plgpu.kernel(
        row_kernel,
        out_type=outputs,
        scratch_types=scratch if reductions else [],
        grid=(m,),
        grid_names=("row",),
        num_threads=cut.warpgroups,
        thread_name="wg",
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*inputs, *scales)
    return [out.reshape(m, -1) if out.ndim > 1 else out for out in results]
