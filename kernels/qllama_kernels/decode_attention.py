# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Attention of one new token a row over its cache, in Pallas Mosaic GPU (sm_90a).

Bound by latency where contexts are short and by how fast the cache streams in where they are long.
A CTA, one warpgroup, takes `split` tokens of one row and one key-value head. It asks for all of
their keys and values at once, so that every barrier is waited for once and no slot is used twice:

    scores [split, 8] = keys · queriesᵀ,  sums [H, 8] = valuesᵀ · weights

The operands are swapped as in `decode_matmul`: 64 keys are the left operand of `wgmma`, the query
heads of the key-value head, padded to 8, the right one. The new token's own key and value never
pass through the cache: they join as one more column of scores while the CTA that holds their
place writes them there.
"""

from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qllama_kernels import mosaic

FLOAT8_MAX = 448.0
HEAD_DIMS = (64, 128)
SMALLEST = 8  # the capacity is a multiple of it: rows that TMA moves at a time
TILE = 64  # keys of one load, and of one product
QUERIES = 8  # query heads of a key-value head, padded: the narrowest right operand of `wgmma`


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """How a row is cut up: by tokens, so that its sums do not depend on the rows beside it."""

    split: int = 256  # tokens of a CTA, a multiple of 64

    def splits(self, capacity: int) -> int:
        """CTAs of a row and head."""
        return -(-capacity // self.split)

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory, of at most `mosaic.SHARED_MEMORY`, barriers aside."""
        small = (5 * QUERIES + 4) * head_dim * 2 + QUERIES * self.split * 2
        return 2 * self.split * head_dim * 2 + small


