"""The Llama decoder. Attribute names are those of the checkpoint, but for the merged projections.

A block hands the next norm its result as `addends`, see `qllama.model.dense`: that norm adds them
to the residual stream, and quantizes for the projection behind it.

Legend: B rows, T tokens, D hidden_size, N heads, K key-value heads, H head_dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from qllama_kernels import rows as row_operations
from qllama_kernels.attention import decode_attention, has_decode_attention
from qllama_kernels.rows import Codes
from qllama_kernels.xla import add_up, dot

from qllama.config import LlamaConfig
from qllama.model.dense import Dense, Input, MergedDense, QuantDense
from qllama.model.kv_cache import Entries, KVCache, attend, attend_to_own, write
from qllama.model.rope import apply_rope, rotary_embedding


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation; statistics in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: jax.Array, eps: float, *, backend: str = "xla") -> None:
        """`backend`: of `qllama_kernels.rows`; "xla" alone can be differentiated."""
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.backend = backend

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.add(x, None, None)[1]

    def add(
        self, x: jax.Array, addends: jax.Array | None, codes: Codes | None
    ) -> tuple[jax.Array, Any]:
        """The residual stream `x` plus the addends `[S, ...]`, and its norm, quantized by `codes`
        unless that is None."""
        return row_operations.residual_norm(
            x, addends, self.weight[...], eps=self.eps, codes=codes, backend=self.backend
        )


def project_heads(
    config: LlamaConfig,
    qkv_proj: MergedDense,
    x: Input,
    rope: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, the first two rotated."""
    q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in qkv_proj(x))
    return apply_rope(q, *rope), apply_rope(k, *rope), v


def attention_context(
    config: LlamaConfig,
    qkv_proj: MergedDense,
    x: Input,
    rope: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    layer: Entries | None = None,
    rows: jax.Array | None = None,
    context: int | None = None,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, Entries | None]:
    """What o_proj reads, `[B, T, N * H]`, and the cache of this layer, written. The scales are for
    a float8 cache."""
    q, k, v = project_heads(config, qkv_proj, x, rope)
    if layer is not None:
        layer = write(layer, k, v, positions, rows, k_scale, v_scale)
    # With no more context than there are tokens here, these are their texts' first: what the cache
    # holds of them is what was just written, unless it was rounded.
    if layer is None or (context == q.shape[1] and layer.keys.dtype == k.dtype):
        out = attend_to_own(q, k, v, positions)
    else:
        entries = layer.up_to(context)
        if rows is not None:
            entries = entries.of_rows(rows)
        out = attend(q, entries, positions, k_scale, v_scale)
    return out.reshape(*out.shape[:2], -1), layer


def decode_context(
    qkv_proj: MergedDense,
    x: Input,
    dtype: jnp.dtype,
    rope: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    layer: Entries,
    *,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    backend: str,
) -> tuple[jax.Array, Entries]:
    """`attention_context` of one token a row, by the kernel there is for that."""
    qkv = add_up(qkv_proj.addends(x)).astype(dtype)  # [B, 1, (N + 2K) * H]
    angles = (x[:, 0] for x in rope)
    out, *written = decode_attention(
        qkv[:, 0],
        *angles,
        positions[:, 0],
        *layer,
        k_scale=k_scale,
        v_scale=v_scale,
        backend=backend,
    )
    return out.reshape(out.shape[0], 1, -1), Entries(*written)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self,
        config: LlamaConfig,
        qkv_proj: MergedDense,
        o_proj: Dense | QuantDense,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
        *,
        backend: str = "xla",
    ) -> None:
        """`k_scale` and `v_scale`: float32 `[1, 1]` or `[K, 1]`, for a float8 cache. `backend`: as
        of `RMSNorm`."""
        self.config = config
        self.backend = backend
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.k_scale = None if k_scale is None else nnx.Variable(k_scale)
        self.v_scale = None if v_scale is None else nnx.Variable(v_scale)

    def __call__(
        self,
        x: Input,
        dtype: jnp.dtype,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        layer: Entries | None,
        rows: jax.Array | None,
        context: int | None,
    ) -> tuple[jax.Array, Entries | None]:
        """Addends, and the cache of this layer, written. `dtype` is the compute dtype."""
        k_scale, v_scale = (
            None if scale is None else scale[...] for scale in (self.k_scale, self.v_scale)
        )
        if layer is not None and layer.keys.dtype != jnp.float8_e4m3fn:
            k_scale = v_scale = None
        decodes = positions.shape[1] == 1 and rows is None and context is None
        if layer is not None and decodes and self._has_kernel(dtype, layer):
            attended, layer = decode_context(
                self.qkv_proj,
                x,
                dtype,
                rope,
                positions,
                layer,
                k_scale=k_scale,
                v_scale=v_scale,
                backend=self.backend,
            )
        else:
            attended, layer = attention_context(
                self.config,
                self.qkv_proj,
                x,
                rope,
                positions,
                layer,
                rows,
                context,
                k_scale=k_scale,
                v_scale=v_scale,
            )
        return self.o_proj.addends(attended), layer

    def _has_kernel(self, dtype: jnp.dtype, layer: Entries) -> bool:
        heads = self.config.num_attention_heads
        return has_decode_attention(dtype, layer.keys, heads, self.backend)


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(
        self,
        gate_up_proj: MergedDense,
        down_proj: Dense | QuantDense,
        *,
        backend: str = "xla",
    ) -> None:
        """`backend`: as of `RMSNorm`."""
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.backend = backend

    def __call__(self, x: Input, dtype: jnp.dtype) -> jax.Array:
        """Addends; `dtype` is the compute dtype."""
        hidden = row_operations.swiglu(
            self.gate_up_proj.addends(x),
            dtype=dtype,
            codes=self.down_proj.input_codes,
            backend=self.backend,
        )
        return self.down_proj.addends(hidden)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm that adds what came before to the residual stream."""

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
        addends: jax.Array | None,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        layer: Entries | None,
        rows: jax.Array | None,
        context: int | None,
    ) -> tuple[jax.Array, jax.Array, Entries | None]:
        """The residual stream, what is still to be added to it, and the cache of this layer."""
        codes = self.self_attn.qkv_proj.input_codes
        x, normed = self.input_layernorm.add(x, addends, codes)
        addends, layer = self.self_attn(normed, x.dtype, rope, positions, layer, rows, context)
        codes = self.mlp.gate_up_proj.input_codes
        x, normed = self.post_attention_layernorm.add(x, addends, codes)
        return x, self.mlp(normed, x.dtype), layer


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
        x, addends = self.embed(tokens), None
        written: list[Any] = []
        for i, decoder in enumerate(self.layers):
            layer: Any = None if cache is None else cache.layers[i]
            x, addends, layer = decoder(x, addends, rope, positions, layer, rows, context)
            if layer is not None:
                written.append(layer)
        _, hidden = self.norm.add(x, addends, None)
        return hidden, None if cache is None else KVCache(tuple(written))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The rows of `embed_tokens` for int32 `[...]` token ids: `[..., D]`."""
        return self.embed_tokens[...][tokens]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[..., V]`. Never rounded to the compute dtype: that would make greedy ties."""
        if self.lm_head is None:
            return dot(hidden, self.embed_tokens[...], jnp.float32)
        return self.lm_head(hidden, jnp.float32)
