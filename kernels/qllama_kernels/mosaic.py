# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""What the Mosaic GPU kernels share: turning fragments into floats, and `wgmma` in both worlds.

Interpret mode (the CPU simulator) knows no operands in registers, so there they are staged through
shared memory; everything else runs the same lines.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qllama_kernels import fragments
from qllama_kernels.fragments import COLUMNS, ROWS

COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


# What one CTA can use on Hopper, less what Mosaic keeps for barriers and alignment.
SHARED_MEMORY = 232448 - 2048


def k_major(
    columns: int, dtype: jnp.dtype
) -> tuple[plgpu.TilingTransform | plgpu.SwizzleTransform, ...]:
    """Transforms of a `[rows, K]` operand of `wgmma` in shared memory, read `columns` at a time."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * itemsize)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def load_fragments(ref: jax.Array, bits: int, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """Shared memory int32 `[2 * bits, 128]`, one tile -> `code + bias` `[64, 128]` in registers."""
    if interpret:
        return fragments.values_plus_bias(ref[...], bits, dtype)
    layout = plgpu.Layout.WG_STRIDED((2 * bits, 128), vec_size=4)
    return _fragment_values(plgpu.load(ref, layout=layout), bits, dtype)


def _fragment_values(words: jax.Array, bits: int, dtype: jnp.dtype) -> jax.Array:
    """A code of n bits, or-ed into the low mantissa bits of a power of two, is that power plus the
    code as an unsigned number; flipping its top bit makes it the power plus 2^(n-1) plus the signed
    code. bfloat16 has 7 mantissa bits: enough for 4-bit codes; for 8-bit ones the sign bit goes
    through a second number and comes off by one subtraction, which leaves no bias.
    """
    layout = plgpu.Layout.WG_STRIDED(words.shape, vec_size=4)
    half = dtype == jnp.float16
    shape = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=shape)
    def convert(_, array):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.F16Type.get() if half else ir.BF16Type.get())
        single = ir.VectorType.get((1,), i32)

        def constant(value: int) -> ir.Value:
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        # An instruction takes one constant. ptxas would fetch the second one anew for every word;
        # added to what it cannot know to be zero, it stays in a register.
        zero = arith.shrui(llvm.inline_asm(i32, [], "mov.u32 $0, %smid;", "=r"), constant(20))

        def field(word: ir.Value, mask: int, flip: int) -> ir.Value:
            opaque = arith.addi(zero, constant(mask))
            word = arith.xori(arith.andi(word, opaque), constant(flip))
            return vector.bitcast(pair, vector.broadcast(single, word))

        def value(word: ir.Value) -> ir.Value:
            if bits == 4:
                return field(word, 0x000F000F, 0x64086408 if half else 0x43084308)
            if half:
                return field(word, 0x00FF00FF, 0x64806480)
            magnitude = field(word, 0x007F007F, 0x43004300)
            return arith.subf(magnitude, field(word, 0x00800080, 0x43004300))

        registers = np.empty(fragmented_array.WGMMA_LAYOUT.registers_shape(shape.shape), object)
        for j, u, h in np.ndindex(8, 2, 2):
            r, shift = (j, 4 * (h + 2 * u)) if bits == 4 else (2 * j + u, 8 * h)
            word = vector.extract(
                array.registers[r // 4], dynamic_position=[], static_position=[r % 4]
            )
            word = arith.shrui(word, constant(shift)) if shift else word
            registers[0, 2 * j + u, 0, 0, h, 0, 0, 0, 0] = value(word)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
        )

    return convert(words)


def load_rows(ref: jax.Array) -> jax.Array:
    """One value per row of a tile, `[64]` in any memory, where `wgmma` keeps its rows."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_columns(ref: jax.Array) -> jax.Array:
    """One value per token, `[tokens]` in any memory, where `wgmma` keeps its columns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def fragment_products(
    acc: jax.Array,
    values: list[jax.Array],
    scales: list[jax.Array],
    zeros: list[jax.Array],
    tokens: Callable[[int, int], jax.Array],
    *,
    bias: float,
    group_size: int | None,
    staging: jax.Array | None,
) -> jax.Array:
    """`acc + sum of scale * (code - zero) · tokens` over the 128-column runs in `values`.

    Scales go on the float32 sums of their group, where they cost one multiplication a sum.

    Args:
        acc: float32 `[64, tokens]`.
        values: `code + bias`, `[64, 128]` each, from `load_fragments`.
        scales: one `[64]` per group, from `load_rows`; empty: none.
        zeros: likewise.
        tokens: `tokens(start, size)` is the operand `[size, tokens]` in shared memory.
        bias: what `values` have too much.
        group_size: columns per scale; None: as many as there are.
        staging: shared memory for the left operand, in interpret mode.
    """
    size = min(group_size or COLUMNS, COLUMNS)
    starts = range(0, len(values) * COLUMNS, size)

    def operands(i: int) -> tuple[jax.Array, jax.Array]:
        start = starts[i]
        a = values[start // COLUMNS][:, start % COLUMNS : start % COLUMNS + size]
        if zeros:
            zero = zeros[start // group_size].astype(jnp.float32) + bias
            a = a - lax.broadcast_in_dim(zero.astype(a.dtype), a.shape, (0,))
        elif bias:
            a = a - jnp.asarray(bias, a.dtype)
        if staging is not None:
            staging[...] = a
            plgpu.commit_smem()
            a = staging
        return a, tokens(start, size)

    def scaled(sums: jax.Array, i: int) -> jax.Array:
        if not scales:
            return sums
        scale = scales[starts[i] // group_size].astype(jnp.float32)
        return sums * lax.broadcast_in_dim(scale, sums.shape, (0,))

    return add_products(acc, len(starts), operands, scaled)


def add_products(
    acc: jax.Array,
    count: int,
    operands: Callable[[int], tuple[jax.Array, jax.Array]],
    scaled: Callable[[jax.Array, int], jax.Array],
) -> jax.Array:
    """`acc + sum of scaled(left · right, i)` over `count` products, each in sums of its own.

    Args:
        acc: float32 `[64, tokens]`.
        count: how many products.
        operands: product number -> left `[64, k]` and right `[k, tokens]` of `wgmma`.
        scaled: its float32 sums and the number -> what to add.
    """

    def products(*partial: jax.Array) -> jax.Array:
        total = acc
        for i, ref in enumerate(partial):
            plgpu.wgmma(ref, *operands(i))
            if i:  # while this product runs, take in the one before
                done = plgpu.wgmma_accumulator_load(partial[i - 1], wait_n=1)
                total = total + scaled(done, i - 1)
        return total + scaled(partial[-1][...], count - 1)

    return pl.run_scoped(products, *[plgpu.ACC(acc.shape, jnp.float32)] * count)


def row_slice(row_scales: jax.Array, start: jax.Array) -> jax.Array:
    """The scales of one tile from `[1, N]`, N % 64 == 0; `[1, 1]` serves all. A tile beyond N,
    of which nothing is written, gets those of the last."""
    if row_scales.shape == (1, 1):
        return row_scales
    return row_scales.at[0, pl.ds(jnp.minimum(start, row_scales.shape[1] - ROWS), ROWS)]


def zero_sums(block_m: int) -> jax.Array:
    """float32 zeros `[64, block_m]`, where `wgmma` keeps its sums."""
    return plgpu.layout_cast(jnp.zeros((ROWS, block_m), jnp.float32), plgpu.Layout.WGMMA)


def scale_sums(
    sums: jax.Array,
    row_scales: jax.Array | None,
    input_scale: jax.Array | None,
) -> jax.Array:
    """int32 or float32 sums `[64, tokens]` -> float32, times one scale a row and one a token."""
    sums = sums.astype(jnp.float32)
    if input_scale is not None:
        if input_scale.shape == (1,):
            sums = sums * input_scale[0]
        else:
            per_token = load_columns(input_scale)
            sums = sums * lax.broadcast_in_dim(per_token, sums.shape, (1,))
    if row_scales is not None and row_scales.shape == (1, 1):
        sums = sums * row_scales[0, 0].astype(jnp.float32)
    elif row_scales is not None:
        scale = load_rows(row_scales).astype(jnp.float32)
        sums = sums * lax.broadcast_in_dim(scale, sums.shape, (0,))
    return sums
