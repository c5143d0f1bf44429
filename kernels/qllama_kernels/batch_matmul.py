# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Products of some dozens to hundreds of tokens in Pallas Mosaic GPU (sm_90a).

`out[M, N] = x[M, K] · weight[N, K]ᵀ`, operands swapped as in `decode_matmul`. Here the tokens are
too many to stay in shared memory, so a CTA streams both: each stage holds a block of `x` and, for
each of its warpgroups, 64 rows of the weight. There is no producer: the first warpgroup refills a
stage when all have left it. Several small CTAs share an SM and hide each other's latency.
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
class BatchConfig:
    """How a product is cut up. Any choice gives the same result up to the order of its sums."""

    block_m: int  # tokens of a CTA: 8, 16, 24, 32, or a multiple of 32 up to 256
    warpgroups: int = 2  # of a CTA, 64 rows of the weight each
    blocks: int = 1  # runs of 128 columns in a stage
    stages: int = 4  # loads in flight
    splits: int = 1  # slices of K; more than one leaves partial sums to the caller

    def shared_memory(self, k: int, *, bits: int, x_bytes: int) -> int:
        """Bytes of shared memory, scales and barriers aside."""
        weight = self.warpgroups * ROWS * bits // 8
        ring = self.stages * self.blocks * COLUMNS * (self.block_m * x_bytes + weight)
        return ring + self.warpgroups * min(self.block_m, 32) * ROWS * 4


