"""Rotary position embedding with Llama's three ways of stretching it. Angles in float32.

Source: transformers `modeling_rope_utils.py`, whose arithmetic (float32 powers) this follows, so
that angles at far positions agree.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qllama.config import LlamaConfig, RopeScaling


def _inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """float32 `[head_dim / 2]`, radians per token, for every type but "dynamic"."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelengths = 2 * np.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (frequencies * keep + frequencies / scaling.factor * (1 - keep)).astype(np.float32)


def rotary_embedding(
    config: LlamaConfig, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 `[B, T, head_dim / 2]`.

    Args:
        config: the model's.
        positions: int32 `[B, T]`.
        lengths: int32 `[B]`, tokens each row's text has after this call; None: the largest
            position + 1. Only "dynamic" scaling depends on it: as in transformers, a text longer
            than the trained context raises the base for the tokens being computed, while keys
            already in the cache keep the angles they were given.
    """
    frequencies = jnp.asarray(_inverse_frequencies(config))
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        if lengths is None:
            lengths = positions.max(axis=1) + 1
        original = scaling.original_max_position_embeddings
        length = jnp.maximum(lengths, original).astype(jnp.float32)[:, None, None]
        grown = scaling.factor * length / original - (scaling.factor - 1)
        base = config.rope_theta * grown ** (config.head_dim / (config.head_dim - 2))
        exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        frequencies = 1.0 / base**exponent
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `x [B, T, heads, head_dim]`; the pairs are (i, i + head_dim/2), as Hugging Face's."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
