"""The blocked float32 solver against the paper's column-by-column algorithm in float64."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gptq_reference import Solved, activations, heavy_weight, hessian, loss
from gptq_reference import solve as solve_float64
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qllama.gptq.scales import Grid
from qllama.gptq.solver import factor, solve
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

INT4_G64 = QuantScheme(weight_dtype="int4", strategy="group", group_size=64)
INT4_G128_ASYM = PRESETS["W4A16_ASYM"]
INT8_CHANNEL = PRESETS["W8A8"]
N = 48  # as in the tests of whole weights: programs are shared


class Case(NamedTuple):
    """One weight, its damped Hessian and its grid, on both sides."""

    weight: np.ndarray
    h: np.ndarray  # float64, not damped
    damping: np.ndarray
    order: np.ndarray
    scheme: QuantScheme
    wide: Grid

    def solve(self, *, super_block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        h = jnp.asarray(self.h, jnp.float32)
        order = jnp.asarray(self.order)
        factors = factor(h, jnp.asarray(self.damping, jnp.float32), order, wide=False)
        codes, loss = solve(
            jnp.asarray(self.weight),
            factors,
            order,
            self.wide,
            self.scheme,
            super_block=super_block,
        )
        return np.asarray(codes), np.asarray(loss)

    def solve_float64(self) -> Solved:
        low, high = (-8, 7) if self.scheme.bits == 4 else (-128, 127)
        damped = self.h + np.diag(self.damping)
        scales, zeros = self.grid()
        return solve_float64(self.weight, damped, self.order, scales, zeros, (low, high))

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros of every weight, `[N, K]`."""
        columns = self.weight.shape[1] // self.wide.scales.shape[0]
        scales = np.repeat(np.asarray(self.wide.scales).T, columns, axis=1)
        if self.wide.zeros is None:
            return scales, np.zeros_like(scales)
        return scales, np.repeat(np.asarray(self.wide.zeros).T, columns, axis=1)

    def errors(self, codes: np.ndarray) -> np.ndarray:
        scales, zeros = self.grid()
        return self.weight.astype(np.float32) - (codes - zeros) * scales


def _case(
    k: int,
    scheme: QuantScheme,
    *,
    actorder: bool = True,
    dtype: type = ml_dtypes.bfloat16,
) -> Case:
    weight: np.ndarray = heavy_weight(N, k).astype(dtype)
    h = hessian(activations(2048, k))
    diagonal = np.diagonal(h)
    order = np.argsort(-diagonal, stable=True) if actorder else np.arange(k)
    return Case(
        weight=weight,
        h=h,
        damping=np.full(k, 0.01 * diagonal.mean()),
        order=order,
        scheme=scheme,
        wide=_absmax(weight, scheme),
    )


def _absmax(weight: np.ndarray, scheme: QuantScheme) -> Grid:
    """The smallest scales that reach every weight, rounded to the weight's dtype."""
    n, k = weight.shape
    _, columns = scheme.scale_block((n, k))
    groups = weight.astype(np.float32).T.reshape(k // columns, columns, n)
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
    steps = 2.0**scheme.bits - 1
    if scheme.symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / np.float32(steps)).astype(weight.dtype).astype(np.float32)
    if scheme.symmetric:
        return Grid(jnp.asarray(scales), None)
    zeros = np.clip(np.round(-(2.0 ** (scheme.bits - 1)) - low / scales), -8, 7)
    return Grid(jnp.asarray(scales), jnp.asarray(zeros, jnp.float32))


@partial(jax.jit, static_argnums=1)
def _quantize_rtn(weight: jax.Array, scheme: QuantScheme) -> jax.Array:
    return quantize_rtn(weight, scheme).dequantize()


