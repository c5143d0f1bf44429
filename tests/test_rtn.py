"""Rounding to nearest against the byte examples of the formats, and against compressed-tensors."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from qllama_kernels.packing import unpack_int4

from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

INT4_G8 = QuantScheme(weight_dtype="int4", strategy="group", group_size=8)
INT4_G8_ASYM = QuantScheme(weight_dtype="int4", strategy="group", group_size=8, symmetric=False)
INT8_G64_ASYM = QuantScheme(weight_dtype="int8", strategy="group", group_size=64, symmetric=False)
ROW = np.array([[-1, -0.5, -0.1, 0, 0.1, 0.25, 0.5, 0.75]], np.float32)


def _static_scale(scheme: QuantScheme) -> float | None:
    return 0.5 if scheme.activations is not None and not scheme.activations.dynamic else None


def test_int4_group_of_eight() -> None:
    quantized = quantize_rtn(ROW, INT4_G8)
    quantized.validate()
    assert unpack_int4(jnp.asarray(quantized.codes), 8).tolist() == [[-7, -4, -1, 0, 1, 2, 4, 6]]
    assert quantized.scales.tolist() == [[np.float32(0.13333334)]]


def test_int4_asymmetric_group_of_eight() -> None:
    quantized = quantize_rtn(ROW, INT4_G8_ASYM)
    quantized.validate()
    assert unpack_int4(jnp.asarray(quantized.codes), 8).tolist() == [[-8, -3, 0, 1, 2, 3, 5, 7]]
    assert quantized.zeros is not None
    assert quantized.zeros.tolist() == [[1]]
    assert quantized.scales.tolist() == [[np.float32(0.11666667)]]


def test_int8_per_channel() -> None:
    weight = np.array([[-1, 0.3, 0.5, 0.75], [0, 0, 0, 0]], np.float32)
    quantized = quantize_rtn(weight, PRESETS["W8A8"])
    quantized.validate()
    assert quantized.codes.tolist() == [[-127, 38, 64, 96], [0, 0, 0, 0]]
    assert quantized.scales.tolist() == [[np.float32(0.0078431377)], [np.float32(1.1920929e-07)]]


def test_zeros_get_the_epsilon_of_their_dtype_as_scale() -> None:
    quantized = quantize_rtn(np.zeros((2, 128), ml_dtypes.bfloat16), PRESETS["W4A16_ASYM"])
    quantized.validate()
    assert quantized.scales.tolist() == [[0.0078125], [0.0078125]]
    assert not np.asarray(quantized.dequantize()).any()


def test_tiny_float16_weights_get_no_subnormal_scale() -> None:
    """A scale of four bits would move the largest weight by a tenth."""
    weight = np.linspace(-2e-4, 2e-4, 256).astype(np.float16).reshape(2, 128)
    for name in ("W4A16", "W4A16_ASYM", "W8A8"):
        quantized = quantize_rtn(weight, PRESETS[name])
        quantized.validate()
        assert quantized.scales.tolist() == [[2.0**-14], [2.0**-14]]
        error = np.abs(np.asarray(quantized.dequantize()) - weight.astype(np.float32))
        assert error.max() <= 2.0**-15 * 1.01  # quotients are rounded too


def test_float8_per_tensor() -> None:
    weight = np.array([[1.0, 0.1, 448, -448]], np.float32)
    quantized = quantize_rtn(weight, PRESETS["FP8"], input_scale=0.5)
    quantized.validate()
    assert np.asarray(quantized.codes).view(np.uint8).tolist() == [[0x38, 0x1D, 0x7E, 0xFE]]
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.input_scale is not None
    assert quantized.input_scale.tolist() == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_no_weight_moves_by_more_than_half_a_step(name: str) -> None:
    scheme = PRESETS[name]
    weight = np.random.default_rng(0).normal(size=(200, 256)).astype(np.float32)
    quantized = quantize_rtn(weight, scheme, input_scale=_static_scale(scheme))
    quantized.validate()
    rows, columns = quantized.group_size
    scales = np.asarray(quantized.scales)
    scales = np.repeat(np.repeat(scales, rows, axis=0)[:200], columns, axis=1)[:, :256]
    step = scales  # of integers
    if scheme.weight_dtype == "float8_e4m3fn":  # 3 bits of fraction, or the step near zero
        step = np.maximum(np.abs(weight) / 8, scales * 2**-9)
    error = np.abs(np.asarray(quantized.dequantize()) - weight)
    assert (error <= step * 0.5001).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_traced_and_plain_give_the_same_bits(dtype: str) -> None:
    weight = np.random.default_rng(1).normal(size=(128, 256)).astype(jnp.dtype(dtype))
    plain = quantize_rtn(weight, PRESETS["W4A16"])
    traced = jax.jit(quantize_rtn, static_argnums=1)(jnp.asarray(weight), PRESETS["W4A16"])
    assert isinstance(plain.codes, np.ndarray)
    np.testing.assert_array_equal(plain.codes, np.asarray(traced.codes))
    np.testing.assert_array_equal(plain.scales, np.asarray(traced.scales))


@pytest.mark.parametrize(
    ("shape", "dtype", "scheme", "message"),
    [
        ((2, 96), "float32", PRESETS["W4A16"], r"K=96 .* 128 columns .*: 32, 16"),
        ((2, 96), "float32", PRESETS["FP8_BLOCK"], r"K=96 .* 128 columns"),
        ((2, 128), "int8", PRESETS["W4A16"], "int8; it must be one of bfloat16"),
        (
            (2, 128),
            "float32",
            QuantScheme(weight_dtype="float4_e2m1fn", strategy="channel"),
            "float4_e2m1fn weights are read, not made",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    shape: tuple[int, int], dtype: str, scheme: QuantScheme, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rtn(np.zeros(shape, dtype), scheme)


def test_weights_that_are_not_finite_do_not_validate() -> None:
    weight = np.ones((2, 128), np.float32)
    weight[1, 5] = np.nan
    with pytest.raises(ValueError, match="1 of 2 scales are NaN"):
        quantize_rtn(weight, PRESETS["W4A16"]).validate()


_COMPRESSED_TENSORS = """
    import json
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**json.loads(str(arguments)))
    for name in ("bfloat16", "float16", "float32"):
        w = torch.from_numpy(weight).to(getattr(torch, name))
        (n, k), (r, c) = w.shape, block.tolist()
        blocks = torch.nn.functional.pad(w, (0, 0, 0, -n % r)).reshape(-1, r, k // c, c)
        scale, zero = calculate_qparams(blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3)), args)
        codes = quantize(w, scale, zero, args)
        out[name + ".codes"] = codes.float().numpy()
        out[name + ".scales"] = scale.float().numpy()
        out[name + ".zeros"] = zero.float().numpy()
