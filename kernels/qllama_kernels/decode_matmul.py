# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Products of few tokens in Pallas Mosaic GPU (sm_90a): bound by how fast the weights stream in.

`out[M, N] = x[M, K] · weight[N, K]ᵀ` with the operands swapped: 64 rows of the weight are the left
operand of `wgmma`, 8 to 64 tokens the right one, so that no tensor-core row is padding.

One CTA fills an SM and stays: it reads its slice of `x` once and keeps it in shared memory, then
walks over its 64-row tiles. Its warpgroups each take every fourth (say) run of 128 columns of a
tile, through a ring of TMA stages of their own, and never wait for one another until the tile is
done; then one of them, in turn, adds up the others' sums, scales, and writes.

Weights come as fragments (`fragments`: 4 or 8 bit, made floats in registers) or, for 8-bit tokens,
as they lie in the checkpoint.
"""

from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qllama_kernels import fragments, mosaic
from qllama_kernels.fragments import COLUMNS, ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How a product is cut up. Any choice gives the same result up to the order of its sums."""

    block_m: int  # tokens: 8, 16, 24, ... 64
    ctas: int  # CTAs of a split; each takes every `ctas`-th tile of 64 rows
    splits: int = 1  # slices of K; more than one leaves partial sums to the caller
    warpgroups: int = 4  # of a CTA
    blocks: int = 1  # runs of 128 columns in a stage
    stages: int = 4  # TMA loads in flight, per warpgroup

    def k_slice(self, k: int) -> int:
        """Columns of a CTA: whole steps, the last ones perhaps beyond K (and read as zeros)."""
        step = self.splits * self.warpgroups * self.blocks * COLUMNS
        return -(-k // step) * (step // self.splits)

    def shared_memory(self, k: int, *, bits: int, x_bytes: int) -> int:
        """Bytes of shared memory, of at most `mosaic.SHARED_MEMORY`, scales and barriers aside."""
        x = self.block_m * self.k_slice(k) * x_bytes
        ring = self.warpgroups * self.stages * self.blocks * ROWS * COLUMNS * bits // 8
        sums = 2 * (self.warpgroups - 1) * ROWS * self.block_m * 4
        out = self.warpgroups * self.block_m * ROWS * 4
        return x + ring + sums + out


def decode_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    *,
    n: int,
    group_size: int | None,
    config: DecodeConfig,
    out_dtype: jnp.dtype | type,
    interpret: bool = False,
) -> jax.Array:
    """The product, or, if `config.splits > 1`, its float32 partial sums: add up the first axis.

    Args:
        x: `[M, K]`, M <= block_m, M a multiple of 8 or less than 8, K a multiple of 128. bfloat16
            or float16 for fragments, int8 or float8_e4m3fn (like the weight) otherwise.
        weight: fragments int32 `[N'/64, K/128, 8 or 16, 128]`, or int8 / float8_e4m3fn `[N, K]`
            with N a multiple of 8.
        scales: `[K/g, N']` for groups of g = 32, 64 or 128 columns (fragments only), `[1, N']`
            for one per row. N' is N rounded up to 64.
        zeros: fragments only, in the dtype of x (whole numbers), like `scales`; None: all zero.
        input_scale: float32 `[]`, or `[M]`, one per token.
        n: N.
        group_size: None, 32, 64 or 128.
        out_dtype: of the result where there are no partial sums.
        interpret: simulate on the CPU.

    Returns:
        `[splits, M, N]`.
    """
    m, k = x.shape
    c = config
    bits = 8 if weight.dtype != jnp.int32 else weight.shape[2] // 2
    in_registers = weight.dtype == jnp.int32
    tiles = -(-n // ROWS)
    k_slice = c.k_slice(k)
    step_columns = c.warpgroups * c.blocks * COLUMNS
    steps = k_slice // step_columns  # of one tile
    chunk = min(group_size or COLUMNS, COLUMNS)  # columns that one product covers
    per_step = c.blocks * COLUMNS // group_size if group_size else 0
    bias = fragments.bias(bits, x.dtype) if in_registers else 0.0
    sum_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    result_dtype = jnp.float32 if c.splits > 1 else out_dtype
    grouped = [g for g in (scales if group_size else None, zeros) if g is not None]
    row_scales = [] if group_size else [scales]
    token_scales = [] if input_scale is None else [jnp.atleast_1d(input_scale)]
    per_token = input_scale is not None and input_scale.ndim > 0

    def kernel(*refs):
        x_ref, weight_ref, *refs = refs
        take = iter(refs)
        grouped_refs = [next(take) for _ in grouped]
        row_ref = next(take) if row_scales else None
        token_ref = next(take) if token_scales else None
        out_ref, x_smem, ring = next(take), next(take), next(take)
        grouped_smem = [next(take) for _ in grouped]
        token_smem = next(take) if per_token else None
        sums_smem, out_smem, x_ready = next(take), next(take), next(take)
        tokens_ready = next(take) if per_token else None
        loaded, summed, freed, *staging = take

        wg = lax.axis_index("wg")
        cta, split = lax.axis_index("cta"), lax.axis_index("split")
        my_tiles = (tiles - cta + c.ctas - 1) // c.ctas
        total = my_tiles * steps

        def fetch(i):
            """Start loading step i of this warpgroup into its slot of the ring."""
            slot = lax.rem(i, c.stages)
            tile = cta + i // steps * c.ctas
            block = ((split * steps + lax.rem(i, steps)) * c.warpgroups + wg) * c.blocks
            arrived = loaded.at[wg * c.stages + slot]
            source = (
                weight_ref.at[tile, pl.ds(block, c.blocks)]
                if in_registers
                else weight_ref.at[
                    pl.ds(tile * ROWS, ROWS), pl.ds(block * COLUMNS, c.blocks * COLUMNS)
                ]
            )
            plgpu.copy_gmem_to_smem(source, ring.at[wg, slot], arrived)
            for ref, smem in zip(grouped_refs, grouped_smem, strict=True):
                first = block * (COLUMNS // group_size)
                source = ref.at[pl.ds(first, per_step), pl.ds(tile * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(source, smem.at[wg, slot], arrived)

        def wait_for_tokens(i):
            """Before step i can use its columns of x; all are there after the first tile."""

            @pl.when(i < steps)
            def _():
                plgpu.barrier_wait(x_ready.at[i])

        def tile_sum_in_registers(i0):
            def step(s, acc):
                i = i0 + s
                slot = lax.rem(i, c.stages)
                wait_for_tokens(i)
                plgpu.barrier_wait(loaded.at[wg * c.stages + slot])
                column = wg * (c.blocks * COLUMNS)
                values = [
                    mosaic.load_fragments(ring.at[wg, slot, b], bits, x.dtype, interpret)
                    for b in range(c.blocks)
                ]
                rows = [
                    [mosaic.load_rows(smem.at[wg, slot, g]) for g in range(per_step)]
                    for smem in grouped_smem
                ]

                @pl.when(i + c.stages < total)
                def _():
                    fetch(i + c.stages)

                return mosaic.fragment_products(
                    acc,
                    values,
                    rows[0] if group_size else [],
                    rows[-1] if zeros is not None else [],
                    lambda start, size: x_smem.at[s, :, pl.ds(column + start, size)].T,
                    bias=bias,
                    group_size=group_size,
                    staging=staging[0].at[wg] if staging else None,
                )

            return lax.fori_loop(0, steps, step, mosaic.zero_sums(c.block_m))

        def tile_sum_in_memory(i0):
            def scoped(acc):
                def step(s, _):
                    i = i0 + s
                    slot = lax.rem(i, c.stages)
                    wait_for_tokens(i)
                    plgpu.barrier_wait(loaded.at[wg * c.stages + slot])
                    column = wg * (c.blocks * COLUMNS)
                    tokens = x_smem.at[s, :, pl.ds(column, c.blocks * COLUMNS)].T
                    plgpu.wgmma(acc, ring.at[wg, slot], tokens)
                    # The product before has left its slot once only this one is in flight.
                    plgpu.wgmma_wait(1)

                    @pl.when((i > 0) & (i - 1 + c.stages < total))
                    def _():
                        fetch(i - 1 + c.stages)

                lax.fori_loop(0, steps, step, None)
                return acc[...]

            return pl.run_scoped(scoped, plgpu.ACC((ROWS, c.block_m), sum_dtype))

        def one_tile(t, _):
            tile = cta + t * c.ctas
            total = (tile_sum_in_registers if in_registers else tile_sum_in_memory)(t * steps)
            leader = lax.rem(t, c.warpgroups)
            half = lax.rem(t, 2)

            # Every warpgroup watches `freed`: a barrier's phases are counted by who waits.
            @pl.when(t >= 2)
            def _():
                plgpu.barrier_wait(freed.at[half])

            @pl.when(wg != leader)
            def _():
                sums_smem[half, lax.rem(wg - leader + c.warpgroups, c.warpgroups) - 1] = total
                plgpu.barrier_arrive(summed.at[leader])

            @pl.when(wg == leader)
            def _():
                plgpu.barrier_wait(summed.at[leader])
                result = total
                for other in range(c.warpgroups - 1):
                    result += plgpu.load(sums_smem.at[half, other], layout=plgpu.Layout.WGMMA)

                @pl.when(t + 2 < my_tiles)
                def _():
                    plgpu.barrier_arrive(freed.at[half])

                result = mosaic.scale_sums(
                    result,
                    mosaic.row_slice(row_ref, tile * ROWS) if row_scales else None,
                    token_smem if per_token else token_ref,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[leader].T[...] = plgpu.layout_cast(
                    result.astype(result_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                # The start of a TMA box need not be known; if it is, so must be its end.
                rows, columns = pl.ds(split * 0, c.block_m), pl.ds(tile * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(out_smem.at[leader], out_ref.at[split, rows, columns])

        @pl.when(wg == 0)
        def _():  # The tokens first, in the order of their use: the weights can wait for them.
            rows = pl.ds(split * 0, c.block_m)
            if per_token:
                plgpu.copy_gmem_to_smem(token_ref.at[rows], token_smem, tokens_ready)
            for piece in range(steps):
                columns = pl.ds(split * k_slice + piece * step_columns, step_columns)
                plgpu.copy_gmem_to_smem(
                    x_ref.at[rows, columns], x_smem.at[piece], x_ready.at[piece]
                )

        for s in range(c.stages):

            @pl.when(s < total)
            def _(s=s):
                fetch(jnp.int32(s))

        if per_token:
            plgpu.barrier_wait(tokens_ready)
        lax.fori_loop(0, my_tiles, one_tile, None)
        plgpu.wait_smem_to_gmem(0)

    smem = plgpu.SMEM
    if in_registers:
        ring_type = smem((c.warpgroups, c.stages, c.blocks, 2 * bits, 128), jnp.int32)
    else:
        ring_type = smem(
            (c.warpgroups, c.stages, ROWS, c.blocks * COLUMNS),
            weight.dtype,
            transforms=mosaic.k_major(COLUMNS, weight.dtype),
        )
    scratch = [
        smem((steps, c.block_m, step_columns), x.dtype, transforms=mosaic.k_major(chunk, x.dtype)),
        ring_type,
        *[smem((c.warpgroups, c.stages, per_step, ROWS), g.dtype) for g in grouped],
        *([smem((c.block_m,), jnp.float32)] if per_token else []),
        smem((2, c.warpgroups - 1, ROWS, c.block_m), sum_dtype),
        smem((c.warpgroups, c.block_m, ROWS), result_dtype),
        plgpu.Barrier(num_barriers=steps),
        *([plgpu.Barrier()] if per_token else []),
        plgpu.Barrier(num_arrivals=1 + len(grouped), num_barriers=c.warpgroups * c.stages),
        plgpu.Barrier(num_arrivals=c.warpgroups - 1, num_barriers=c.warpgroups),
        plgpu.Barrier(num_barriers=2),
    ]
    if interpret and in_registers:
        scratch.append(
            smem(
                (c.warpgroups, ROWS, chunk),
                x.dtype,
                transforms=mosaic.k_major(chunk, x.dtype),
            )
        )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((c.splits, m, n), result_dtype),
        scratch_types=scratch,
        grid=(c.ctas, c.splits),
        grid_names=("cta", "split"),
        num_threads=c.warpgroups,
        thread_name="wg",
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x, weight, *grouped, *row_scales, *token_scales)
