"""The decode attention kernel, simulated on a CPU, against plain attention over the same cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qllama_kernels.attention import decode_attention, has_decode_attention
from qllama_kernels.decode_attention import AttentionConfig

from qllama.model.kv_cache import Entries, attend, write
from qllama.model.rope import apply_rope

SPLIT = AttentionConfig().split


def operands(
    positions: list[int],
    heads: tuple[int, int],
    head_dim: int,
    capacity: int,
    dtype: str,
    cached: str | None = None,
) -> tuple[jax.Array, ...]:
    """Arguments of the kernel: random tokens and a cache full of random entries."""
    rng = np.random.default_rng(0)
    batch, (n, k) = len(positions), heads

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    angles = rng.uniform(0, 6, (batch, head_dim // 2)).astype(np.float32)
    cache = (normal(batch, k, capacity, head_dim).astype(cached or dtype) for _ in range(2))
    qkv = normal(batch, (n + 2 * k) * head_dim)
    return qkv, np.cos(angles), np.sin(angles), np.array(positions, np.int32), *cache


@jax.jit
def plainly(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    **scales: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same by rotation, write and attention as prefill has them, in float32."""
    kv_heads, _, head_dim = keys.shape[1:]
    heads = qkv.reshape(len(qkv), 1, -1, head_dim)
    n = heads.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(heads, [n, n + kv_heads], axis=2)
    q, k = (apply_rope(x, cos[:, None], sin[:, None]) for x in (q, k))
    k_scale, v_scale = scales.get("k_scale"), scales.get("v_scale")
    cache = write(Entries(keys, values), k, v, positions[:, None], None, k_scale, v_scale)
    wide = Entries(*(x.astype(jnp.float32) for x in cache))
    with jax.default_matmul_precision("highest"):
        out = attend(q.astype(jnp.float32), wide, positions[:, None], k_scale, v_scale)
    return out[:, 0], *cache


def check(arguments: tuple[jax.Array, ...], backend: str, **scales: jax.Array) -> None:
    positions, capacity = np.asarray(arguments[3]), arguments[4].shape[2]
    expected, *expected_cache = plainly(*arguments, **scales)
    run = jax.jit(lambda *a, **k: decode_attention(*a, **k, backend=backend))
    out, *cache = run(*arguments, **scales)
    alive = positions < capacity
    error = np.abs(np.asarray(out, np.float32) - np.asarray(expected))[alive]
    # Weights and results are rounded to 16 bits.
    assert error.max(initial=0) <= 8e-3 * np.abs(np.asarray(expected)).max()
    assert not np.asarray(out, np.float32)[positions >= capacity].any()
    for found, wanted in zip(cache, expected_cache, strict=True):
        # A GPU rotates with one rounding less, which now and then shows in the last bit.
        moved = np.asarray(found, np.float32) != np.asarray(wanted, np.float32)
        assert moved.sum() <= (0 if backend == "interpret" else 1e-2 * wanted[:, :, 0].size)


@pytest.mark.parametrize(
    ("positions", "heads", "head_dim", "capacity", "dtype"),
    [
        ([0], (4, 1), 128, 128, "bfloat16"),
        ([63, 64, 65], (4, 2), 64, 128, "bfloat16"),
        ([SPLIT - 1], (8, 1), 128, SPLIT, "float16"),
        ([127, 128, 5], (2, 2), 128, 128, "bfloat16"),  # the second row is padding
        ([SPLIT - 1, SPLIT, SPLIT + 1, 600], (4, 1), 64, 600, "bfloat16"),
    ],
    ids=str,
)
def test_agrees_with_plain_attention(
    positions: list[int], heads: tuple[int, int], head_dim: int, capacity: int, dtype: str
) -> None:
    check(operands(positions, heads, head_dim, capacity, dtype), "interpret")


def test_a_float8_cache_keeps_the_new_token_as_it_is_attended_to() -> None:
    arguments = operands([0, 70, 300], (4, 2), 64, 600, "bfloat16", "float8_e4m3fn")
    scales = np.array([[0.5], [0.25]], np.float32), np.array([[2.0], [0.125]], np.float32)
    check(arguments, "interpret", k_scale=scales[0], v_scale=scales[1])


def test_what_lies_beyond_the_text_is_not_seen() -> None:
    qkv, cos, sin, positions, keys, values = operands([70], (4, 1), 64, 128, "bfloat16")
    out, *_ = decode_attention(qkv, cos, sin, positions, keys, values, backend="interpret")
    hidden = keys.at[:, :, 71:].set(jnp.nan), values.at[:, :, 71:].set(jnp.nan)
    again, *_ = decode_attention(qkv, cos, sin, positions, *hidden, backend="interpret")
    np.testing.assert_array_equal(out, again)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together = operands([40, 3, 300], (2, 1), 64, 600, "bfloat16")
    alone = tuple(x[:1] for x in together)
    out, *_ = decode_attention(*together, backend="interpret")
    np.testing.assert_array_equal(out[:1], decode_attention(*alone, backend="interpret")[0])


def test_lowers_for_a_gpu_in_a_loop() -> None:
    qkv, cos, sin, positions, keys, values = operands([9, 5], (4, 2), 128, 512, "bfloat16")

    def steps(keys: jax.Array, values: jax.Array) -> object:
        def step(cache: tuple, _: None) -> tuple:
            out, *cache = decode_attention(qkv, cos, sin, positions, *cache, backend="pallas")
            return tuple(cache), out

        return jax.lax.scan(step, (keys, values), None, length=4)

    program = jax.jit(steps, donate_argnums=(0, 1)).trace(keys, values)
    assert program.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_tells_what_it_does_not_take() -> None:
    def takes(
        dtype: str, cached: str, head_dim: int = 128, capacity: int = 64, backend: str = "pallas"
    ) -> bool:
        cache = jnp.zeros((1, 8, capacity, head_dim), cached)
        return has_decode_attention(jnp.dtype(dtype), cache, 32, backend)

    assert takes("bfloat16", "bfloat16")
    assert not takes("bfloat16", "bfloat16", backend="xla")
    assert not takes("bfloat16", "bfloat16", head_dim=96)
    assert not takes("bfloat16", "bfloat16", capacity=65)
    assert takes("bfloat16", "float8_e4m3fn")
    assert not takes("bfloat16", "float16")
    assert not takes("float32", "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (64, 8), (4, 1)], ids=str)
@pytest.mark.parametrize("capacity", [128, 256, 512, 4096])
def test_compiled(dtype: str, head_dim: int, heads: tuple[int, int], capacity: int) -> None:
    edges = [0, 1, 63, 64, 65, 127, 128, 200, 255, 256, 257, 511, 512, 2000, 4095, 4096]
    positions = [p for p in edges if p <= capacity]
    check(operands(positions, heads, head_dim, capacity, dtype), "pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capacity", [256, 4096])
def test_compiled_for_a_float8_cache(head_dim: int, capacity: int) -> None:
    positions = [p for p in (0, 1, 64, 65, 200, 255, 256, 1000, 4095) if p < capacity]
    arguments = operands(positions, (32, 8), head_dim, capacity, "bfloat16", "float8_e4m3fn")
    scales = (np.linspace(0.25, 1, 8, dtype=np.float32)[:, None] for _ in range(2))
    check(arguments, "pallas", **dict(zip(("k_scale", "v_scale"), scales, strict=True)))
