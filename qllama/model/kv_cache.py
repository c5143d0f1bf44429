"""The key-value cache, and attention over it.

Write first, then attend: a chunk's own keys and values are read back from the cache, so that with
a quantized cache the logits do not depend on where a text was cut into chunks.

Legend: B rows, T query tokens, S capacity in tokens, N heads, K key-value heads, H head_dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from qllama_kernels.attention import fused_attention, has_fused_attention
from qllama_kernels.codes import to_float8
from qllama_kernels.xla import for_product

from qllama.config import LlamaConfig

_MAX_SCORES = 1 << 28  # that attention computes at once, float32 each


class Entries(NamedTuple):
    """Keys and values of one layer. Of one array for both, XLA copies each half to multiply it."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]

    def up_to(self, context: int | None) -> "Entries":
        """The first `context` tokens of every row; None: all."""
        return Entries(self.keys[:, :, :context], self.values[:, :, :context])

    def of_rows(self, rows: jax.Array) -> "Entries":
        """The rows at `rows`; zeros for those out of range."""
        keys, values = (x.at[rows].get(mode="fill", fill_value=0) for x in self)
        return Entries(keys, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer. Donate it to the program that updates it."""

    layers: tuple[Entries, ...]

    @property
    def rows(self) -> int:
        """B: texts it can hold."""
        return self.layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        """S: tokens a row can hold."""
        return self.layers[0].keys.shape[2]


def init_cache(
    config: LlamaConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype | type,
    *,
    copies: int = 1,
    over: Sharding | None = None,
) -> KVCache:
    """An empty cache, zeroed: attention multiplies masked entries by zero, so none may be NaN.

    `copies` is how many devices hold the heads of `config` each, `over` how the whole lies there.
    """
    shape = (batch, copies * config.num_key_value_heads, capacity, config.head_dim)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype, device=over)

    return KVCache(tuple(Entries(zeros(), zeros()) for _ in range(config.num_hidden_layers)))


def cache_bytes(config: LlamaConfig, dtype: jnp.dtype | type) -> int:
    """Bytes one token of one row takes in the cache, all layers."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return per_layer * config.num_hidden_layers


def grow_cache(cache: KVCache, capacity: int) -> KVCache:
    """The same contents with room for `capacity` tokens a row."""
    extra = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0)]
    grown: KVCache = jax.tree.map(lambda array: jnp.pad(array, extra), cache)
    return grown


def write(
    layer: Entries,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    rows: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> Entries:
    """Put `keys` and `values` `[B, T, K, H]` at `positions [B, T]` of `rows [B]` of one layer.

    A position or row out of range is dropped: that is how padding is written nowhere. Scales
    (float32, broadcastable to `[K, 1]`) divide before the cast where the cache is float8.
    """
    dtype = layer.keys.dtype
    if dtype == jnp.float8_e4m3fn:
        keys = to_float8(keys.astype(jnp.float32) / (1.0 if k_scale is None else k_scale))
        values = to_float8(values.astype(jnp.float32) / (1.0 if v_scale is None else v_scale))
    if rows is None:
        rows = jnp.arange(layer.keys.shape[0])

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[rows[:, None], :, positions].set(new.astype(dtype), mode="drop")

    return Entries(put(layer.keys, keys), put(layer.values, values))


def attend(
    queries: jax.Array,
    entries: Entries,
    positions: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of `queries [B, T, N, H]` over `entries`: `[B, T, N, H]`.

    The query at position p sees entries 0..p. Scores and softmax are float32. The scales of a
    float8 cache are applied to scores and sums, so no widened copy of the cache is scaled.

    Where there would be very many scores, runs of queries take turns.
    """
    batch, length, heads, _ = queries.shape
    turns = -(-batch * heads * length * entries.keys.shape[2] // _MAX_SCORES)
    run = -(-length // turns)
    if run >= length:
        return _attend(queries, entries, positions, k_scale, v_scale)

    def in_runs(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [runs, B, run, ...]
        x = jnp.pad(x, [(0, 0), (0, -length % run)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, run, *x.shape[2:]), 1, 0)

    out = jax.lax.map(
        lambda part: _attend(part[0], entries, part[1], k_scale, v_scale),
        (in_runs(queries), in_runs(positions)),
    )
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *queries.shape[2:])[:, :length]


def attend_to_own(
    queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Causal attention of whole texts to themselves, `[B, T, N, H]`.

    Args:
        queries: `[B, T, N, H]`.
        keys, values: `[B, T, K, H]`, of the same tokens.
        positions: int32 `[B, T]`, 0 to T - 1 in every row; anything for padding, which is last.
    """
    if has_fused_attention(queries.dtype, queries.shape[-1]):
        return fused_attention(queries, keys, values)
    return attend(queries, Entries(keys.swapaxes(1, 2), values.swapaxes(1, 2)), positions)


def _attend(
    queries: jax.Array,
    entries: Entries,
    positions: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> jax.Array:
    batch, length, heads, head_dim = queries.shape
    kv_heads, capacity = entries.keys.shape[1:3]
    grouped = for_product(queries)
    grouped = grouped.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    keys, values = (x.astype(grouped.dtype) for x in entries)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    if k_scale is not None:
        scores = scores * k_scale[..., None, None]
    visible = jnp.arange(capacity) <= positions[:, :, None]  # [B, T, S]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(grouped.dtype)
    out = jnp.einsum("bkgts,bksh->btkgh", weights, values, preferred_element_type=jnp.float32)
    if v_scale is not None:
        out = out * v_scale[:, None]
    return out.reshape(batch, length, heads, head_dim).astype(queries.dtype)
