"""Whole weights: what is returned and reported, and what happens when calibration is bad."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gptq_reference import activations, heavy_weight, hessian, loss

from qllama.gptq.hessian import Hessian, accumulate
from qllama.gptq.linear import GPTQOptions, GPTQReport, quantize_gptq
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

K = 384
W4A16 = PRESETS["W4A16"]
PLAIN = GPTQOptions(observer="absmax")


def _weight(seed: int = 1) -> np.ndarray:
    return heavy_weight(48, K, seed=seed).astype(ml_dtypes.bfloat16)


def _collect(x: np.ndarray) -> Hessian:
    """Of `x [tokens, K]`, padded so that one program serves all tests."""
    mask = np.arange(2048) < len(x)
    x = np.pad(x.astype(np.float32), [(0, 2048 - len(x)), (0, 0)])
    return accumulate(Hessian.zeros(K), jnp.asarray(x), jnp.asarray(mask))


_quantize_rtn = jax.jit(quantize_rtn, static_argnums=1)


def _rtn(
    weight: np.ndarray, scheme: QuantScheme = W4A16, input_scale: float | None = None
) -> QTensor:
    return jax.device_get(
        _quantize_rtn(jnp.asarray(weight), scheme, input_scale=input_scale, input_zero=None)
    )


def _errors(weight: np.ndarray, quantized: jax.Array) -> np.ndarray:
    return weight.astype(np.float64) - np.asarray(quantized, np.float64)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8"])
def test_report_tells_the_truth(name: str) -> None:
    scheme = PRESETS[name]
    x, weight = activations(2048, K), _weight()
    input_scale = 0.5 if name == "FP8" else None
    [result] = quantize_gptq([weight], _collect(x), scheme, input_scale=input_scale)
    tensor, report = result.weight, result.report

    tensor.validate()
    assert isinstance(tensor.codes, np.ndarray)
    assert tensor.scales.dtype == ml_dtypes.bfloat16
    assert tensor.g_idx is None
    assert (tensor.input_scale is None) == (input_scale is None)

    outputs = x.astype(np.float64) @ _errors(weight, tensor.dequantize()).T
    rtn = _rtn(weight, scheme, input_scale)
    rtn_errors = _errors(weight, rtn.dequantize())
    assert report.loss == pytest.approx((outputs**2).sum(axis=1).mean(), rel=1e-4)
    assert report.rtn_loss == pytest.approx(loss(rtn_errors, hessian(x)), rel=1e-4)
    energy = np.square(x.astype(np.float64) @ weight.astype(np.float64).T).sum(axis=1).mean()
    assert report.output_energy == pytest.approx(energy, rel=1e-4)
    assert report.sqnr_db == pytest.approx(10 * np.log10(energy / report.loss), abs=0.01)
    assert (report.rung, report.notes, report.tokens, report.shape) == ("fp32", (), 2048, (48, K))
    assert report.dampening_frac == 0.01
    assert report.damping == pytest.approx(0.01 * np.diagonal(hessian(x)).mean(), rel=1e-4)

    # Outputs get better than by rounding to nearest while weights get worse.
    assert report.loss_ratio < 0.5
    assert np.square(_errors(weight, tensor.dequantize())).sum() > np.square(rtn_errors).sum()


def test_order_search_and_refit_each_lower_the_loss() -> None:
    options = [
        GPTQOptions(observer="absmax", actorder=None),
        PLAIN,
        GPTQOptions(observer="hdiag"),
        GPTQOptions(observer="hdiag", refit=True),
    ]
    weight, collected = _weight(), _collect(activations(2048, K))
    losses = [quantize_gptq([weight], collected, W4A16, o)[0].report.loss for o in options]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.7 * losses[0]


def test_codes_are_those_that_were_solved() -> None:
    # Uncorrelated features, so that they are known: the nearest, here in float32.
    x = np.eye(K, dtype=np.float32) * np.linspace(1, 3, K, dtype=np.float32)
    weight = _weight().astype(np.float32)
    [result] = quantize_gptq([jnp.asarray(weight)], _collect(x), W4A16, PLAIN)
    expected = _rtn(weight)
    assert isinstance(result.weight.codes, jax.Array)
    np.testing.assert_array_equal(np.asarray(result.weight.codes), expected.codes)
    np.testing.assert_array_equal(np.asarray(result.weight.scales), expected.scales)
    assert result.report.loss == result.report.rtn_loss
    assert result.report.rung == "fp32"


def test_weights_of_one_input_get_what_they_get_alone() -> None:
    collected = _collect(activations(2048, K))
    weights = [_weight()[:24], _weight()[24:]]
    together = quantize_gptq(weights, collected, W4A16, PLAIN)
    for weight, result in zip(weights, together, strict=True):
        [alone] = quantize_gptq([weight], collected, W4A16, PLAIN)
        assert np.mean(alone.weight.codes == result.weight.codes) > 0.999
        np.testing.assert_array_equal(alone.weight.scales, result.weight.scales)
        assert alone.report.loss == pytest.approx(result.report.loss, rel=1e-3)
        assert alone.report.shape == result.report.shape == weight.shape


def test_same_inputs_give_the_same_bits() -> None:
    collected = _collect(activations(2048, K))
    options = GPTQOptions(refit=True)
    first, second = (quantize_gptq([_weight()], collected, W4A16, options)[0] for _ in range(2))
    assert first.report == second.report
    for ours, theirs in zip(
        jax.tree.leaves(first.weight), jax.tree.leaves(second.weight), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()


def test_massive_channel_raises_the_damping_less_when_clipped() -> None:
    x = activations(2048, K, outliers=0).astype(np.float32)
    x[:, 9] *= 300
    collected = _collect(x.astype(ml_dtypes.bfloat16))
    reports = [
        quantize_gptq([_weight()], collected, W4A16, replace(PLAIN, dampening_reference=r))[
            0
        ].report
        for r in ("mean", "clipmean")
    ]
    assert reports[1].damping < reports[0].damping / 20
    assert reports[1].loss < reports[0].loss
    assert reports[0].diag_ratio > 1e4


# The ladder.


def _solve(x: np.ndarray, options: GPTQOptions = PLAIN) -> GPTQReport:
    [result] = quantize_gptq([_weight()], _collect(x), W4A16, options)
    result.weight.validate()
    assert np.isfinite(np.asarray(result.weight.dequantize())).all()
    assert result.report.loss <= result.report.rtn_loss
    return result.report


def test_bad_tokens_are_dropped_and_reported() -> None:
    x = activations(2048, K)
    clean = _solve(x[:-3])
    x[-3, 0], x[-2], x[-1, 7] = np.nan, np.inf, -np.inf
    report = _solve(x)
    assert (report.dropped_tokens, report.tokens, report.rung) == (3, 2045, "fp32")
    assert report.notes == ("3 calibration tokens were not finite and were left out",)
    assert report.loss == clean.loss


def test_singular_hessian_is_factored_in_float64() -> None:
    # A third as many tokens as features, of whole numbers so that their sum is exact.
    x = np.round(4 * activations(128, K, outliers=0).astype(np.float32))
    report = _solve(x.astype(ml_dtypes.bfloat16), replace(PLAIN, dampening_frac=1e-6))
    assert (report.rung, report.dampening_frac) == ("fp64", 1e-6)
    assert report.notes == ("fp32, damping 1e-06: the Hessian is not positive definite",)
    assert report.loss < 0.1 * report.rtn_loss


def test_indefinite_hessian_is_damped_more() -> None:
    collected = _collect(activations(2048, K))
    # As if a broken sum: an eigenvalue of -5 % of the mean of the diagonal.
    upper = np.triu(collected.total)
    values, vectors = np.linalg.eigh(upper + np.triu(upper, 1).T)
    values[0] = -0.05 * values.mean()
    broken = replace(collected, total=jnp.asarray(vectors * values @ vectors.T))
    [result] = quantize_gptq([_weight()], broken, W4A16, replace(PLAIN, dampening_frac=0.01))
    report = result.report
    assert (report.rung, report.dampening_frac) == ("damped", 0.1)
    assert [note.partition(":")[0] for note in report.notes] == [
        "fp32, damping 0.01",
        "fp64, damping 0.01",
    ]


def test_hopeless_hessian_is_rounded_to_nearest() -> None:
    collected = _collect(activations(2048, K))
    diagonal = jnp.diag(jnp.diagonal(collected.total))
    broken = replace(collected, total=2 * diagonal - collected.total)  # as much below as above
    [result] = quantize_gptq([_weight()], broken, W4A16, replace(PLAIN, dampening_frac=0.1))
    report = result.report
    assert (report.rung, report.dampening_frac, report.damping) == ("rtn", 0.0, 0.0)
    assert [note.partition(":")[0] for note in report.notes] == [
        "fp32, damping 0.1",
        "fp64, damping 0.1",
        "damped, damping 0.3",
        "rounded to nearest",
    ]
    steps = np.repeat(np.asarray(result.weight.scales, np.float32), 128, axis=1)
    # Half a step, and what rounding a scale to bfloat16 moves 7.5 of them.
    assert (np.abs(_errors(_weight(), result.weight.dequantize())) <= 0.54 * steps).all()


LOUD = np.zeros((200, K), np.float32)
LOUD[:, 0] = 1.8e18  # squares are finite, their sum is not


@pytest.mark.parametrize(
    ("x", "note"),
    [
        (np.zeros((64, K), np.float32), "nothing but zeros in 64 calibration tokens"),
        (LOUD, "the sum over the calibration tokens is not finite"),
        (activations(40, K), "40 calibration tokens are too few for 384 features; give 1536"),
    ],
)
def test_useless_calibration_is_rounded_to_nearest(x: np.ndarray, note: str) -> None:
    report = _solve(x, GPTQOptions())
    assert report.rung == "rtn"
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"rounded to nearest: {note}")


def test_no_finite_token_is_rounded_to_nearest() -> None:
    report = _solve(np.full((64, K), np.nan, np.float32))
    assert (report.rung, report.tokens, report.dropped_tokens) == ("rtn", 0, 64)
    assert report.notes[1] == "rounded to nearest: nothing but zeros in 0 calibration tokens"


def test_dead_features_are_rounded_to_nearest_and_disturb_nothing() -> None:
    x, weight = activations(2048, K), _weight().astype(np.float32)
    x[:, :8] = 0
    [result] = quantize_gptq([weight], _collect(x), W4A16, PLAIN)
    assert (result.report.dead_columns, result.report.rung) == (8, "fp32")
    rounded = np.asarray(_rtn(weight).dequantize())
    np.testing.assert_array_equal(np.asarray(result.weight.dequantize())[:, :8], rounded[:, :8])
    assert result.report.loss < 0.6 * result.report.rtn_loss


def test_rows_and_columns_of_zeros_stay_zero() -> None:
    x, weight = activations(2048, K), _weight()
    weight[3] = 0
    weight[:, 128:256] = 0
    [result] = quantize_gptq([weight], _collect(x), W4A16, GPTQOptions(refit=True))
    assert result.report.rung == "fp32"
    quantized = np.asarray(result.weight.dequantize())
    assert not quantized[3].any()
    # A group of zeros still has a scale, so columns may take up what others lost, if not much.
    assert np.abs(quantized[:, 128:256]).max() <= 0.07
    [nothing] = quantize_gptq([np.zeros_like(weight)], _collect(x), W4A16)
    assert not np.asarray(nothing.weight.dequantize()).any()
    report = nothing.report
    assert (report.loss_ratio, report.relative_error, report.sqnr_db) == (1.0, 0.0, np.inf)


def test_worse_than_round_to_nearest_is_not_kept() -> None:
    # Mean squared error clips the one weight of each group that carries all of the output.
    weight = np.random.default_rng(5).uniform(-0.5, 0.5, size=(48, K)).astype(np.float32)
    loud = np.arange(0, K, 128)
    weight[:, loud] = 1.0
    x = np.eye(K, dtype=np.float32)
    x[loud, loud] = 300
    [result] = quantize_gptq([weight], _collect(x), W4A16, GPTQOptions(observer="mse"))
    report = result.report
    assert report.rung == "rtn"
    assert report.loss == report.rtn_loss
    assert report.clipped == 0
    assert report.notes[-1].startswith("kept round-to-nearest: the solve lost")
    expected = _rtn(weight)
    np.testing.assert_array_equal(result.weight.codes, expected.codes)
    np.testing.assert_array_equal(result.weight.scales, expected.scales)


# What is refused.


@pytest.mark.parametrize(
    ("weights", "scheme", "options", "message"),
    [
        ([], W4A16, PLAIN, "no weight"),
        ([_weight()[:, :256]], W4A16, PLAIN, r"\[48, 256\], but the Hessian is of K=384"),
        ([_weight(), _weight().astype(np.float32)], W4A16, PLAIN, "bfloat16 and float32"),
        ([_weight()], replace(W4A16, group_size=256), PLAIN, "K=384 is not a multiple"),
        ([_weight() * np.nan], W4A16, PLAIN, "18432 of 18432 weights are NaN or infinite"),
        ([_weight()], PRESETS["FP8_BLOCK"], GPTQOptions(refit=True), "one scale per block"),
    ],
)
def test_what_cannot_be_solved_is_refused(
    weights: list[np.ndarray], scheme: QuantScheme, options: GPTQOptions, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_gptq(weights, _collect(activations(64, K)), scheme, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actorder": "group"}, "'group' is only read"),
        ({"observer": "minmax"}, "observer='minmax'; use one of"),
        ({"dampening_frac": -0.1}, r"dampening_frac=-0.1; it must be within \[0, 1\]"),
        ({"dampening_reference": "max"}, "dampening_reference='max'; use one of"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQOptions(**options)
