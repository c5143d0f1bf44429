"""Batches, streams, observers and SmoothQuant's arithmetic, against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gptq_reference import activations, heavy_weight, hessian

from qllama.gptq.batches import Stream, make_batches
from qllama.gptq.hessian import second_moments
from qllama.gptq.observers import InputObserver, fp8_scale
from qllama.gptq.smoothquant import (
    fold_into_norm,
    smooth_hessian,
    smooth_weight,
    smoothing_factors,
)

K = 64


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 64, 1000])
def test_every_token_is_in_one_batch(tokens_per_batch: int) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 99, n).astype(np.int32) for n in [40, 3, 17, 40, 21, 8, 40, 1]]
    batches = make_batches(sequences, tokens_per_batch, jax.devices()[:1])
    found = []
    for batch in batches:
        rows, length = batch.tokens.shape
        assert rows == 1 or rows * length <= tokens_per_batch
        mask = np.asarray(batch.mask)
        assert not batch.tokens[~mask].any()
        for row, size in enumerate(np.asarray(batch.lengths)):
            np.testing.assert_array_equal(mask[row], np.arange(length) < size)
            if size:
                found.append(batch.tokens[row, :size].tolist())
    assert sorted(found) == sorted(sequence.tolist() for sequence in sequences)
    assert len({batch.tokens.shape[1] for batch in batches}) <= 4  # each is compiled for


def test_sequences_of_one_length_are_not_padded() -> None:
    batches = make_batches([np.ones(32, np.int32)] * 10, 128, jax.devices()[:1])
    assert [batch.tokens.shape for batch in batches] == [(4, 32), (4, 32), (4, 32)]
    assert sum(int(batch.mask.sum()) for batch in batches) == 320


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_stream_can_be_rewritten_while_it_is_read(on_device: bool, count: int) -> None:
    arrays = [np.full((2, 3), i, ml_dtypes.bfloat16) for i in range(4)]
    batches = make_batches([np.ones(8, np.int32)] * 4, 8, jax.devices()[:count])
    stream = Stream(batches, on_device=on_device)
    for i, array in enumerate(arrays):
        stream[i] = jax.device_put(array, batches[i].device)
    stream.finish()
    for _ in range(2):
        for i in range(4):
            assert stream[i].device == batches[i].device
            stream[i] = stream[i] * 2 + 1
        stream.finish()
    for i, array in enumerate(arrays):
        assert stream[i].dtype == jnp.bfloat16
        np.testing.assert_array_equal(stream[i], 4 * array + 3)


def test_observer_leaves_out_padding_and_broken_tokens() -> None:
    x = activations(24, K).reshape(2, 12, K)
    mask = np.arange(12) < np.array([[12], [7]])
    x[1, 7:] = 1000  # padding
    x[0, 3, 5] = np.inf
    observer = InputObserver.of(K, hessian=True, absmax=True)
    assert observer is not None
    for row in range(2):
        observer.see(jnp.asarray(x[row : row + 1]), jnp.asarray(mask[row : row + 1]))
    mask[0, 3] = False
    counted = x[mask].astype(np.float64)
    assert observer.hessian is not None
    np.testing.assert_allclose(second_moments(observer.hessian), hessian(counted), rtol=1e-5)
    np.testing.assert_array_equal(observer.absmax, np.abs(counted).max(axis=0))
    assert int(observer.bad) == 1  # type: ignore[call-overload]


def test_observers_on_several_devices_add_up() -> None:
    x = activations(40, K).reshape(4, 10, K)
    x[3, 1, 2] = np.nan
    devices = jax.devices()[:3]
    observer = InputObserver.of(K, hessian=True, absmax=True)
    assert observer is not None
    seen = observer.spread(devices)
    assert seen[devices[0]] is observer
    for i, row in enumerate(x):
        there = jax.device_put((row[None], np.ones((1, 10), bool)), devices[i % 3])
        seen[devices[i % 3]].see(*there)
    for device in devices[1:]:
        observer.add(seen[device])
    counted = np.delete(x.reshape(40, K), 31, axis=0).astype(np.float64)
    assert observer.hessian is not None
    assert int(observer.hessian.tokens) == 39
    np.testing.assert_allclose(second_moments(observer.hessian), hessian(counted), rtol=1e-4)
    np.testing.assert_array_equal(observer.absmax, np.abs(counted).max(axis=0))
    assert (observer.tokens, int(observer.bad)) == (40, 1)  # type: ignore[call-overload]


def test_observing_nothing_needs_no_observer() -> None:
    assert InputObserver.of(K, hessian=False, absmax=False) is None


@pytest.mark.parametrize(
    ("absmax", "scale"), [(448.0, 1.0), (3.5, 3.5 / 448), (0.0, 1.0), (1e-37, 2.0**-126)]
)
def test_fp8_scale(absmax: float, scale: float) -> None:
    assert fp8_scale(np.float32([absmax, absmax / 2])) == np.float32(scale)


def test_smoothing_leaves_the_product_as_it_was() -> None:
    """`y = (x * norm) W^T` for what the norm and the weights are after it, up to bfloat16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, K))
    norm = rng.uniform(0.5, 1.5, K).astype(ml_dtypes.bfloat16)
    norm[[3, 20]] *= np.asarray(30, norm.dtype)
    norm[7] = 0
    weights = [heavy_weight(n, K, seed=n).astype(ml_dtypes.bfloat16) for n in (16, 8)]
    seen = x * norm.astype(np.float64)
    absmax = np.abs(seen).max(axis=0).astype(np.float32)

    factors = smoothing_factors(absmax, weights, 0.8)
    widest = np.max([np.abs(w.astype(np.float64)).max(axis=0) for w in weights], axis=0)
    live = absmax > 0
    np.testing.assert_allclose(factors[live], (absmax**0.8 / widest**0.2)[live], rtol=1e-5)
    assert factors[7] == 1

    smoothed, exact = fold_into_norm(norm, factors)
    assert smoothed.dtype == norm.dtype
    np.testing.assert_allclose(exact, factors, rtol=2**-8)
    for weight in weights:
        expected = seen @ weight.astype(np.float64).T
        changed = smooth_weight(weight, exact)
        assert changed.dtype == weight.dtype
        found = (x * smoothed.astype(np.float64)) @ changed.astype(np.float64).T
        assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 3e-3

    observer = InputObserver.of(K, hessian=True, absmax=False)
    assert observer is not None
    observer.see(jnp.asarray(seen[None], jnp.float32), jnp.ones((1, 200), bool))
    assert observer.hessian is not None
    found = second_moments(smooth_hessian(observer.hessian, exact))
    expected = hessian(x * smoothed.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