def decode_attention(
    qkv: jax.Array,
    rope: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    k_scale: jax.Array,
    v_scale: jax.Array,
    *,
    config: AttentionConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Write each row's new key and value at its position p, and attend to entries 0..p.

    Args:
        qkv: bfloat16 or float16 `[B, (N + 2K) * H]`: heads of queries (N <= 8K), keys and values. H
            is 64 or 128.
        rope: float32 `[B, 2, H]`, what queries and keys are to be rotated by: cosines, and sines of
            which the first H/2 are negated.
        positions: int32 `[B]`. A row at S or beyond writes nothing and gets zeros.
        keys: `[B, K, S, H]` with S a multiple of 8, in the dtype of `qkv` or float8_e4m3fn; updated
            in place where the program may.
        values: likewise.
        k_scale: float32 `[1]` or `[K]`, of a float8 cache.
        v_scale: likewise.
        config: how the rows are cut up.
        interpret: simulate on the CPU.

    Returns:
        `(out, stats, keys, values)`. With one split, `out` is `[1, B, N, H]` in the dtype of `qkv`.
        With more, float32 `[splits, B, N, H]`, to be merged by `stats`, float32
        `[splits, B, K, 2, 8]`: the largest score of each query head and the sum of its weights
        relative to that. Where nothing was to attend to, these are -inf and 0, and `out` undefined.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    group = heads // kv_heads
    dtype = qkv.dtype
    splits = config.splits(capacity)
    tiles = config.split // TILE
    result_dtype = dtype if splits == 1 else jnp.float32
    scale = head_dim**-0.5
    quantized = keys.dtype == jnp.float8_e4m3fn
    row_layout, column_layout = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))

    def kernel(
        qkv_ref,
        rope_ref,
        positions_ref,
        keys_ref,
        values_ref,
        k_scale_ref,
        v_scale_ref,
        out_ref,
        stats_ref,
        raw_queries,
        raw_key,
        raw_value,
        rope_smem,
        new_key,
        new_value,
        queries_smem,
        keys_smem,
        values_smem,
        weights_smem,
        out_smem,
        stats_smem,
        new_ready,
        keys_ready,
        values_ready,
        *narrow,
    ):
        # What TMA fills; of a float8 cache, not what is multiplied.
        keys_loaded, values_loaded = narrow or (keys_smem, values_smem)
        row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        position = positions_ref[row]
        start = split * config.split
        cached = jnp.minimum(position - start, config.split)  # entries here that lie in the cache
        used = lax.div(cached + TILE - 1, TILE)  # tiles

        def write_out(result):
            """`[H, 8]` in the dtype of the result."""
            out_smem.T[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            target = out_ref.at[split, row, pl.ds(head * group, group)]
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], target)

        def write_stats(largest, total):
            """float32 `[8]` twice."""
            stats_smem[0] = largest
            stats_smem[1] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stats_smem, stats_ref.at[split, row, head])

        has_work = (position >= start) & (position < capacity)

        @pl.when(has_work)
        def _():
            for half, count, smem in (
                (2 * head * group, 2 * QUERIES, raw_queries.at[pl.ds(2, 2 * QUERIES)]),
                (2 * (heads + head), 2, raw_key.at[pl.ds(0, 2)]),
                (2 * (heads + head), 1, raw_key.at[pl.ds(2, 1)]),
                (2 * (heads + kv_heads + head), 2, raw_value),
            ):
                plgpu.copy_gmem_to_smem(qkv_ref.at[row, pl.ds(half, count)], smem, new_ready)
            plgpu.copy_gmem_to_smem(rope_ref.at[row], rope_smem, new_ready)
            for ref, smem, ready in (
                (keys_ref, keys_loaded, keys_ready),
                (values_ref, values_loaded, values_ready),
            ):
                for t in range(tiles):

                    @pl.when(t < used)
                    def _(ref=ref, smem=smem, ready=ready, t=t):
                        tokens = pl.ds(start + t * TILE, TILE)
                        plgpu.copy_gmem_to_smem(ref.at[row, head, tokens], smem.at[t], ready.at[t])

            plgpu.barrier_wait(new_ready)
            is_new = cached < config.split

            shape = head_dim, QUERIES

            def spread(x, axis, shape):
                return lax.broadcast_in_dim(x, shape, (axis,))

            def load_tile(ref):
                """`[64, H]` of the cache in the dtype of the products."""
                if not quantized:
                    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                tile = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
                return plgpu.layout_cast(tile, plgpu.Layout.WGMMA).astype(jnp.float32).astype(dtype)

            def visible(tile, t):
                """`tile` with zeros beyond `cached`: a weight of zero does not silence a NaN."""
                token = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
                return jnp.where(token < cached - t * TILE, tile, jnp.zeros_like(tile))

            def load(ref, layout):
                return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

            def load_heads(ref, half, count):
                """`count` heads, `[H]` or `[H, count]`, from this half of one in `ref` on."""
                layout = row_layout if count == 1 else plgpu.Layout.WGMMA
                ref = ref.at[pl.ds(half, 2 * count)]
                target = (head_dim,) if count == 1 else (count, head_dim)
                if interpret:  # The simulator reshapes no memory.
                    return ref[...].reshape(target).T.astype(jnp.float32)
                ref = ref.reshape(target)
                return load(ref if count == 1 else ref.T, layout)

            cos, sin = (load(rope_smem.at[i], row_layout) for i in range(2))
            key, partner = (load_heads(raw_key, half, 1) for half in (0, 1))
            key = (key * cos + partner * sin).astype(dtype).astype(jnp.float32)
            value = load_heads(raw_value, 0, 1)
            if quantized:
                key_factor, value_factor = (
                    ref[0 if ref.shape == (1,) else head] for ref in (k_scale_ref, v_scale_ref)
                )
                key, value = (
                    jnp.clip(x / factor, -FLOAT8_MAX, FLOAT8_MAX)
                    for x, factor in ((key, key_factor), (value, value_factor))
                )
            key, value = key.astype(keys.dtype), value.astype(keys.dtype)
            before, queries, after = (load_heads(raw_queries, half, QUERIES) for half in (1, 2, 3))
            place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            partner = jnp.where(place < head_dim // 2, after, before)
            queries = queries * spread(cos, 0, shape) + partner * spread(sin, 0, shape)
            queries = queries.astype(dtype)
            queries_smem.T[...] = plgpu.layout_cast(queries, plgpu.Layout.WGMMA_TRANSPOSED)
            new_key[...] = key
            new_value[...] = value
            plgpu.commit_smem()

            @pl.when(is_new)
            def _():
                plgpu.copy_smem_to_gmem(new_key, keys_ref.at[row, head, position])
                plgpu.copy_smem_to_gmem(new_value, values_ref.at[row, head, position])

            key, value = key.astype(jnp.float32), value.astype(jnp.float32)
            score_scale = scale * key_factor if quantized else scale
            new_score = jnp.sum(queries.astype(jnp.float32) * spread(key, 0, shape), axis=0)
            new_score = new_score * score_scale + jnp.where(is_new, 0.0, -jnp.inf)

            @pl.loop(0, used)
            def _(t):
                plgpu.barrier_wait(keys_ready.at[t])
                if quantized:
                    keys_smem.at[t][...] = load_tile(keys_loaded.at[t])

            plgpu.commit_smem()

            def product(*sums):
                for t in range(tiles):
                    plgpu.wgmma(sums[t], keys_smem.at[t], queries_smem.T)
                return [ref[...] for ref in sums]

            scores = pl.run_scoped(product, *[plgpu.ACC((TILE, QUERIES), jnp.float32)] * tiles)
            # Beyond `cached` memory holds anything: of the cache, or of an earlier kernel.
            token = plgpu.broadcasted_iota(jnp.int32, (TILE, QUERIES), 0, layout=plgpu.Layout.WGMMA)
            scores = [
                jnp.where(token < cached - t * TILE, tile * score_scale, -jnp.inf)
                for t, tile in enumerate(scores)
            ]
            largest = scores[0]
            for tile in scores[1:]:
                largest = jnp.maximum(largest, tile)
            largest = jnp.maximum(jnp.max(largest, axis=0), new_score)
            weights = [jnp.exp(tile - spread(largest, 1, tile.shape)) for tile in scores]
            new_weight = jnp.exp(new_score - largest)
            total = weights[0]
            for tile in weights[1:]:
                total = total + tile
            total = jnp.sum(total, axis=0) + new_weight
            for t, tile in enumerate(weights):
                weights_smem.at[:, pl.ds(t * TILE, TILE)].T[...] = plgpu.layout_cast(
                    tile.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )

            @pl.loop(0, used)
            def _(t):
                plgpu.barrier_wait(values_ready.at[t])
                if quantized:
                    values_smem.at[t][...] = visible(load_tile(values_loaded.at[t]), t)

            if not quantized:

                @pl.when(lax.rem(cached, TILE) != 0)
                def _():
                    last = values_smem.at[used - 1]
                    last[...] = visible(load_tile(last), used - 1)

            plgpu.commit_smem()

            def weighted_values(sums):
                def step(t, _):
                    tokens = pl.ds(t * TILE, TILE)
                    plgpu.wgmma(sums, values_smem.at[t].T, weights_smem.at[:, tokens].T)

                lax.fori_loop(0, used, step, None)
                return sums[...]

            result = pl.run_scoped(weighted_values, plgpu.ACC(shape, jnp.float32))
            result += spread(value, 0, shape) * spread(
                new_weight.astype(dtype).astype(jnp.float32), 1, shape
            )
            if quantized:
                result = result * value_factor
            if splits == 1:
                result = result / spread(total, 1, shape)
            else:
                write_stats(largest, total)
            write_out(result.astype(result_dtype))

        @pl.when(~has_work)
        def _():
            if splits == 1:
                nothing = jnp.zeros((head_dim, QUERIES), result_dtype)
                write_out(plgpu.layout_cast(nothing, plgpu.Layout.WGMMA))
            else:
                write_stats(
                    *(
                        plgpu.layout_cast(jnp.full(QUERIES, x, jnp.float32), column_layout)
                        for x in (-jnp.inf, 0.0)
                    )
                )

        plgpu.wait_smem_to_gmem(0)

    smem = plgpu.SMEM
    swizzled = mosaic.k_major(TILE, dtype)
    scratch = [
        smem((2 * QUERIES + 4, head_dim // 2), dtype),
        smem((3, head_dim // 2), dtype),
        smem((2, head_dim // 2), dtype),
        smem((2, head_dim), jnp.float32),
        *[smem((head_dim,), keys.dtype)] * 2,  # apart: TMA takes multiples of 128 bytes
        smem((QUERIES, head_dim), dtype, transforms=swizzled),
        *[smem((tiles, TILE, head_dim), dtype, transforms=swizzled)] * 2,
        smem((QUERIES, config.split), dtype, transforms=swizzled),
        smem((QUERIES, head_dim), result_dtype),
        smem((2, QUERIES), jnp.float32),
        plgpu.Barrier(num_arrivals=5),
        *[plgpu.Barrier(num_barriers=tiles)] * 2,
    ]
    if quantized:
        narrow = mosaic.k_major(head_dim, keys.dtype)
        scratch += [smem((tiles, TILE, head_dim), keys.dtype, transforms=narrow)] * 2
    key_cache, value_cache = jax.new_ref(keys), jax.new_ref(values)
    # Not `plgpu.kernel`, which takes no refs.
    out, stats = pl.kernel(
        lambda *refs: pl.run_scoped(
            lambda *scoped: kernel(*refs, *scoped), *scratch, collective_axes="wg"
        ),
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, heads, head_dim), result_dtype),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, 2, QUERIES), jnp.float32),
        ),
        mesh=plgpu.Mesh(
            grid=(batch, kv_heads, splits),
            grid_names=("row", "head", "split"),
            num_threads=1,
            thread_name="wg",
        ),
        compiler_params=mosaic.COMPILER_PARAMS,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        name="decode_attention",
    )(
        qkv.reshape(batch, -1, head_dim // 2),
        rope,
        positions,
        key_cache,
        value_cache,
        k_scale,
        v_scale,
    )
    return out, stats, jax.freeze(key_cache), jax.freeze(value_cache)
