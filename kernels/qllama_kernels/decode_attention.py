# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Attention of one new token a row over its cache, in Pallas Mosaic GPU (sm_90a).

One kernel does all that lies between the projections of a decode step: it rotates query and key,
puts key and value into the cache where they belong, and attends.

A CTA has one key-value head of one row, and of its cache one split of `SPLIT` tokens. All tiles of
that are on their way before the first is looked at. The few query heads that share the key-value
head fill the 64 rows that `wgmma` has, the others being heads of no interest. The new token never
comes from the cache: the CTA whose split it falls into counts it from registers.

What a split is does not depend on a row's length or on other rows, so neither does the order of
its sums. Where there are several, the caller merges them.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qllama_kernels import mosaic
from qllama_kernels.fragments import ROWS

TILE = 64  # tokens of a product
SPLIT = 256  # tokens of a CTA
_TILES = SPLIT // TILE
_LOG2_E = 1.4426950408889634


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write the new keys and values, and attend to what then is in the cache.

    Args:
        qkv: bfloat16 or float16 `[B, N + 2K, H]`: queries, keys and values of one token a row,
            before rotation. H is 64 or 128, N a multiple of K.
        cos, sin: float32 `[B, H / 2]`, of the token's position.
        positions: int32 `[B]`. One at or beyond S: the row is padding, nothing is written, and
            what it gets means nothing.
        keys, values: the cache, of the dtype of `qkv`, `[B, K, S, H]`. Donated to the program
            around, they are written in place.
        interpret: simulate on the CPU.

    Returns:
        `[B, N, H]` in the dtype of `qkv`, and the cache, written.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    half = head_dim // 2
    heads = qkv.shape[1] - 2 * kv_heads
    group = heads // kv_heads
    splits = -(-capacity // SPLIT)
    dtype = qkv.dtype
    scale = head_dim**-0.5 * _LOG2_E

    def kernel(qkv_ref, cos_ref, sin_ref, positions_ref, keys_ref, values_ref, *refs):
        out_ref, *rest = refs
        maximum_ref, sum_ref = rest[:2] if splits > 1 else (None, None)
        (
            raw_smem,
            q_smem,
            new_smem,
            k_smem,
            v_smem,
            p_smem,
            out_smem,
            q_ready,
            k_ready,
            v_ready,
        ) = rest[2 if splits > 1 else 0 :]
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        position = positions_ref[row]
        alive = position < capacity
        start = split * SPLIT
        before = jnp.where(alive, jnp.clip(position - start, 0, SPLIT), 0)  # of this split
        tiles = (before + TILE - 1) // TILE
        mine = alive & (position >= start) & (position < start + SPLIT)

        @pl.when((tiles > 0) | mine)
        def _():
            for t in range(_TILES):

                @pl.when(t < tiles)
                def _(t=t):
                    tokens = pl.ds(start + t * TILE, TILE)
                    plgpu.copy_gmem_to_smem(
                        keys_ref.at[row, head, tokens], k_smem.at[t], k_ready.at[t]
                    )
                    plgpu.copy_gmem_to_smem(
                        values_ref.at[row, head, tokens], v_smem.at[t], v_ready.at[t]
                    )

            # Of the 64 heads from this group's first on, those beyond it are of no interest.
            plgpu.copy_gmem_to_smem(qkv_ref.at[row, pl.ds(head * group, ROWS)], raw_smem, q_ready)
            cosine, sine = (mosaic.load_columns(ref.at[row]) for ref in (cos_ref, sin_ref))

            def halves(index):
                return [
                    mosaic.load_columns(qkv_ref.at[row, index, pl.ds(at, half)]).astype(jnp.float32)
                    for at in (0, half)
                ]

            def rotated(first, second, cosine, sine):
                return [
                    x.astype(dtype).astype(jnp.float32)
                    for x in (first * cosine - second * sine, second * cosine + first * sine)
                ]

            key = rotated(*halves(heads + head), cosine, sine)
            value = mosaic.load_columns(qkv_ref.at[row, heads + kv_heads + head])

            @pl.when(mine)
            def _():
                for i in range(2):
                    new_smem[0, pl.ds(i * half, half)] = key[i].astype(dtype)
                new_smem[1] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(new_smem.at[0], keys_ref.at[row, head, position])
                plgpu.copy_smem_to_gmem(new_smem.at[1], values_ref.at[row, head, position])

            plgpu.barrier_wait(q_ready)
            shape = (ROWS, half)
            raw = [
                plgpu.load(
                    raw_smem.at[:, pl.ds(at, half)], layout=plgpu.Layout.WGMMA, optimized=False
                ).astype(jnp.float32)
                for at in (0, half)
            ]
            query = rotated(*raw, *(lax.broadcast_in_dim(x, shape, (1,)) for x in (cosine, sine)))
            own = jnp.zeros(())
            own = sum(
                jnp.sum(q * lax.broadcast_in_dim(k, shape, (1,)), axis=1)
                for q, k in zip(query, key, strict=True)
            )
            for i in range(2):
                q_smem[i] = query[i].astype(dtype)
            plgpu.commit_smem()

            here = jnp.where(mine, 1.0, 0.0)
            wide = (ROWS, head_dim)
            state = (
                own * scale + jnp.where(mine, 0.0, -jnp.inf),
                plgpu.layout_cast(
                    jnp.full((ROWS,), here, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
                ),
                lax.broadcast_in_dim(value.astype(jnp.float32) * here, wide, (1,)),
            )

            def step(t, state):
                maximum, total, out = state
                plgpu.barrier_wait(k_ready.at[t])

                def scores_of(acc):
                    for i in range(2):
                        plgpu.wgmma(acc, q_smem.at[i], k_smem.at[t, :, pl.ds(i * half, half)].T)
                    return acc[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, TILE), jnp.float32)) * scale
                token = plgpu.broadcasted_iota(
                    jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
                )
                scores = jnp.where(token < before - t * TILE, scores, -jnp.inf)
                highest = jnp.maximum(maximum, jnp.max(scores, axis=1))
                shrink = jnp.exp2(maximum - highest)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(highest, scores.shape, (0,)))
                total = total * shrink + jnp.sum(weights, axis=1)
                p_smem[...] = weights.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_ready.at[t])

                def weighted(acc):
                    plgpu.wgmma(acc, p_smem, v_smem.at[t])
                    return acc[...]

                product = pl.run_scoped(weighted, plgpu.ACC(wide, jnp.float32))
                return highest, total, out * lax.broadcast_in_dim(shrink, wide, (0,)) + product

            maximum, total, out = lax.fori_loop(0, tiles, step, state)
            if splits == 1:
                out = out * lax.broadcast_in_dim(1.0 / total, wide, (0,))
                out_smem[...] = out.astype(out_smem.dtype)
                plgpu.commit_smem()
                # The box is cut where the group ends.
                heads_here = pl.ds(split * 0, ROWS)
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, heads_here])
            else:
                out_smem[...] = out
                plgpu.commit_smem()
                heads_here = pl.ds(split * 0, ROWS)
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, split, heads_here])
                maximum_ref[row, head, split] = maximum
                sum_ref[row, head, split] = total
            plgpu.wait_smem_to_gmem(0)

        if splits > 1:

            @pl.when(~((tiles > 0) | mine))
            def _():
                nothing = plgpu.layout_cast(
                    jnp.full((ROWS,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
                )
                maximum_ref[row, head, split] = nothing

    smem = plgpu.SMEM
    tiled = mosaic.k_major(half, dtype)
    out_dtype = dtype if splits == 1 else jnp.float32
    scratch = [
        smem((ROWS, head_dim), dtype),
        smem((2, ROWS, half), dtype, transforms=tiled),
        smem((2, head_dim), dtype),
        smem((_TILES, TILE, head_dim), dtype, transforms=tiled),
        smem((_TILES, TILE, head_dim), dtype, transforms=mosaic.k_major(min(head_dim, 64), dtype)),
        smem((ROWS, TILE), dtype, transforms=mosaic.k_major(TILE, dtype)),
        smem((ROWS, head_dim), out_dtype),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=_TILES),
        plgpu.Barrier(num_barriers=_TILES),
    ]
    shape = jax.ShapeDtypeStruct
    outputs = [shape((batch, kv_heads, group, head_dim), out_dtype)]
    if splits > 1:
        outputs = [
            shape((batch, kv_heads, splits, group, head_dim), out_dtype),
            *[shape((batch, kv_heads, splits, ROWS), jnp.float32)] * 2,
        ]
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    out, *of_splits = plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(batch, kv_heads, splits),
        grid_names=("row", "head", "split"),
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(qkv, cos, sin, positions, keys_ref, values_ref)
    if of_splits:
        out = _merged(out, *(x[..., :group] for x in of_splits)).astype(dtype)
    return out.reshape(batch, heads, head_dim), jax.freeze(keys_ref), jax.freeze(values_ref)


def _merged(out: jax.Array, maximum: jax.Array, total: jax.Array) -> jax.Array:
    """`[B, K, G, H]` of sums `[B, K, splits, G, H]` by weights relative to `2^maximum`, and the
    totals of these weights `[B, K, splits, G]`. A split without a maximum was not written."""
    seen = maximum > -jnp.inf
    highest = jnp.max(maximum, axis=2, keepdims=True)
    weight = jnp.where(seen, jnp.exp2(maximum - highest), 0.0)
    sums = jnp.sum(jnp.where(seen[..., None], out * weight[..., None], 0.0), axis=2)
    totals = jnp.sum(jnp.where(seen, total * weight, 0.0), axis=2)
    return sums / totals[..., None]
