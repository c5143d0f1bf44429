"""Inputs as codes: the same, compiled as one with what makes them or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qllama.quantization.activations import Semantics, quantize_activations
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