def _round_to_nearest(weight: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    return np.asarray(_quantize_rtn(jnp.asarray(weight), scheme))


@pytest.mark.parametrize(
    ("k", "scheme", "actorder"),
    [
        (384, INT8_CHANNEL, True),
        (576, INT4_G64, True),
        (576, INT4_G64, False),
        (640, INT4_G128_ASYM, True),
    ],
)
def test_solution_is_that_of_float64(k: int, scheme: QuantScheme, actorder: bool) -> None:
    case = _case(k, scheme, actorder=actorder)
    codes, account = case.solve()
    expected = case.solve_float64()
    assert np.mean(codes == expected.codes) > 0.995
    ours = loss(case.errors(codes), case.h)
    theirs = loss(case.weight.astype(np.float64) - expected.weight, case.h)
    assert ours == pytest.approx(theirs, rel=1e-3)
    np.testing.assert_allclose(account.sum(), expected.loss.sum(), rtol=1e-3)

    # What the recursion adds up is the damped loss of the codes it gives.
    damped = case.h + np.diag(case.damping)
    assert account.sum() == pytest.approx(loss(case.errors(codes), damped), rel=1e-4)

    # Far better than rounding each weight by itself: worse weights, better outputs.
    scales, zeros = case.grid()
    limits = (-8, 7) if scheme.bits == 4 else (-128, 127)
    nearest = case.errors(
        np.clip(np.round(case.weight.astype(np.float32) / scales + zeros), *limits)
    )
    assert ours < 0.6 * loss(nearest, case.h)
    assert np.square(case.errors(codes)).sum() > 1.05 * np.square(nearest).sum()


def test_super_blocks_hand_on_their_errors() -> None:
    case = _case(640, INT4_G128_ASYM)
    codes, account = case.solve(super_block=256)
    assert np.mean(codes == case.solve_float64().codes) > 0.995
    damped = case.h + np.diag(case.damping)
    assert account.sum() == pytest.approx(loss(case.errors(codes), damped), rel=1e-4)


@pytest.mark.parametrize(("k", "scheme"), [(576, INT4_G64), (640, INT4_G128_ASYM)])
def test_uncorrelated_features_give_round_to_nearest(k: int, scheme: QuantScheme) -> None:
    case = _case(k, scheme, dtype=np.float32)
    case = case._replace(h=np.diag(np.diagonal(case.h)))
    codes, _ = case.solve()
    scales, zeros = case.grid()
    rounded = _round_to_nearest(case.weight, scheme)
    np.testing.assert_array_equal((codes - zeros) * scales, rounded)


def test_order_of_the_inputs_does_not_matter() -> None:
    case = _case(384, INT8_CHANNEL)
    shuffle = np.random.default_rng(4).permutation(384)
    h = case.h[np.ix_(shuffle, shuffle)]
    order = np.argsort(-np.diagonal(h), stable=True)
    shuffled = case._replace(weight=case.weight[:, shuffle], h=h, order=order)
    np.testing.assert_array_equal(shuffled.solve()[0], case.solve()[0][:, shuffle])


def test_rows_of_padding_change_nothing() -> None:
    case = _case(576, INT4_G64)
    codes, account = case.solve()
    weight = case.weight.copy()
    weight[32:] = 0
    padded_codes, padded_account = case._replace(weight=weight).solve()
    np.testing.assert_array_equal(padded_codes[:32], codes[:32])
    np.testing.assert_array_equal(padded_account[:32], account[:32])
    assert not padded_codes[32:].any()
    assert not padded_account[32:].any()


def test_sharded_rows_are_solved_without_exchange() -> None:
    case = _case(576, INT4_G64)
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))

    def place(x: np.ndarray | jax.Array, *spec: str | None) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    order = place(jnp.asarray(case.order))
    damping = place(case.damping.astype(np.float32))
    factors = factor(place(case.h.astype(np.float32)), damping, order, wide=False)
    wide = jax.tree.map(lambda x: place(x, None, "model"), case.wide)
    arguments = (place(case.weight, "model"), factors, order, wide, INT4_G64)
    rows = NamedSharding(mesh, PartitionSpec("model"))
    program = solve.lower(*arguments, rows=rows).compile()
    for exchange in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert exchange not in str(program.as_text())
    codes, _ = program(*arguments[:-1])
    assert codes.sharding.is_equivalent_to(rows, 2)
    assert np.mean(np.asarray(codes) == case.solve()[0]) > 0.999


def test_same_inputs_give_the_same_bits() -> None:
    case = _case(576, INT4_G64)
    first, second = case.solve(), case.solve()
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1].view(np.uint32), second[1].view(np.uint32))


def _backward_error(k: int, *, wide: bool) -> float:
    """Of `U diag(p) U^T`, relative to the largest entry."""
    x = activations(2 * k, k)
    h = jnp.asarray(hessian(x), jnp.float32)
    order = jnp.argsort(-jnp.diagonal(h), stable=True)
    damping = jnp.full(k, 0.01 * jnp.mean(jnp.diagonal(h)))
    factors = factor(h, damping, order, wide=wide)
    upper = np.asarray(factors.feedback, np.float64).T + np.eye(k)
    product = upper * np.asarray(factors.pivots, np.float64) @ upper.T
    expected = np.asarray(h, np.float64) + np.diag(np.asarray(damping, np.float64))
    expected = expected[order][:, order]
    assert not np.triu(factors.feedback).any()
    return float(np.abs(product - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("wide", [False, True])
def test_factor_has_a_small_backward_error(wide: bool) -> None:
    assert _backward_error(576, wide=wide) < 1e-6
    assert jnp.zeros(1).dtype == jnp.float32  # float64 stays inside


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [False, True])
def test_factor_has_a_small_backward_error_on_a_gpu(wide: bool) -> None:
    # cuSOLVER's float32 sums of 4096 products; in TF32 they would be off by 6e-5 and more.
    assert _backward_error(4096, wide=wide) < (1e-6 if wide else 1e-5)


def test_what_float32_cannot_factor_is_nan_and_float64_can() -> None:
    # Half as many tokens as features, hardly damped: 256 eigenvalues at 1e-8 of the largest.
    x = activations(256, 512, outliers=0)
    h = jnp.asarray(hessian(x), jnp.float32)
    order = jnp.argsort(-jnp.diagonal(h), stable=True)
    damping = jnp.full(512, 1e-6 * jnp.mean(jnp.diagonal(h)))
    assert not np.isfinite(factor(h, damping, order, wide=False).pivots).all()
    factors = factor(h, damping, order, wide=True)
    assert np.isfinite(factors.pivots).all()
    assert (np.asarray(factors.pivots) > 0).all()
