"""How 4-bit codes lie in memory: two to a byte along K, the even column in the low nibble.

int4 codes are two's complement; float4 codes are a sign bit over an index into `E2M1_VALUES`.
"""

import jax
import jax.numpy as jnp

# OCP Microscaling Formats v1.0, section 5.3.3: the magnitudes a float4_e2m1 code can take.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _nibbles(packed: jax.Array, k: int) -> jax.Array:
    """uint8 `[N, ceil(K/2)]` -> uint8 `[N, K]`, values 0..15."""
    pair = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], -1)[..., :k]


def pack_int4(codes: jax.Array) -> jax.Array:
    """int8 `[N, K]` with values in [-8, 7] -> uint8 `[N, ceil(K/2)]`; odd K is padded with 0."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    nibbles = codes.astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: jax.Array, k: int) -> jax.Array:
    """uint8 `[N, ceil(K/2)]` -> int8 `[N, K]` with values in [-8, 7]."""
    shifted = (_nibbles(packed, k) << 4).astype(jnp.int8)
    return shifted >> 4  # arithmetic: extends the sign


def unpack_float4(packed: jax.Array, k: int) -> jax.Array:
    """uint8 `[N, ceil(K/2)]` of float4_e2m1 codes -> float32 `[N, K]`."""
    codes = _nibbles(packed, k)
    magnitude = jnp.asarray(E2M1_VALUES, jnp.float32)[codes & 7]
    return jnp.where(codes & 8, -magnitude, magnitude)
