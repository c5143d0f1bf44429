# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Fragments back to a plain 16-bit weight, in Pallas Mosaic GPU: for products of many tokens.

One pass at the speed of memory; the product itself is then the library's.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qllama_kernels import fragments, mosaic
from qllama_kernels.fragments import COLUMNS, ROWS

STAGES = 4
BLOCKS = 8  # of 64x128 weights to a CTA: several CTAs for each place on the device, whatever N


def dequantize(
    weight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    n: int,
    k: int,
    group_size: int | None,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """`(code - zero) * scale`, computed in float32 and rounded once: `dtype [N, K]`.

    Args:
        weight: fragments int32 `[N'/64, K'/128, 8 or 16, 128]`.
        scales: any float `[K'/g, N']`, or `[1, N']` for one a row, `[1, 1]` for one in all.
        zeros: any float (whole numbers) `[K'/g, N']`; None: all zero.
        n: N, a multiple of 8.
        k: K, a multiple of 64.
        group_size: 32, 64 or 128; None: one scale a row.
        dtype: bfloat16 or float16.
        interpret: simulate on the CPU.
    """
    tiles, blocks = weight.shape[:2]
    bits = weight.shape[2] // 2
    chunk = min(group_size or COLUMNS, COLUMNS)
    parts = COLUMNS // chunk
    bias = fragments.bias(bits, dtype)
    grouped = [g for g in (scales if group_size else None, zeros) if g is not None]
    row_scales = [] if group_size else [scales]

    def kernel(weight_ref, *refs):
        take = iter(refs)
        grouped_refs = [next(take) for _ in grouped]
        row_ref = next(take) if row_scales else None
        out_ref, ring, *rest = take
        grouped_ring, (out_smem, loaded) = rest[: len(grouped)], rest[len(grouped) :]
        tile = lax.axis_index("tile")
        first = lax.axis_index("slice") * BLOCKS
        count = jnp.minimum(BLOCKS, blocks - first)

        def fetch(i):
            slot, block = lax.rem(i, STAGES), first + i
            plgpu.copy_gmem_to_smem(weight_ref.at[tile, block], ring.at[slot], loaded.at[slot])
            for ref, smem in zip(grouped_refs, grouped_ring, strict=True):
                source = ref.at[pl.ds(block * parts, parts), pl.ds(tile * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], loaded.at[slot])

        for i in range(min(STAGES, BLOCKS)):
            pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

        def step(i, _):
            slot = lax.rem(i, STAGES)
            half = lax.rem(i, 2)
            plgpu.barrier_wait(loaded.at[slot])
            values = mosaic.load_fragments(ring.at[slot], bits, dtype, interpret)
            rows = [
                [mosaic.load_rows(smem.at[slot, g]) for g in range(parts)] for smem in grouped_ring
            ]

            @pl.when(i + STAGES < count)
            def _():
                fetch(i + STAGES)

            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for part in range(parts):
                a = values[:, part * chunk : (part + 1) * chunk].astype(jnp.float32)
                if zeros is not None:
                    zero = rows[-1][part].astype(jnp.float32) + bias
                    a = a - lax.broadcast_in_dim(zero, a.shape, (0,))
                elif bias:
                    a = a - bias
                if group_size:
                    scale = rows[0][part].astype(jnp.float32)
                    a = a * lax.broadcast_in_dim(scale, a.shape, (0,))
                a = mosaic.scale_sums(
                    a, mosaic.row_slice(row_ref, tile * ROWS) if row_scales else None, None
                )
                out_smem[half, :, part * chunk : (part + 1) * chunk] = a.astype(dtype)
            plgpu.commit_smem()
            columns = pl.ds((first + i) * COLUMNS, COLUMNS)
            target = out_ref.at[pl.ds(tile * ROWS, ROWS), columns]
            plgpu.copy_smem_to_gmem(out_smem.at[half], target)

        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    smem = plgpu.SMEM
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n, k), dtype),
        scratch_types=[
            smem((STAGES, 2 * bits, 128), jnp.int32),
            *[smem((STAGES, parts, ROWS), g.dtype) for g in grouped],
            smem((2, ROWS, COLUMNS), dtype, transforms=mosaic.k_major(chunk, dtype)),
            plgpu.Barrier(num_arrivals=1 + len(grouped), num_barriers=STAGES),
        ],
        grid=(tiles, -(-blocks // BLOCKS)),
        grid_names=("tile", "slice"),
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(weight, *grouped, *row_scales)
