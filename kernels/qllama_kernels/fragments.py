"""Weights packed as tensor-core fragments: what one thread feeds to one `wgmma`, in one place.

A 16-bit `wgmma` takes a 64x16 tile of weights from registers, eight values a thread. `pack` stores
exactly those values side by side, so that a kernel reads 16 bytes at a time, without shuffles and
without bank conflicts, and turns them into floats where they are.

Layout of a tile of 64 rows and 128 columns: int32 `[words, 128]`, words = 8 for 4-bit codes and 16
for 8-bit ones. Thread t (warp w = t // 32, g = t % 32 // 4, c = t % 4) finds its word r at flat
index `r // 4 * 512 + 4 * t + r % 4`. For step j = 0..7 of 16 columns, the thread's value (h, u, e)
is row `16 w + 8 h + g`, column `16 j + 8 u + 2 c + e`, in two's complement:

- 4 bit: word j, bits `4 (h + 2 u) + 16 e`;
- 8 bit: word `2 j + u`, bits `8 h + 16 e`.

So one mask leaves the pair e = 0, 1 of a row in the two halves of a word. Pure bit moves: `unpack`
is the exact inverse. N is padded to 64 and K to 128, with zeros.
"""

import functools

import jax
import jax.numpy as jnp

from qllama_kernels.packing import pack_int4, unpack_int4

ROWS, COLUMNS, THREADS = 64, 128, 128
LAYOUTS = {"int4": "wgmma4", "int8": "wgmma8"}
_BITS = {"wgmma4": 4, "wgmma8": 8}


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """`(N, K)` rounded up to whole tiles."""
    return -(-n // ROWS) * ROWS, -(-k // COLUMNS) * COLUMNS


def _shifts(bits: int) -> jax.Array:
    """int32 `[u, h, e]` bit offset of each value in its word (4 bit), `[h, e]` (8 bit)."""
    h, e = jnp.arange(2)[:, None], jnp.arange(2)[None, :]
    if bits == 4:
        return 4 * (h + 2 * jnp.arange(2)[:, None, None]) + 16 * e
    return 8 * h + 16 * e


def pack_tiles(values: jax.Array, bits: int) -> jax.Array:
    """int8 `[N, K]`, N % 64 == 0, K % 128 == 0 -> int32 `[N/64, K/128, 2 * bits, 128]`."""
    n, k = values.shape
    tiles = values.astype(jnp.int32).reshape(n // 64, 4, 2, 8, k // 128, 8, 2, 4, 2)
    # tile, w, h, g, block, j, u, c, e -> tile, block, j, w, g, c, u, h, e
    tiles = tiles.transpose(0, 4, 5, 1, 3, 7, 6, 2, 8) & ((1 << bits) - 1)
    axes = (-3, -2, -1) if bits == 4 else (-2, -1)
    words = jnp.sum(tiles << _shifts(bits), axis=axes, dtype=jnp.int32)
    if bits == 8:  # tile, block, j, w, g, c, u -> word r = 2 j + u next to j
        words = jnp.moveaxis(words, -1, 3)
    words = words.reshape(n // 64, k // 128, bits // 2, 4, THREADS)  # r // 4, r % 4, t
    return words.swapaxes(-1, -2).reshape(n // 64, k // 128, 2 * bits, THREADS)


def unpack_tiles(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack_tiles`: int8 `[N, K]`."""
    tiles, blocks = words.shape[:2]
    words = words.reshape(tiles, blocks, bits // 2, THREADS, 4).swapaxes(-1, -2)
    words = words.reshape(tiles, blocks, 8, bits // 4, 4, 8, 4)  # j, u of r, w, g, c
    if bits == 8:
        words = jnp.moveaxis(words, 3, -1)[..., None, None]  # ..., u, h, e
    else:
        words = words[:, :, :, 0, ..., None, None, None]
    values = words << (32 - bits - _shifts(bits)) >> (32 - bits)  # arithmetic: extends the sign
    values = values.transpose(0, 3, 7, 4, 1, 2, 6, 5, 8)
    return values.reshape(tiles * 64, blocks * 128).astype(jnp.int8)


# One program: step by step, the device would hold the weight as int32 several times over.
@functools.partial(jax.jit, static_argnames=("k", "weight_dtype"))
def pack(codes: jax.Array, *, k: int, weight_dtype: str) -> jax.Array:
    """Natural codes to fragments.

    Args:
        codes: int8 `[N, K]`, or int4 as uint8 `[N, ceil(K/2)]`.
        k: K.
        weight_dtype: "int4" or "int8".

    Returns:
        int32 `[ceil(N/64), ceil(K/128), 8 or 16, 128]`.

    Raises:
        NotImplementedError: a weight dtype without fragments.
    """
    if weight_dtype not in LAYOUTS:
        raise NotImplementedError(f"{weight_dtype} weights have no fragment layout; keep 'natural'")
    values = unpack_int4(codes, k) if weight_dtype == "int4" else codes
    n = values.shape[0]
    rows, columns = padded_shape(n, k)
    values = jnp.pad(values, ((0, rows - n), (0, columns - k)))
    return pack_tiles(values, _BITS[LAYOUTS[weight_dtype]])


def unpack(words: jax.Array, *, n: int, k: int, weight_dtype: str) -> jax.Array:
    """The inverse of `pack`: codes as the checkpoint has them."""
    values = unpack_tiles(words, _BITS[LAYOUTS[weight_dtype]])[:n, :k]
    return pack_int4(values) if weight_dtype == "int4" else values


def pack_scales(grid: jax.Array, *, n: int) -> jax.Array:
    """Scales or zeros as a checkpoint has them, `[N, groups]`, `[N, 1]` or `[1, 1]`, -> K-major:
    `[groups, N]`, so that those of neighbouring rows lie together."""
    return jnp.broadcast_to(grid, (n, grid.shape[1])).T


def values_plus_bias(words: jax.Array, bits: int, dtype: jnp.dtype | type) -> jax.Array:
    """What a kernel's registers hold: `code + bias(bits, dtype)` of one tile, `[64, 128]`."""
    values = unpack_tiles(words[None, None], bits)
    return (values.astype(jnp.float32) + bias(bits, dtype)).astype(dtype)


def bias(bits: int, dtype: jnp.dtype | type) -> float:
    """The constant that the cheapest bit tricks leave on a code: see `mosaic.fragment_values`."""
    if jnp.dtype(dtype) == jnp.float16:
        return 1024.0 + 2 ** (bits - 1)
    return 136.0 if bits == 4 else 0.0