"""


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", [*PRESETS.values(), INT8_G64_ASYM], ids=QuantScheme.describe)
def test_bits_are_those_of_compressed_tensors(scheme: QuantScheme) -> None:
    weight = np.random.default_rng(2).normal(size=(200, 256)).astype(np.float32) * 0.03
    arguments = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.weight_dtype.startswith("float") else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "block_structure": scheme.block_size,
    }
    reference = oracle.run(
        _COMPRESSED_TENSORS,
        weight=weight,
        block=np.array(scheme.scale_block((200, 256))),
        arguments=np.array(json.dumps(arguments)),
    )
    for name in ("bfloat16", "float16", "float32"):
        ours = quantize_rtn(
            weight.astype(jnp.dtype(name)), scheme, input_scale=_static_scale(scheme)
        )
        codes = np.asarray(ours.codes)
        if scheme.bits == 4:
            codes = np.asarray(unpack_int4(jnp.asarray(codes), 256))
        np.testing.assert_array_equal(codes.astype(np.float32), reference[f"{name}.codes"])
        scales = np.asarray(ours.scales, np.float32)
        np.testing.assert_array_equal(scales, reference[f"{name}.scales"])
        if not scheme.symmetric:
            np.testing.assert_array_equal(np.asarray(ours.zeros), reference[f"{name}.zeros"])
