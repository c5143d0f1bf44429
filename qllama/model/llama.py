"""The Llama decoder. Attribute names are those of the checkpoint, but for the merged projections.

Legend: B rows, T tokens, D hidden_size, N heads, K key-value heads, H head_dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from qllama_kernels.xla import dot

from qllama.config import LlamaConfig
from qllama.model.dense import Dense, MergedDense, QuantDense
from qllama.model.kv_cache import Entries, KVCache, attend, attend_to_own, write
from qllama.model.rope import apply_rope, rotary_embedding


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; statistics in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: jax.Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps
        if x.dtype == jnp.float32:
            # XLA's rsqrt is off by a bit, which moves whole rows across the rounding ties that
            # quantized activations have. The barrier keeps XLA from making one of these two.
            inverse = 1.0 / jax.lax.optimization_barrier(jnp.sqrt(variance))
        else:
            inverse = jax.lax.rsqrt(variance)
        return self.weight[...] * (wide * inverse).astype(x.dtype)


def project_heads(
    config: LlamaConfig, qkv_proj: MergedDense, x: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, the first two rotated."""
    q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in qkv_proj(x))
    return apply_rope(q, *rope), apply_rope(k, *rope), v


def attention_context(
    config: LlamaConfig,
    qkv_proj: MergedDense,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    layer: Entries | None = None,
    rows: jax.Array | None = None,
    context: int | None = None,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, Entries | None]:
    """What o_proj reads, `[B, T, N * H]`, and the cache of this layer, written."""
    q, k, v = project_heads(config, qkv_proj, x, rope)
    if layer is not None:
        if layer.keys.dtype != jnp.float8_e4m3fn:
            k_scale = v_scale = None
        layer = write(layer, k, v, positions, rows, k_scale, v_scale)
    # With no more context than there are tokens here, these are their texts' first: what the cache
    # holds of them is what was just written, unless it was rounded.
    if layer is None or (context == x.shape[1] and layer.keys.dtype == k.dtype):
        out = attend_to_own(q, k, v, positions)
    else:
        entries = layer.up_to(context)
        if rows is not None:
            entries = entries.of_rows(rows)
        out = attend(q, entries, positions, k_scale, v_scale)
    return out.reshape(*x.shape[:2], -1), layer


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self,
        config: LlamaConfig,
        qkv_proj: MergedDense,
        o_proj: Dense | QuantDense,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> None:
        """`k_scale` and `v_scale`: float32 `[1, 1]` or `[K, 1]`, for a float8 cache."""
        self.config = config
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.k_scale = None if k_scale is None else nnx.Variable(k_scale)
        self.v_scale = None if v_scale is None else nnx.Variable(v_scale)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        layer: Entries | None,
        rows: jax.Array | None,
        context: int | None,
    ) -> tuple[jax.Array, Entries | None]:
        attended, layer = attention_context(
            self.config,
            self.qkv_proj,
            x,
            rope,
            positions,
            layer,
            rows,
            context,
            k_scale=None if self.k_scale is None else self.k_scale[...],
            v_scale=None if self.v_scale is None else self.v_scale[...],
        )
        return self.o_proj(attended), layer


def swiglu(gate_up_proj: MergedDense, x: jax.Array) -> jax.Array:
    """What down_proj reads."""
    gate, up = gate_up_proj(x)
    return nnx.silu(gate) * up


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, gate_up_proj: MergedDense, down_proj: Dense | QuantDense) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(swiglu(self.gate_up_proj, x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(
        self,
        self_attn: Attention,
        mlp: MLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ) -> None:
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        layer: Entries | None,
        rows: jax.Array | None,
        context: int | None,
    ) -> tuple[jax.Array, Entries | None]:
        attended, layer = self.self_attn(
            self.input_layernorm(x), rope, positions, layer, rows, context
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), layer


class Llama(nnx.Module):
    """Token ids to hidden states; `logits` takes those to the vocabulary."""

    def __init__(
        self,
        config: LlamaConfig,
        embed_tokens: jax.Array,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        lm_head: Dense | QuantDense | None,
    ) -> None:
        """`embed_tokens`: `[V, D]` in the compute dtype. `lm_head` None: tied to it."""
        self.config = config
        self.embed_tokens = nnx.Param(embed_tokens)
        self.layers = nnx.List(layers)
        self.norm = norm
        self.lm_head = lm_head

    def __call__[C: (KVCache, None)](
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: C = None,  # type: ignore[assignment]  # mypy: no default for a constrained C
        *,
        rows: jax.Array | None = None,
        lengths: jax.Array | None = None,
        context: int | None = None,
    ) -> tuple[jax.Array, C]:
        """Final hidden states `[B, T, D]`, normed, and the updated cache.

        Args:
            tokens: int32 `[B, T]`.
            positions: int32 `[B, T]`. Beyond the cache's capacity: padding, computed and dropped.
            cache: read and written; None: the tokens attend to one another alone, from position 0.
            rows: int32 `[B]`, the cache's row of each row here; None: the same.
            lengths: int32 `[B]`, see `rotary_embedding`.
            context: attend to so many cache entries at most (static); None: all.
        """
        rope = rotary_embedding(self.config, positions, lengths)
        x = self.embed(tokens)
        written: list[Any] = []
        for i, decoder in enumerate(self.layers):
            layer: Any = None if cache is None else cache.layers[i]
            x, layer = decoder(x, rope, positions, layer, rows, context)
            if layer is not None:
                written.append(layer)
        return self.norm(x), None if cache is None else KVCache(tuple(written))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The rows of `embed_tokens` for int32 `[...]` token ids: `[..., D]`."""
        return self.embed_tokens[...][tokens]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[..., V]`. Never rounded to the compute dtype: that would make greedy ties."""
        if self.lm_head is None:
            return dot(hidden, self.embed_tokens[...], jnp.float32)
        return self.lm_head(hidden, jnp.float32)
