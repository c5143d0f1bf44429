"""Second moments of calibration tokens against float64, and what is left out of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gptq_reference import activations, hessian, loss

from qllama.gptq.hessian import (
    Hessian,
    accumulate,
    default_dampening_frac,
    energy,
    examine,
    second_moments,
)


def _collect(*chunks: np.ndarray) -> Hessian:
    """Of chunks `[tokens, K]`, padded so that one program serves all of a dtype."""
    collected = Hessian.zeros(chunks[0].shape[-1])
    for chunk in chunks:
        mask = np.arange(400) < len(chunk)
        padded = np.pad(chunk, [(0, 400 - len(chunk)), (0, 0)])
        collected = accumulate(collected, jnp.asarray(padded), jnp.asarray(mask))
    return collected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("k", [96, 1200])  # one panel, two
def test_moments_are_those_of_float64(dtype: str, k: int) -> None:
    x = activations(300, k).astype(jnp.dtype(dtype))
    collected = _collect(x[:200], x[200:])
    assert int(collected.tokens) == 300
    expected = hessian(x)
    moments = np.asarray(second_moments(collected))
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(moments, moments.T)


def test_products_of_bfloat16_are_not_rounded() -> None:
    x = activations(1, 96)
    exact = np.outer(x.astype(np.float32), x.astype(np.float32))  # 16 bits of 24
    np.testing.assert_array_equal(np.triu(_collect(x).total), np.triu(exact))


def test_sums_of_parts_add_up() -> None:
    x = activations(64, 96)
    parts = jax.tree.map(jnp.add, _collect(x[:40]), _collect(x[40:]))
    whole = _collect(x)
    assert int(parts.tokens) == int(whole.tokens) == 64
    expected = np.asarray(second_moments(whole))
    np.testing.assert_allclose(np.asarray(second_moments(parts)), expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    x = activations(50, 96).astype(np.float32)
    good = x.copy()
    x[3, 5], x[7], x[11, 90] = np.nan, np.inf, 1e30  # the square of the last is infinite
    collected = _collect(x)
    assert int(collected.dropped) == 3
    assert int(collected.tokens) == 47
    expected = hessian(np.delete(good, [3, 7, 11], axis=0))
    moments = np.asarray(second_moments(collected))
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_tokens_may_be_a_batch_and_need_no_mask() -> None:
    x = activations(60, 96)
    batch = accumulate(Hessian.zeros(96), jnp.asarray(x.reshape(3, 20, 96)))
    assert (int(batch.tokens), int(batch.dropped)) == (60, 0)
    expected = np.asarray(second_moments(_collect(x)))
    np.testing.assert_allclose(np.asarray(second_moments(batch)), expected, rtol=1e-4, atol=1e-5)


def test_padding_counts_neither_way() -> None:
    x = activations(24, 96).reshape(2, 12, 96)
    mask = np.ones((2, 12), bool)
    mask[1, 8:] = False
    x[1, 9] = np.nan
    collected = accumulate(Hessian.zeros(96), jnp.asarray(x), jnp.asarray(mask))
    assert (int(collected.tokens), int(collected.dropped)) == (20, 0)
    expected = hessian(x[mask])
    moments = np.asarray(second_moments(collected))
    np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (np.zeros((4, 96), np.int8), None, "int8; give bfloat16"),
        (np.zeros((4, 64), np.float32), None, r"\[4, 64\], but the Hessian is of K=96"),
        (np.zeros((4, 96), np.float32), np.ones(3, bool), r"mask is \[3\], but the tokens are"),
    ],
)
def test_what_does_not_fit_is_refused(x: np.ndarray, mask: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate(Hessian.zeros(96), jnp.asarray(x), None if mask is None else jnp.asarray(mask))


@pytest.mark.parametrize("k", [96, 1200])
def test_energy_is_the_mean_squared_output(k: int) -> None:
    x = activations(300, k)
    d = np.random.default_rng(2).normal(size=(5, k)).astype(np.float32)
    outputs = d.astype(np.float64) @ x.astype(np.float64).T
    ours = energy(jnp.asarray(d), second_moments(_collect(x)))
    np.testing.assert_allclose(np.asarray(ours), (outputs**2).mean(axis=1), rtol=1e-5)
    assert np.asarray(ours).sum() == pytest.approx(loss(d, hessian(x)), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "frac"), [(575, 0.1), (576, 0.05), (2303, 0.05), (2304, 0.01), (10**6, 0.01)]
)
def test_fewer_tokens_need_more_damping(tokens: int, frac: float) -> None:
    assert default_dampening_frac(tokens, 576) == frac


def test_inspection_reports_dead_features_and_massive_ones() -> None:
    x = activations(400, 96, outliers=0).astype(np.float32)
    x[:, [4, 50]] = 0
    x[:, 7] *= 300
    x = x.astype(ml_dtypes.bfloat16)
    diagonal = np.diagonal(hessian(x))
    live = diagonal[diagonal > 0]

    moments = examine(_collect(x))
    assert moments.trouble is None
    assert moments.dead_columns == 2
    assert np.flatnonzero(np.asarray(moments.dead)).tolist() == [4, 50]
    assert moments.mean == moments.reference == pytest.approx(live.mean(), rel=1e-5)
    assert moments.diag_ratio == pytest.approx(live.max() / np.median(live), rel=1e-5)
    damping = np.asarray(moments.damping(0.01))
    np.testing.assert_allclose(damping[[0, 4]], live.mean() * np.array([0.01, 1.01]), rtol=1e-5)

    clipped = examine(_collect(x), "clipmean")
    expected = np.minimum(live, 10 * np.median(live)).mean()
    assert clipped.reference == pytest.approx(expected, rel=1e-5)
    assert clipped.reference < live.mean() / 50


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((40, 96), np.float32), "nothing but zeros in 40 calibration tokens"),
        (np.full((40, 96), 1.8e18, np.float32), "not finite"),  # the trace
        (np.full((200, 96), 1.8e18, np.float32), "not finite"),  # every entry
        (np.full((40, 96), np.nan, np.float32), "nothing but zeros in 0 calibration tokens"),
    ],
)
def test_useless_calibration_becomes_the_identity(x: np.ndarray, message: str) -> None:
    moments = examine(_collect(x))
    assert moments.trouble is not None
    assert message in moments.trouble
    np.testing.assert_array_equal(np.asarray(moments.matrix), np.eye(96))


def test_too_few_tokens_keep_their_diagonal() -> None:
    x = activations(11, 96)
    moments = examine(_collect(x))
    assert moments.trouble == "11 calibration tokens are too few for 96 features; give 384 or more"
    np.testing.assert_allclose(np.diagonal(moments.matrix), np.diagonal(hessian(x)), rtol=1e-5)
    assert examine(_collect(activations(12, 96))).trouble is None