def batch_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    *,
    n: int,
    group_size: int | None,
    config: BatchConfig,
    out_dtype: jnp.dtype | type,
    interpret: bool = False,
) -> jax.Array:
    """The product, or, if `config.splits > 1`, its float32 partial sums: add up the first axis.

    Arguments as `decode_matmul`, but M may be larger than `block_m`, and float8 weights may have
    scales by blocks: then `scales` is float32 `[ceil(N/128), K']`, one for 128x128 weights, K'
    being K/128 rounded up to 4, `input_scale` float32 `[K/128, M]`, and `group_size` 128.
    """
    m, k = x.shape
    c = config
    in_registers = weight.dtype == jnp.int32
    bits = weight.shape[2] // 2 if in_registers else 8
    steps = -(-k // (c.splits * c.blocks * COLUMNS))
    chunk = min(group_size or COLUMNS, COLUMNS)
    per_step = c.blocks * COLUMNS // group_size if group_size else 0
    bias = fragments.bias(bits, x.dtype) if in_registers else 0.0
    sum_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    result_dtype = jnp.float32 if c.splits > 1 else out_dtype
    per_block = bool(group_size) and not in_registers
    # What comes with each step: scales of groups of columns, of the weight or of the tokens.
    grouped = [g for g in (scales if group_size else None, zeros) if g is not None]
    grouped = [input_scale] if per_block else grouped
    row_scales = [scales] if per_block or not group_size else []
    token_scales = [] if per_block or input_scale is None else [jnp.atleast_1d(input_scale)]
    per_token = bool(token_scales) and input_scale.ndim > 0
    loads = c.blocks if per_block else len(grouped)
    cta_rows = c.warpgroups * ROWS
    out_m = min(c.block_m, 32)

    def kernel(*refs):
        x_ref, weight_ref, *refs = refs
        take = iter(refs)
        grouped_refs = [next(take) for _ in grouped]
        row_ref = next(take) if row_scales else None
        token_ref = next(take) if token_scales else None
        out_ref, x_ring, ring = next(take), next(take), next(take)
        grouped_ring = [next(take) for _ in grouped]
        token_smem = next(take) if per_token else None
        block_smem = next(take) if per_block else None
        out_smem, loaded, left, scales_ready, *staging = take

        wg = lax.axis_index("wg")
        m0 = lax.axis_index("m") * c.block_m
        n0 = lax.axis_index("n") * cta_rows
        split = lax.axis_index("split")

        def fetch(i):
            slot = lax.rem(i, c.stages)
            block = (split * steps + i) * c.blocks
            columns = pl.ds(block * COLUMNS, c.blocks * COLUMNS)
            arrived = loaded.at[slot]
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(m0, c.block_m), columns], x_ring.at[slot], arrived
            )
            rows = pl.ds(n0, cta_rows)
            source = (
                weight_ref.at[pl.ds(n0 // ROWS, c.warpgroups), pl.ds(block, c.blocks)]
                if in_registers
                else weight_ref.at[rows, columns]
            )
            plgpu.copy_gmem_to_smem(source, ring.at[slot], arrived)
            for ref, smem in zip(grouped_refs, grouped_ring, strict=True):
                if per_block:  # one by one: each has to lie at a multiple of 128 bytes
                    for b in range(c.blocks):
                        source = ref.at[block + b, pl.ds(m0, c.block_m)]
                        target = smem.at[slot, b, pl.ds(0, c.block_m)]
                        plgpu.copy_gmem_to_smem(source, target, arrived)
                else:
                    groups = pl.ds(block * (COLUMNS // group_size), per_step)
                    plgpu.copy_gmem_to_smem(ref.at[groups, rows], smem.at[slot], arrived)

        def release(i):
            """This warpgroup has left step i; the first one refills its slot once all have."""
            slot = lax.rem(i, c.stages)

            @pl.when(i + c.stages < steps)
            def _():
                plgpu.barrier_arrive(left.at[slot])

            @pl.when((wg == 0) & (i + c.stages < steps))
            def _():
                plgpu.barrier_wait(left.at[slot])
                fetch(i + c.stages)

        def sum_in_registers():
            def step(i, acc):
                slot = lax.rem(i, c.stages)
                plgpu.barrier_wait(loaded.at[slot])
                values = [
                    mosaic.load_fragments(ring.at[slot, wg, b], bits, x.dtype, interpret)
                    for b in range(c.blocks)
                ]
                rows = [
                    [
                        mosaic.load_rows(smem.at[slot, g, pl.ds(wg * ROWS, ROWS)])
                        for g in range(per_step)
                    ]
                    for smem in grouped_ring
                ]
                acc = mosaic.fragment_products(
                    acc,
                    values,
                    rows[0] if group_size else [],
                    rows[-1] if zeros is not None else [],
                    lambda start, size: x_ring.at[slot, :, pl.ds(start, size)].T,
                    bias=bias,
                    group_size=group_size,
                    staging=staging[0].at[wg] if staging else None,
                )
                release(i)
                return acc

            return lax.fori_loop(0, steps, step, mosaic.zero_sums(c.block_m))

        def sum_in_memory():
            def scoped(acc):
                def step(i, _):
                    slot = lax.rem(i, c.stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    plgpu.wgmma(acc, ring.at[slot, pl.ds(wg * ROWS, ROWS)], x_ring.at[slot].T)
                    plgpu.wgmma_wait(1)  # so the product before is done

                    @pl.when(i > 0)
                    def _():
                        release(i - 1)

                lax.fori_loop(0, steps, step, None)
                return acc[...]

            return pl.run_scoped(scoped, plgpu.ACC((ROWS, c.block_m), sum_dtype))

        def sum_of_blocks():
            def step(i, acc):
                slot = lax.rem(i, c.stages)
                plgpu.barrier_wait(loaded.at[slot])

                def operands(b):
                    columns = pl.ds(b * COLUMNS, COLUMNS)
                    weight = ring.at[slot, pl.ds(wg * ROWS, ROWS), columns]
                    return weight, x_ring.at[slot, :, columns].T

                def scaled(sums, b):
                    # Beyond K the products are zeros, and must not meet a NaN beyond the scales.
                    block = (split * steps + i) * c.blocks + b
                    block = jnp.minimum(block, scales.shape[1] - 1)
                    of_weight = block_smem[wg * ROWS // COLUMNS, block]
                    of_tokens = mosaic.load_columns(
                        grouped_ring[0].at[slot, b, pl.ds(0, c.block_m)]
                    )
                    of_tokens = of_tokens * of_weight
                    return sums * lax.broadcast_in_dim(of_tokens, sums.shape, (1,))

                acc = mosaic.add_products(acc, c.blocks, operands, scaled)
                release(i)
                return acc

            plgpu.barrier_wait(scales_ready)
            return lax.fori_loop(0, steps, step, mosaic.zero_sums(c.block_m))

        @pl.when(wg == 0)
        def _():
            if per_token:
                tokens = pl.ds(m0, c.block_m)
                plgpu.copy_gmem_to_smem(token_ref.at[tokens], token_smem, scales_ready)
            if per_block:
                blocks = pl.ds(n0 // COLUMNS, block_smem.shape[0])
                plgpu.copy_gmem_to_smem(row_ref.at[blocks], block_smem, scales_ready)
            for i in range(min(c.stages, steps)):
                fetch(jnp.int32(i))

        if per_block:
            total = sum_of_blocks()
        else:
            total = sum_in_registers() if in_registers else sum_in_memory()
        if per_token:
            plgpu.barrier_wait(scales_ready)
        row0 = n0 + wg * ROWS
        total = mosaic.scale_sums(
            total,
            mosaic.row_slice(row_ref, row0) if row_scales and not per_block else None,
            token_smem if per_token else token_ref,
        ).astype(result_dtype)
        total = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
        for start in range(0, c.block_m, out_m):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.at[wg].T[...] = total[:, start : start + out_m]
            plgpu.commit_smem()
            target = out_ref.at[split, pl.ds(m0 + start, out_m), pl.ds(row0, ROWS)]
            plgpu.copy_smem_to_gmem(out_smem.at[wg], target)
        plgpu.wait_smem_to_gmem(0)

    smem = plgpu.SMEM
    columns = c.blocks * COLUMNS
    if in_registers:
        ring = smem((c.stages, c.warpgroups, c.blocks, 2 * bits, 128), jnp.int32)
    else:
        transforms = mosaic.k_major(COLUMNS, weight.dtype)
        ring = smem((c.stages, cta_rows, columns), weight.dtype, transforms=transforms)
    x_transforms = mosaic.k_major(chunk, x.dtype)
    scratch = [
        smem((c.stages, c.block_m, columns), x.dtype, transforms=x_transforms),
        ring,
        *[
            smem((c.stages, per_step, max(c.block_m, 32) if per_block else cta_rows), g.dtype)
            for g in grouped
        ],
        *([smem((c.block_m,), jnp.float32)] if per_token else []),
        *([smem((-(-cta_rows // COLUMNS), scales.shape[1]), jnp.float32)] if per_block else []),
        smem((c.warpgroups, out_m, ROWS), result_dtype),
        plgpu.Barrier(num_arrivals=2 + loads, num_barriers=c.stages),
        plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
        plgpu.Barrier(),
    ]
    if interpret and in_registers:
        scratch.append(smem((c.warpgroups, ROWS, chunk), x.dtype, transforms=x_transforms))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((c.splits, m, n), result_dtype),
        scratch_types=scratch,
        grid=(-(-n // cta_rows), -(-m // c.block_m), c.splits),
        grid_names=("n", "m", "split"),
        num_threads=c.warpgroups,
        thread_name="wg",
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(x, weight, *grouped, *row_scales, *token_scales)
