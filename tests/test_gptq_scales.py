"""Scales against searches and least squares written out in NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gptq_reference import activations, heavy_weight, hessian, loss

from qllama.gptq.scales import Grid, choose_scales, refit_scales, round_to_code, widen
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

K, N = 128, 24
INT4_G32 = QuantScheme(weight_dtype="int4", strategy="group", group_size=32)
INT4_G32_ASYM = replace(INT4_G32, symmetric=False)
INT8_CHANNEL = PRESETS["W8A8"]
INT8_TENSOR = QuantScheme(weight_dtype="int8", strategy="tensor")
INT4_BLOCK = QuantScheme(weight_dtype="int4", strategy="block", block_size=(16, 64))


def _importance() -> np.ndarray:
    return np.diagonal(hessian(activations(256, K))).astype(np.float32)


_quantize_rtn = jax.jit(quantize_rtn, static_argnums=1)


def _rtn(weight: np.ndarray, scheme: QuantScheme, input_scale: float | None = None) -> QTensor:
    return jax.device_get(_quantize_rtn(jnp.asarray(weight), scheme, input_scale=input_scale))


def _expand(values: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    rows, columns = scheme.scale_block((N, K))
    wide = np.repeat(np.repeat(values.astype(np.float64), rows, axis=0), columns, axis=1)
    return wide[:N, :K]


def _block_sums(values: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    rows, columns = scheme.scale_block((N, K))
    row_starts, column_starts = np.arange(0, N, rows), np.arange(0, K, columns)
    return np.add.reduceat(np.add.reduceat(values, row_starts, 0), column_starts, 1)


@pytest.mark.parametrize("name", ["W4A16_ASYM", "FP8_BLOCK"])
def test_absmax_is_round_to_nearest_s_scale(name: str) -> None:
    scheme = PRESETS[name]
    weight = heavy_weight(N, K).astype(ml_dtypes.bfloat16)
    grid = choose_scales(jnp.asarray(weight), scheme, "absmax", jnp.ones(K))
    rounded = _rtn(weight, scheme, 1.0)
    np.testing.assert_array_equal(np.asarray(grid.scales), rounded.scales)
    if rounded.zeros is None:
        assert grid.zeros is None
    else:
        np.testing.assert_array_equal(np.asarray(grid.zeros), rounded.zeros)


@pytest.mark.parametrize(
    ("scheme", "observer"),
    [
        (INT4_G32, "mse"),
        (INT4_G32_ASYM, "hdiag"),
        (INT8_CHANNEL, "hdiag"),
        (INT8_TENSOR, "hdiag"),
        (INT4_BLOCK, "mse"),
    ],
)
def test_search_finds_the_best_of_its_candidates(scheme: QuantScheme, observer: str) -> None:
    weight = heavy_weight(N, K).astype(ml_dtypes.bfloat16)
    importance = _importance()
    grid = choose_scales(jnp.asarray(weight), scheme, observer, jnp.asarray(importance))
    assert grid.scales.dtype == jnp.bfloat16

    start = _rtn(weight, scheme)
    zeros = np.zeros((N, K)) if start.zeros is None else _expand(start.zeros, scheme)
    low, high = (-8, 7) if scheme.bits == 4 else (-128, 127)
    w = weight.astype(np.float64)

    def error(scales: np.ndarray) -> np.ndarray:
        s = _expand(scales, scheme)
        d = np.abs((np.clip(np.round(w / s + zeros), low, high) - zeros) * s - w)
        return _block_sums(d**2.4 if observer == "mse" else importance * d**2, scheme)

    first = 0.99 if observer == "mse" else 1.05
    absmax = start.scales.astype(np.float32)
    candidates = [
        (absmax * np.float32(first - 0.01 * i)).astype(ml_dtypes.bfloat16) for i in range(80)
    ]
    best = np.min([error(c) for c in [start.scales, *candidates]], axis=0)
    found = error(np.asarray(grid.scales))
    # A product at a tie may be stored as the neighbouring bfloat16.
    np.testing.assert_allclose(found, best, rtol=5e-3)
    np.testing.assert_allclose(found.sum(), best.sum(), rtol=1e-4)


def test_features_of_no_importance_do_not_count() -> None:
    weight = heavy_weight(N, K).astype(ml_dtypes.bfloat16)
    weight[:, 32:] *= 100
    importance = np.zeros(K, np.float32)
    importance[:32] = 1
    grid = choose_scales(jnp.asarray(weight), INT8_CHANNEL, "hdiag", jnp.asarray(importance))
    absmax = (np.abs(weight).max(axis=1).astype(np.float32) / 127.5).astype(weight.dtype)
    assert (np.asarray(grid.scales)[:, 0] < 0.4 * absmax).all()
    nothing = choose_scales(jnp.asarray(weight), INT8_CHANNEL, "hdiag", jnp.zeros(K))
    np.testing.assert_array_equal(np.asarray(nothing.scales)[:, 0], absmax)


def test_scales_of_zeros_and_of_tiny_float16_weights() -> None:
    weight = np.zeros((2, 32), np.float16)
    weight[1] = 1e-4
    weight[1, 0] = 5e-4  # of no importance, the others would have a subnormal scale
    importance = np.ones(32, np.float32)
    importance[0] = 0
    grid = choose_scales(jnp.asarray(weight), INT4_G32, "hdiag", jnp.asarray(importance))
    assert np.asarray(grid.scales).tolist() == [[2.0**-10], [2.0**-14]]


def test_codes_of_float8_are_those_of_ml_dtypes() -> None:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    around = [np.nextafter(middles, side, dtype=np.float32) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, -values, middles, *around, [1e-30, -0.0, 1e30, -1e30, 448.1]])
    rounded = jax.jit(round_to_code, static_argnums=2)(
        jnp.asarray(x, jnp.float32), None, PRESETS["FP8_DYNAMIC"]
    )
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(rounded), expected)


def test_wide_grid_repeats_rows_of_blocks_and_of_whole_tensors() -> None:
    blocks = Grid(jnp.arange(4.0).reshape(2, 2), None)
    wide = widen([blocks, blocks], (20, 17), INT4_BLOCK)
    expected = np.repeat([[0.0, 2.0], [1.0, 3.0]], 16, axis=1)
    np.testing.assert_array_equal(
        np.asarray(wide.scales), np.concatenate([expected[:, :20], expected[:, :17]], axis=1)
    )
    tensor = Grid(jnp.full((1, 1), 0.5, jnp.bfloat16), None)
    np.testing.assert_array_equal(
        np.asarray(widen([tensor], (3,), INT8_TENSOR).scales), np.full((1, 3), 0.5, np.float32)
    )


@pytest.mark.parametrize("scheme", [INT4_G32_ASYM, INT8_CHANNEL], ids=QuantScheme.describe)
def test_refit_is_least_squares(scheme: QuantScheme) -> None:
    weight = heavy_weight(N, K)
    h = hessian(activations(512, K)) + 0.01 * np.eye(K)
    rounded = _rtn(weight, replace(scheme, weight_dtype="int8"))
    # A spoiled grid, so that there is something to find.
    grid = Grid(jnp.asarray(rounded.scales * 1.1), rounded.zeros)
    fitted = refit_scales(
        jnp.asarray(weight), jnp.asarray(rounded.codes), grid, jnp.asarray(h, jnp.float32)
    )
    zeros = np.zeros((N, K)) if rounded.zeros is None else _expand(rounded.zeros, scheme)
    z = rounded.codes.astype(np.float64) - zeros
    groups = fitted.scales.shape[1]
    member = np.repeat(np.eye(groups), K // groups, axis=0)
    for n in range(N):
        root = np.linalg.cholesky(h).T  # |r @ d|^2 = d h d
        design = root @ (z[n][:, None] * member)
        expected, *_ = np.linalg.lstsq(design, root @ weight[n].astype(np.float64))
        np.testing.assert_allclose(np.asarray(fitted.scales)[n], expected, rtol=1e-3)
    before = loss(weight - z * _expand(np.asarray(grid.scales), scheme), h)
    after = loss(weight - z * _expand(np.asarray(fitted.scales), scheme), h)
    assert after < 0.8 * before


def test_refit_leaves_alone_what_it_cannot_better() -> None:
    h = hessian(activations(512, K)).astype(np.float32)
    z = np.random.default_rng(3).integers(-8, 8, size=(3, K)).astype(np.int8)
    z[1, 32:64] = 0  # a group that no scale can help
    scales = np.full((3, 4), 0.5, np.float32)
    weight = z * np.repeat(scales, 32, axis=1)
    weight[2] = -weight[2]  # only a negative scale would fit
    fitted = refit_scales(
        jnp.asarray(weight), jnp.asarray(z), Grid(jnp.asarray(scales), None), jnp.asarray(h)
    )
    np.testing.assert_allclose(np.asarray(fitted.scales), scales, rtol=1e-5)
    assert np.asarray(fitted.scales)[1, 1] == 0.5
    np.testing.assert_array_equal(np.asarray(fitted.scales)[2], scales[2])
