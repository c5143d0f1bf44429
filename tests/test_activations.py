"""Inputs as codes: the same, compiled as one with what makes them or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qllama.quantization.activations import Semantics, divide, quantize_activations
from qllama.quantization.scheme import PRESETS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("semantics", ["vllm", "compressed-tensors"])
@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_codes_are_of_rounded_inputs_when_xla_compiles_all_as_one(
    preset: str, semantics: Semantics, dtype: str
) -> None:
    """Left to itself XLA makes them of what there was before a product became bfloat16."""
    scheme = PRESETS[preset].activations
    assert scheme is not None
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=size), dtype) for size in ((8, 256), (256,)))

    def quantized(x: jax.Array, weight: jax.Array) -> object:
        return quantize_activations(x * weight, scheme, semantics=semantics)

    found, expected = jax.jit(quantized)(x, weight), quantized(x, weight)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(*(np.asarray(array, np.float32) for array in (one, other)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_quotients_are_correctly_rounded_where_the_divisor_is_broadcast() -> None:
    """XLA would multiply by a reciprocal."""
    x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    x[1, 2], x[3, 4], x[5, 6], x[7] = np.nan, np.inf, -np.inf, 0
    scales = np.random.default_rng(1).uniform(1e-3, 1e3, (64, 1)).astype(np.float32)
    by_row, by_constant = jax.jit(lambda x, y: (divide(x, y), divide(x, 127.5)))(x, scales)
    np.testing.assert_array_equal(by_row, x / scales)
    np.testing.assert_array_equal(by_constant, x / np.float32(127.5))
