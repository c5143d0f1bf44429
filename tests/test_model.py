"""The decoder's own properties, held to NumPy and to one another.

That it computes what transformers does is tested in test_architectures.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qllama.config import LlamaConfig, RopeScaling
from qllama.engine.runner import Runner
from qllama.model.dense import MergedDense, make_dense
from qllama.model.init import init_llama
from qllama.model.kv_cache import (
    Entries,
    KVCache,
    attend,
    cache_bytes,
    grow_cache,
    init_cache,
    write,
)
from qllama.model.llama import Llama, RMSNorm
from qllama.model.rope import apply_rope, rotary_embedding
from qllama.quantization.qtensor import stack_rows
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    attention_bias=True,
    mlp_bias=True,
)
LINEAR = RopeScaling(rope_type="linear", factor=4.0)
DYNAMIC = RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=20)
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
LENGTH = 50


def random_llama(config: LlamaConfig = CONFIG) -> Llama:
    """Weights large enough for every part to matter: also biases and norms are random."""
    graphdef, state = nnx.split(init_llama(config, jax.random.key(0)))
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        noise = rng.normal(size=leaf.shape)
        leaf_std = 1.2 * leaf.shape[-1] ** -0.5 if leaf.ndim == 2 else 0.3
        leaves[i] = jnp.asarray(leaf_std * noise + (leaf.ndim == 1) * leaf, jnp.float32)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


@pytest.fixture(scope="module")
def llama() -> Llama:
    return random_llama()


def text(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).astype(np.int32)


def read[C: (KVCache, None)](
    model: Llama,
    tokens: np.ndarray,
    positions: np.ndarray,
    cache: C = None,  # type: ignore[assignment]  # mypy: no default for a constrained C
    *,
    rows: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[np.ndarray, C]:
    """float32 logits `[B, T, V]` and the cache, in one compiled program."""

    @jax.jit
    def program(tokens: jax.Array, positions: jax.Array, cache: C) -> tuple[jax.Array, C]:
        hidden, cache = model(tokens, positions, cache, rows=rows, lengths=lengths)
        return model.logits(hidden), cache

    logits, cache = program(tokens, positions, cache)
    return np.asarray(logits), cache


def uncached_logits(model: Llama, tokens: np.ndarray) -> np.ndarray:
    logits, _ = read(model, tokens[None], np.arange(len(tokens))[None])
    return logits[0]


def cached_logits(
    model: Llama, tokens: np.ndarray, chunk: int, dtype: jnp.dtype | type = jnp.float32
) -> np.ndarray:
    return Runner(model, cache_dtype=dtype, steps=1).score(tokens, chunk)


# Cached decoding.


@pytest.mark.parametrize(
    ("chunk", "scaling"),
    [
        (1, None),
        (16, None),
        (32, LLAMA3),
        (16, DYNAMIC),
        pytest.param(64, None, marks=pytest.mark.slow),
        pytest.param(32, DYNAMIC, marks=pytest.mark.slow),
    ],
)
def test_a_text_read_in_chunks_gives_the_logits_of_one_pass(
    chunk: int, scaling: RopeScaling | None
) -> None:
    model = random_llama(replace(CONFIG, rope_scaling=scaling))
    expected = uncached_logits(model, text())
    assert expected.std() > 0.5
    np.testing.assert_allclose(cached_logits(model, text(), chunk), expected, atol=2e-5)


def test_a_token_sees_nothing_that_comes_after(llama: Llama) -> None:
    changed = text()
    changed[30:] = text(seed=1)[30:]
    before, after = uncached_logits(llama, text()), uncached_logits(llama, changed)
    np.testing.assert_array_equal(before[:30], after[:30])
    assert not np.allclose(before[30:], after[30:], atol=0.1)


def test_logits_of_a_float8_cache_do_not_depend_on_chunk_borders() -> None:
    model = random_llama()
    for layer in model.layers:
        layer.self_attn.k_scale = nnx.data(nnx.Variable(jnp.full((1, 1), 0.02)))
        layer.self_attn.v_scale = nnx.data(nnx.Variable(jnp.array([[0.01], [0.03]])))
    exact = cached_logits(model, text(), 64)
    runs = [cached_logits(model, text(), chunk, jnp.float8_e4m3fn) for chunk in (16, 32, 64)]
    lost = np.abs(runs[-1] - exact)
    assert 0.01 < lost.mean() < 0.1
    for run in runs[:-1]:
        # A last bit may tip a rounding somewhere; an unrounded chunk would cost as much as `lost`.
        assert np.abs(run - runs[-1]).mean() < lost.mean() / 100


def test_scales_of_a_float8_cache_take_effect() -> None:
    """Keys and values that overflow float8 without a scale are kept with one."""
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(1, 4, 2, 8)) * 500, jnp.float32) for _ in range(2))
    positions = jnp.arange(4)[None]
    empty = Entries(*jnp.zeros((2, 1, 2, 4, 8), jnp.float8_e4m3fn))
    k_scale, v_scale = jnp.full((1, 1), 4.0), jnp.array([[5.0], [6.0]])
    stored = write(empty, keys, values, positions, None, k_scale, v_scale)
    stored = [array.astype(jnp.float32) for array in stored]
    np.testing.assert_allclose(
        stored[0][0] * k_scale[..., None], keys[0].swapaxes(0, 1), rtol=0.0625, atol=0.1
    )
    np.testing.assert_allclose(
        stored[1][0] * v_scale[..., None], values[0].swapaxes(0, 1), rtol=0.0625, atol=0.1
    )
    saturated = write(empty, keys, values, positions, None, None, None)
    assert all(jnp.abs(array.astype(jnp.float32)).max() == 448 for array in saturated)


# Batches.


def test_rows_of_a_ragged_batch_equal_single_runs(llama: Llama) -> None:
    """Each in its own row of a larger cache, padded where it is shorter than the others."""
    lengths, rows = [5, 17, 1], [3, 0, 2]
    texts = [text(n, seed=n) for n in lengths]
    tokens = np.stack([np.pad(t, (0, 17 - len(t)), constant_values=9) for t in texts])
    steps = np.arange(17)
    positions = np.where(steps < np.array(lengths)[:, None], steps, 32)
    logits, cache = read(
        llama,
        tokens,
        positions,
        init_cache(CONFIG, 4, 32, jnp.float32),
        rows=jnp.array(rows),
        lengths=jnp.array(lengths),
    )
    for i, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        found = logits[i, :length]
        np.testing.assert_allclose(found, uncached_logits(llama, texts[i]), atol=2e-5)
        for array in jax.tree.leaves(cache):
            assert np.abs(array[row, :, :length]).min() > 0
            assert np.abs(array[row, :, length:]).max() == 0  # padding is written nowhere
    for array in jax.tree.leaves(cache):
        assert np.abs(array[1]).max() == 0  # the row that nobody has


def test_a_padding_row_changes_no_other(llama: Llama) -> None:
    tokens = np.stack([text(8), text(8, seed=1)])
    positions = np.broadcast_to(np.arange(8), (2, 8))
    empty = init_cache(CONFIG, 2, 8, jnp.float32)
    logits, cache = read(llama, tokens, positions, empty, rows=jnp.array([1, 2]))
    np.testing.assert_allclose(logits[0], uncached_logits(llama, text(8)), atol=2e-5)
    assert np.isfinite(logits).all()
    assert all(np.abs(array[0]).max() == 0 for array in jax.tree.leaves(cache))


# The cache.


def test_a_grown_cache_keeps_what_it_holds(llama: Llama) -> None:
    tokens, positions = text()[None], np.arange(LENGTH)[None]
    empty = init_cache(CONFIG, 1, 10, jnp.float32)
    _, cache = read(llama, tokens[:, :10], positions[:, :10], empty)
    grown = grow_cache(cache, 64)
    assert grown.capacity == 64
    logits, _ = read(llama, tokens[:, 10:], positions[:, 10:], grown)
    np.testing.assert_allclose(logits[0], uncached_logits(llama, text())[10:], atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_cache_bytes_are_those_of_the_arrays(dtype: str) -> None:
    cache = init_cache(CONFIG, 3, 5, jnp.dtype(dtype))
    stored = sum(array.nbytes for array in jax.tree.leaves(cache))
    assert stored == 3 * 5 * cache_bytes(CONFIG, jnp.dtype(dtype))


@pytest.mark.parametrize("most", [1 << 28, 200, 1], ids=["at once", "in runs", "one by one"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_softmax_over_what_came_before(
    kv_heads: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qllama.model.kv_cache._MAX_SCORES", most)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 3, 6, 8)).astype(np.float32)
    entries = rng.normal(size=(2, 2, kv_heads, 12, 8)).astype(np.float32)  # keys, values
    positions = np.array([[0, 1, 2], [7, 8, 11]])
    cached = Entries(*jnp.asarray(entries))
    found = attend(jnp.asarray(queries), cached, jnp.asarray(positions))
    for b, t, head in np.ndindex(2, 3, 6):
        keys, values = entries[:, b, head * kv_heads // 6, : positions[b, t] + 1].astype(np.float64)
        weights = np.exp(keys @ queries[b, t, head] / np.sqrt(8))
        expected = weights @ values / weights.sum()
        np.testing.assert_allclose(found[b, t, head], expected, atol=1e-5)


# Rotary embedding.


def angles(config: LlamaConfig, positions: np.ndarray) -> np.ndarray:
    cos, sin = rotary_embedding(config, jnp.asarray(positions)[None])
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    return np.asarray(jnp.arctan2(sin, cos))[0]


def plain_frequencies(theta: float, head_dim: int = 8) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize(
    ("theta", "scaling", "frequencies"),
    [
        (10000.0, None, plain_frequencies(10000.0)),
        (500000.0, None, plain_frequencies(500000.0)),
        (10000.0, LINEAR, plain_frequencies(10000.0) / 4),
        # 30 positions: (2 * 30 / 20 - 1) ^ (8 / 6) times the base.
        (10000.0, DYNAMIC, plain_frequencies(10000.0 * 2 ** (8 / 6))),
    ],
    ids=["plain", "theta", "linear", "dynamic"],
)
def test_angles(theta: float, scaling: RopeScaling | None, frequencies: np.ndarray) -> None:
    config = replace(CONFIG, rope_theta=theta, rope_scaling=scaling)
    found = angles(config, np.arange(30))
    turned = np.exp(1j * found) / np.exp(1j * np.arange(30)[:, None] * frequencies)
    np.testing.assert_allclose(turned, 1, atol=1e-5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    """Of a trained context of 64, wavelengths below 64 / 4 are kept, those above 64 divided."""
    config = replace(CONFIG, head_dim=16, rope_scaling=LLAMA3)
    plain = plain_frequencies(10000.0, 16)
    turns = 64 * plain / (2 * np.pi)
    assert (turns > 4).sum() == 1
    assert ((turns > 1) & (turns < 4)).sum() == 2
    found = angles(config, np.array([1]))[0]  # one token on: the frequencies themselves
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(found[3:], plain[3:] / 8, rtol=1e-5)
    share = (turns[1:3] - 1) / (4 - 1)
    np.testing.assert_allclose(
        found[1:3], share * plain[1:3] + (1 - share) * plain[1:3] / 8, rtol=1e-5
    )


def test_dynamic_scaling_leaves_texts_within_the_trained_context_alone() -> None:
    config = replace(CONFIG, rope_scaling=DYNAMIC)
    np.testing.assert_array_equal(angles(config, np.arange(20)), angles(CONFIG, np.arange(20)))


def test_rotation_pairs_the_halves_of_a_head() -> None:
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    turn = np.random.default_rng(1).normal(size=(1, 5, 4)).astype(np.float32)
    found = np.asarray(apply_rope(jnp.asarray(x), jnp.cos(turn), jnp.sin(turn)))
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * turn)[:, :, None]
    np.testing.assert_allclose(found[..., :4], expected.real, atol=1e-6)
    np.testing.assert_allclose(found[..., 4:], expected.imag, atol=1e-6)


# Norms and Linears.


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype: str, eps: float) -> None:
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in ((3, 48), (48,)))
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)
    found = RMSNorm(weight, eps)(x)
    assert found.dtype == x.dtype
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected * np.asarray(weight, np.float64), rtol=tolerance
    )


def test_every_norm_has_the_eps_of_the_config() -> None:
    model = init_llama(replace(CONFIG, rms_norm_eps=0.125), jax.random.key(0))
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * CONFIG.num_hidden_layers + 1
    assert {norm.eps for norm in norms} == {0.125}


WEIGHT_ONLY = {
    "float": None,
    "int4 group": QuantScheme(weight_dtype="int4", strategy="group", group_size=16),
    "int4 asymmetric": QuantScheme(
        weight_dtype="int4", strategy="group", group_size=16, symmetric=False
    ),
    "int8 channel": QuantScheme(weight_dtype="int8", strategy="channel"),
    "float8 tensor": QuantScheme(weight_dtype="float8_e4m3fn", strategy="tensor"),
}
rng = np.random.default_rng(0)
INPUT = rng.normal(size=(2, 5, 48)).astype(np.float32)
WEIGHT = rng.normal(size=(37, 48)).astype(np.float32)
BIAS = rng.normal(size=37).astype(np.float32)


@pytest.mark.parametrize("backend", ["reference", "xla", "auto"])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_a_linear_adds_its_bias_to_the_product(scheme: QuantScheme | None, backend: str) -> None:
    weight = WEIGHT if scheme is None else quantize_rtn(WEIGHT, scheme)
    values = WEIGHT if isinstance(weight, np.ndarray) else np.asarray(weight.dequantize())
    linear = make_dense(
        jax.tree.map(jnp.asarray, weight), jnp.asarray(BIAS), dtype=jnp.float32, backend=backend
    )
    assert linear.out_features == 37
    expected = INPUT.astype(np.float64) @ values.T.astype(np.float64) + BIAS
    np.testing.assert_allclose(linear(jnp.asarray(INPUT)), expected, atol=1e-4)
    narrow = linear(jnp.asarray(INPUT, jnp.bfloat16), jnp.float32)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, atol=0.3)


@pytest.mark.parametrize("backend", ["reference", "xla", "auto"])
def test_an_int8_linear_rounds_its_input_per_token(backend: str) -> None:
    weight = quantize_rtn(WEIGHT, PRESETS["W8A8"])
    scale = np.abs(INPUT).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(INPUT / scale) * scale
    linear = make_dense(
        jax.tree.map(jnp.asarray, weight), jnp.asarray(BIAS), dtype=jnp.float32, backend=backend
    )
    expected = rounded.astype(np.float64) @ np.asarray(weight.dequantize(), np.float64).T + BIAS
    np.testing.assert_allclose(linear(jnp.asarray(INPUT)), expected, atol=1e-4)
    assert np.abs(INPUT @ WEIGHT.T + BIAS - expected).max() > 0.01  # the rounding is seen


@pytest.mark.parametrize("backend", ["reference", "xla", "auto"])
def test_linears_called_together_answer_as_they_do_alone(backend: str) -> None:
    parts = [quantize_rtn(WEIGHT[:16], PRESETS["W8A8"]), quantize_rtn(WEIGHT[16:], PRESETS["W8A8"])]
    stacked = stack_rows(parts)
    assert stacked is not None

    def dense(weight: object) -> nnx.Module:
        on_device = jax.tree.map(jnp.asarray, weight)
        return make_dense(on_device, dtype=jnp.float32, backend=backend)

    alone = [dense(part)(jnp.asarray(INPUT)) for part in parts]
    for merged in (
        MergedDense([dense(stacked)], [16, 21]),
        MergedDense([dense(part) for part in parts], [16, 21]),
    ):
        answers = merged(jnp.asarray(INPUT))
        assert [answer.shape for answer in answers] == [(2, 5, 16), (2, 5, 21)]
        for answer, expected in zip(answers, alone, strict=True):
            np.testing.assert_allclose(answer, expected, atol=1e-5)
