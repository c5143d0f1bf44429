"""Every on-disk format: golden weights, the byte examples of their sources, exact round trips."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drafts import (
    LINEAR,
    Draft,
    compressed,
    dequantized,
    draft,
    load,
    load_quantized,
    read_tensors,
    single,
    words,
)
from qllama_convert import bits
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.formats import fp8, gptq, naive_quantized, pack_quantized, plain
from qllama_convert.linear import read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import ActivationScheme, QuantScheme

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SIGNED = [-8, -7, -1, 0, 1, 2, 6, 7]
UNSIGNED = [0, 1, 7, 8, 9, 10, 14, 15]
INT4 = {"num_bits": 4, "strategy": "channel"}
WRITERS: dict[str, ModuleType] = {
    "pack-quantized": pack_quantized,
    "int-quantized": naive_quantized,
    "float-quantized": naive_quantized,
    "naive-quantized": naive_quantized,
    "gptq": gptq,
    "fp8": fp8,
}


def gptq_config(**others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": -1} | others


# The fixtures.


def test_every_linear_of_a_fixture_reads_as_the_library_dequantizes_it(
    tiny_llama3_dir: Path,
) -> None:
    golden = read_tensors(tiny_llama3_dir / "expected.safetensors")
    with open_checkpoint(tiny_llama3_dir) as checkpoint:
        shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
        quantization = parse_quantization(checkpoint, shapes)
        linears = {
            path: read_linear(checkpoint, quantization, path, shape)
            for path, shape in shapes.items()
        }
        assert not checkpoint.warnings
    original = tiny_llama3_dir.name == "bf16_original"
    for path, linear in linears.items():
        assert linear.bias is None
        assert isinstance(linear.weight, QTensor) == (path != "lm_head" and not original)
    samples = [name for name in golden if name.startswith("dequant_rows_0_64.")]
    assert len(samples) == 2
    for name in samples:
        weight = linears[name.removeprefix("dequant_rows_0_64.").removesuffix(".weight")].weight
        values = weight.dequantize() if isinstance(weight, QTensor) else weight
        found, expected = np.asarray(values, np.float32)[:64], golden[name]
        if "nvfp4" in tiny_llama3_dir.name:  # two roundings there: of the scale, of the product
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * abs(expected).max())
        else:
            np.testing.assert_array_equal(found, expected)


def test_writing_what_was_read_gives_the_stored_bytes(tiny_llama3_dir: Path) -> None:
    made = draft(tiny_llama3_dir)
    with open_checkpoint(tiny_llama3_dir) as checkpoint:
        quantization = parse_quantization(checkpoint, made.shapes)
        if quantization and quantization.method == "compressed-tensors":
            formats = {spec.format for spec in quantization.linears.values()}
            if not formats <= WRITERS.keys():
                pytest.skip(f"{formats} are read, not written")
        for path, shape in made.shapes.items():
            spec = quantization.linear(path) if quantization else None
            weight = read_linear(checkpoint, quantization, path, shape).weight
            if isinstance(weight, np.ndarray) or spec is None:
                assert isinstance(weight, np.ndarray)
                written = plain.write(weight)
            elif spec.format == "gptq":
                written = gptq.write(weight, "gptq")
            else:
                written = WRITERS[spec.format].write(weight)
            stored = {
                name.removeprefix(f"{path}."): array
                for name, array in made.tensors.items()
                if name.startswith(f"{path}.") and name.count(".") == path.count(".") + 1
            }
            assert_same_tensors(written, stored)


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for suffix, array in expected.items():
        assert found[suffix].dtype == array.dtype, suffix
        assert found[suffix].shape == array.shape, suffix
        assert found[suffix].tobytes() == array.tobytes(), suffix


# Byte examples, produced by the libraries themselves.


@pytest.mark.parametrize(
    ("width", "values", "packed"),
    [
        (4, SIGNED, [0xFEA98710]),
        (4, list(range(-5, 5)), [0xA9876543, 0x000000CB]),
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (4, [-8, -3, 0, 1, 2, 3, 5, 7], [0xFDBA9850]),
    ],
)
def test_words_of_compressed_tensors(
    tmp_path: Path, width: int, values: list[int], packed: list[int]
) -> None:
    k = len(values)
    made = single(
        (1, k),
        compressed({"num_bits": width, "strategy": "channel"}),
        {
            "weight_packed": words(*packed)[None],
            "weight_scale": np.ones((1, 1), BF16),
            "weight_shape": np.array([1, k]),
        },
    )
    weight = load_quantized(made, tmp_path)
    np.testing.assert_array_equal(weight.dequantize(), [values])
    np.testing.assert_array_equal(
        pack_quantized.write(weight)["weight_packed"], made.tensors[f"{LINEAR}.weight_packed"]
    )


def test_words_of_one_stream_are_the_same_int32_everywhere() -> None:
    assert bits.pack_words(np.array([UNSIGNED], np.uint8), 4).tolist() == [[-22444272]]


@pytest.mark.parametrize(
    ("zeros", "packed"),
    [(SIGNED, [0xFEA98710]), ([0] * 8, [0x88888888]), (range(-5, 5), [0xA9876543, 0x000000CB])],
)
def test_zero_points_of_compressed_tensors_are_packed_along_rows(
    tmp_path: Path, zeros: list[int], packed: list[int]
) -> None:
    n = len(zeros)
    made = single(
        (n, 8),
        compressed(INT4 | {"symmetric": False}, version="0.19.0"),
        {
            "weight_packed": np.broadcast_to(words(0x88888888), (n, 1)),  # all codes 0
            "weight_scale": np.ones((n, 1), np.float16),
            "weight_zero_point": words(*packed)[:, None],
        },
    )
    weight = load_quantized(made, tmp_path)
    assert weight.zeros is not None
    assert weight.zeros.ravel().tolist() == list(zeros)
    np.testing.assert_array_equal(weight.dequantize(), -np.array([[z] * 8 for z in zeros]))
    np.testing.assert_array_equal(
        pack_quantized.write(weight)["weight_zero_point"],
        made.tensors[f"{LINEAR}.weight_zero_point"],
    )


def test_asymmetric_group_of_compressed_tensors_end_to_end(tmp_path: Path) -> None:
    scale = np.float32(0.11666667)
    made = single(
        (1, 8),
        compressed(INT4 | {"symmetric": False}),
        {
            "weight_packed": words(0xFDBA9850)[None],
            "weight_scale": np.array([[scale]]),
            "weight_zero_point": np.array([[1]], np.int8),  # before 0.9.4
        },
    )
    found = dequantized(made, tmp_path)
    np.testing.assert_array_equal(
        found, [np.array([-9, -4, -1, 0, 1, 2, 4, 6], np.float32) * scale]
    )
    original = [-1, -0.5, -0.1, 0, 0.1, 0.25, 0.5, 0.75]
    assert abs(found - original).max() <= scale / 2


@pytest.mark.parametrize(
    ("width", "version", "codes", "words_", "qzeros"),
    [
        (4, "gptq", UNSIGNED, [0xFEA98710], 0x77777777),
        (4, "gptq_v2", UNSIGNED, [0xFEA98710], 0x88888888),
        (8, "gptq", [0, 127, 128, 255], [0xFF807F00], 0x7F7F7F7F),
        (8, "gptq_v2", [0, 127, 128, 255], [0xFF807F00], 0x80808080),
    ],
)
def test_words_of_symmetric_gptq(
    tmp_path: Path, width: int, version: Any, codes: list[int], words_: list[int], qzeros: int
) -> None:
    k, n = len(codes), 32 // width
    made = single(
        (n, k),
        gptq_config(bits=width, sym=True, checkpoint_format=version),
        {
            "qweight": np.repeat(words(*words_)[:, None], n, axis=1),
            "qzeros": words(qzeros)[None],
            "scales": np.ones((1, n), np.float16),
            "g_idx": np.zeros(k, np.int32),
        },
    )
    weight = load_quantized(made, tmp_path)
    assert weight.scheme.symmetric
    np.testing.assert_array_equal(weight.dequantize(), [np.array(codes) - 2 ** (width - 1)] * n)
    assert_same_tensors(
        {f"{LINEAR}.{suffix}": array for suffix, array in gptq.write(weight, version).items()},
        made.tensors,
    )


def test_zero_points_of_asymmetric_gptq_v1_are_stored_minus_one(tmp_path: Path) -> None:
    zeros = np.array([1, 2, 3, 8, 9, 14, 15, 15])
    made = asymmetric_gptq(0xEED87210)
    weight = load_quantized(made, tmp_path)
    np.testing.assert_array_equal(weight.dequantize(), np.repeat((8 - zeros)[:, None], 8, axis=1))
    assert_same_tensors(
        {f"{LINEAR}.{suffix}": array for suffix, array in gptq.write(weight, "gptq").items()},
        made.tensors,
    )


def test_gptq_v1_zero_point_of_16_is_legal_and_all_ones_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot store a zero point of 0"):
        weight = load_quantized(asymmetric_gptq(0xFFFFFFFF), tmp_path)
    np.testing.assert_array_equal(weight.dequantize(), np.full((8, 8), 8 - 16))
    assert gptq.write(weight, "gptq")["qzeros"].tolist() == [[-1]]
    for write in (gptq.write, pack_quantized.write):
        with pytest.raises(ValueError, match="16"):
            write(weight)  # neither version 2 nor compressed-tensors can say 16


def asymmetric_gptq(qzeros: int) -> Draft:
    return single(
        (8, 8),
        gptq_config(sym=False),
        {
            "qweight": np.broadcast_to(words(0x88888888), (1, 8)),
            "qzeros": words(qzeros)[None],
            "scales": np.ones((1, 8), np.float16),
            "g_idx": np.zeros(8, np.int32),
        },
    )


def test_gptq_v1_cannot_store_a_zero_point_of_zero() -> None:
    weight = a_weight("int4", "channel", (8, 8), symmetric=False)
    assert weight.zeros is not None
    weight.zeros[:] = -8  # 0 among unsigned codes
    assert gptq.write(weight)["qzeros"].tolist() == [[0]]
    with pytest.raises(ValueError, match="from 1 to 16"):
        gptq.write(weight, "gptq")


def test_words_of_awq_are_shuffled(tmp_path: Path) -> None:
    codes, zeros = np.arange(1, 9), np.array([0, 1, 2, 3, 12, 13, 14, 15])
    made = single(
        (8, 2),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"},
        {
            "qweight": np.repeat(words(0x86427531)[None], 2, axis=0),
            "qzeros": words(0xFD31EC20)[None],
            "scales": np.ones((1, 8), np.float16),
        },
    )
    np.testing.assert_array_equal(
        dequantized(made, tmp_path), np.repeat((codes - zeros)[:, None], 2, axis=1)
    )


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1_BYTES = np.frombuffer(bytes.fromhex("1032547698badcfe"), np.uint8)
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}


def test_bytes_of_float4(tmp_path: Path) -> None:
    made = nvfp4(E2M1_BYTES[None], np.ones((1, 1), E4M3), 1.0)
    found = dequantized(made, tmp_path)
    np.testing.assert_array_equal(found, [E2M1 + [-x for x in E2M1]])
    assert np.signbit(found[0, 8])


def test_nvfp4_divides_by_the_global_scale(tmp_path: Path) -> None:
    codes = np.frombuffer(bytes.fromhex("ffefeededdccab9a1022435465667677"), np.uint8)
    found = dequantized(nvfp4(codes[None], np.array([[448, 416]], E4M3), 1680.0), tmp_path)
    values = [E2M1[code & 7] * (-1 if code & 8 else 1) for byte in codes for code in (
        byte & 15, byte >> 4)]  # fmt: skip
    scales = np.repeat(np.array([448, 416], np.float32) / np.float32(1680), 16)
    np.testing.assert_array_equal(found[0], np.array(values, np.float32) * scales)
    # A step of this type is at most a third of the larger neighbour, so half of it is lost.
    original = np.arange(-16, 16) / 10
    assert abs(found[0] - original).max() < 1.6 / 6


def nvfp4(codes: np.ndarray, scales: np.ndarray, divisor: float) -> Draft:
    return single(
        (1, 2 * codes.shape[1]),
        compressed(NVFP4, format="nvfp4-pack-quantized"),
        {
            "weight_packed": codes,
            "weight_scale": scales,
            "weight_global_scale": np.array([divisor], np.float32),
        },
    )


@pytest.mark.parametrize(("exponent", "scale"), [(125, 0.25), (127, 1.0), (0, 2.0**-127)])
def test_mxfp4_scales_are_powers_of_two(tmp_path: Path, exponent: int, scale: float) -> None:
    made = single(
        (1, 32),
        compressed(MXFP4 | {"scale_dtype": "torch.uint8"}),
        {
            "weight_packed": np.concatenate([E2M1_BYTES, E2M1_BYTES])[None],
            "weight_scale": np.array([[exponent]], np.uint8),
        },
    )
    weight = load_quantized(made, tmp_path)
    assert np.asarray(weight.scales).tolist() == [[scale]]
    if exponent:  # XLA on a CPU rounds what is below the smallest normal float32 to zero
        np.testing.assert_array_equal(weight.dequantize()[0, :8], np.array(E2M1) * scale)


def test_bytes_of_float8(tmp_path: Path) -> None:
    stored = np.array([[0x38, 0x1D, 0x7E, 0x01, 0x80]], np.uint8).view(E4M3)
    made = single(
        (1, 5),
        compressed({"num_bits": 8, "type": "float"}),
        {"weight": stored, "weight_scale": np.ones(1, BF16)},
    )
    np.testing.assert_array_equal(
        dequantized(made, tmp_path), [[1.0, 0.1015625, 448.0, 2.0**-9, -0.0]]
    )


def test_bytes_of_autofp8(tmp_path: Path) -> None:
    scale = np.float32(0.0033333334)
    made = single(
        (1, 4),
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {
            "weight": np.array([[0x76, 0xFE, 0x5F, 0x36]], np.uint8).view(E4M3),
            "weight_scale": np.array(scale),
        },
    )
    found = dequantized(made, tmp_path)
    np.testing.assert_array_equal(found, [np.array([224, -448, 30, 0.875], np.float32) * scale])
    np.testing.assert_allclose(found, [[0.75, -1.5, 0.1, 0.003]], rtol=2**-4)


def test_int8_per_channel(tmp_path: Path) -> None:
    scales = np.array([0.0078431377, 1.1920929e-07], np.float32)
    made = single(
        (2, 4),
        compressed({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        {
            "weight": np.array([[-127, 38, 64, 96], [0, 0, 0, 0]], np.int8),
            "weight_scale": scales[:, None],
        },
    )
    found = dequantized(made, tmp_path)
    np.testing.assert_allclose(found[0], [-1, 0.3, 0.5, 0.75], atol=scales[0] / 2, rtol=1e-6)
    assert not found[1].any()


# Round trips of every writer.


def a_weight(
    weight_dtype: Any,
    strategy: Any,
    shape: tuple[int, int],
    *,
    symmetric: bool = True,
    activations: ActivationScheme | None = None,
    act_order: bool = False,
    scale_dtype: Any = BF16,
) -> QTensor:
    """Codes, zeros and scales at random, a weight of any kind."""
    rng = np.random.default_rng(0)
    scheme = QuantScheme(
        weight_dtype=weight_dtype,
        strategy=strategy,
        group_size=2 if strategy == "group" else None,
        block_size=(4, 4) if strategy == "block" else None,
        symmetric=symmetric,
        activations=activations,
    )
    grid = scheme.scale_shape(shape)
    half = 2 ** (scheme.bits - 1)
    codes = rng.integers(-half, half, shape).astype(np.int8)
    if weight_dtype == "int4":
        codes = bits.pack_signed(codes)
    if weight_dtype == "float8_e4m3fn":
        codes = rng.uniform(-448, 448, shape).astype(E4M3)
    g_idx = rng.permutation(np.arange(shape[1]) // 2).astype(np.int32) if act_order else None
    static = activations is not None and not activations.dynamic
    return QTensor(
        codes=codes,
        scales=rng.uniform(0.01, 1, grid).astype(scale_dtype),
        zeros=None if symmetric else rng.integers(-half, half, grid).astype(np.int16),
        g_idx=g_idx,
        input_scale=np.array(0.0625, np.float32) if static else None,
        input_zero=(
            np.array(-3, np.int8)
            if static and activations is not None and not activations.symmetric
            else None
        ),
        scheme=scheme,
        shape=shape,
    )


def compressed_config(weight: QTensor, format_name: str) -> dict[str, Any]:
    scheme, acts = weight.scheme, weight.scheme.activations
    weights = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.weight_dtype.startswith("int") else "float",
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "block_structure": list(scheme.block_size) if scheme.block_size else None,
        "symmetric": scheme.symmetric,
        "actorder": "group" if weight.g_idx is not None else None,
    }
    if acts is None:
        return compressed(weights, format=format_name)
    inputs = {
        "num_bits": 8,
        "type": "int" if acts.dtype == "int8" else "float",
        "strategy": acts.strategy,
        "dynamic": acts.dynamic,
        "group_size": acts.group_size,
        "symmetric": acts.symmetric,
    }
    return compressed(weights, inputs, format=format_name)


def assert_same_weight(found: QTensor, expected: QTensor) -> None:
    assert (found.scheme, found.shape) == (expected.scheme, expected.shape)
    for name in ("codes", "scales", "zeros", "g_idx", "input_scale", "input_zero"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scale_dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("weight_dtype", ["int4", "int8"])
@pytest.mark.parametrize("shape", [(8, 8), (5, 10), (3, 36)])
def test_round_trip_of_pack_quantized(
    tmp_path: Path,
    shape: tuple[int, int],
    weight_dtype: str,
    strategy: str,
    symmetric: bool,
    scale_dtype: Any,
) -> None:
    weight = a_weight(weight_dtype, strategy, shape, symmetric=symmetric, scale_dtype=scale_dtype)
    made = single(shape, compressed_config(weight, "pack-quantized"), pack_quantized.write(weight))
    assert_same_weight(load_quantized(made, tmp_path), weight)


def test_round_trip_of_odd_columns(tmp_path: Path) -> None:
    weight = a_weight("int4", "channel", (3, 7))
    made = single((3, 7), compressed_config(weight, "pack-quantized"), pack_quantized.write(weight))
    assert_same_weight(load_quantized(made, tmp_path), weight)
    # Nothing is to be concluded from bits past K.
    made.tensors[f"{LINEAR}.weight_packed"] |= words(0xF0000000)
    assert_same_weight(load_quantized(made, tmp_path), weight)


def test_round_trip_of_act_order(tmp_path: Path) -> None:
    weight = a_weight("int4", "group", (8, 16), act_order=True)
    made = single(
        (8, 16), compressed_config(weight, "pack-quantized"), pack_quantized.write(weight)
    )
    assert_same_weight(load_quantized(made, tmp_path), weight)
    with pytest.raises(ValueError, match="reordered"):
        naive_quantized.write(weight)


PER_TOKEN = ActivationScheme(dtype="int8", strategy="token")
STATIC = ActivationScheme(dtype="int8", strategy="tensor", dynamic=False)
OFFSET = ActivationScheme(dtype="int8", strategy="tensor", dynamic=False, symmetric=False)
FP8_STATIC = ActivationScheme(dtype="float8_e4m3fn", strategy="tensor", dynamic=False)
FP8_TOKEN = ActivationScheme(dtype="float8_e4m3fn", strategy="token")
FP8_GROUP = ActivationScheme(dtype="float8_e4m3fn", strategy="group", group_size=4)


@pytest.mark.parametrize(
    ("weight_dtype", "strategy", "symmetric", "activations"),
    [
        ("int8", "channel", True, PER_TOKEN),
        ("int8", "tensor", True, STATIC),
        ("int8", "channel", False, OFFSET),
        ("int4", "group", True, PER_TOKEN),
        ("int4", "channel", False, FP8_TOKEN),
        ("float8_e4m3fn", "tensor", True, FP8_STATIC),
        ("float8_e4m3fn", "channel", True, FP8_TOKEN),
        ("float8_e4m3fn", "block", True, FP8_GROUP),
        ("float8_e4m3fn", "channel", True, None),
    ],
)
@pytest.mark.parametrize("name", ["int-quantized", "float-quantized", "naive-quantized"])
def test_round_trip_of_one_code_per_element(
    tmp_path: Path, name: str, weight_dtype: str, strategy: str, symmetric: bool, activations: Any
) -> None:
    weight = a_weight(weight_dtype, strategy, (6, 8), symmetric=symmetric, activations=activations)
    made = single((6, 8), compressed_config(weight, name), naive_quantized.write(weight))
    assert_same_weight(load_quantized(made, tmp_path), weight)


def test_an_input_scale_is_rounded_by_no_writer(tmp_path: Path) -> None:
    weight = a_weight("int8", "channel", (4, 8), activations=STATIC)
    for scale in (0.1, 1e30):
        weight = replace(weight, input_scale=np.array(scale, np.float32))
        for scales in (weight.scales, weight.scales.astype(np.float16)):
            weight = replace(weight, scales=scales)
            made = single(
                (4, 8),
                compressed_config(weight, "int-quantized"),
                naive_quantized.write(weight),
            )
            assert_same_weight(load_quantized(made, tmp_path), weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (False, "gptq_v2")])
@pytest.mark.parametrize("weight_dtype", ["int4", "int8"])
def test_round_trip_of_gptq(
    tmp_path: Path, weight_dtype: str, symmetric: bool, version: str, act_order: bool
) -> None:
    weight = a_weight(
        weight_dtype, "group", (16, 24), symmetric=symmetric, act_order=act_order,
        scale_dtype=np.float16,
    )  # fmt: skip
    config = gptq_config(
        bits=weight.scheme.bits, group_size=2, sym=symmetric, desc_act=act_order,
        checkpoint_format=version,
    )  # fmt: skip
    made = single((16, 24), config, gptq.write(weight))
    assert_same_weight(load_quantized(made, tmp_path), weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (a_weight("float8_e4m3fn", "channel", (8, 8)), "int4 and int8"),
        (a_weight("int8", "tensor", (8, 8)), "group or channel"),
        (a_weight("int8", "channel", (8, 8), activations=PER_TOKEN), "weight-only"),
        (a_weight("int4", "channel", (12, 8)), "divisible by 8"),
    ],
)
def test_gptq_refuses_what_it_cannot_hold(weight: QTensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq.write(weight)


@pytest.mark.parametrize("transformers_names", [False, True])
@pytest.mark.parametrize(
    ("strategy", "activations"),
    [("tensor", FP8_STATIC), ("tensor", FP8_TOKEN), ("block", FP8_GROUP)],
)
def test_round_trip_of_fp8(
    tmp_path: Path, strategy: str, activations: ActivationScheme, transformers_names: bool
) -> None:
    weight = a_weight(
        "float8_e4m3fn", strategy, (8, 8), activations=activations, scale_dtype=np.float32
    )
    tensors = fp8.write(weight, transformers_names=transformers_names)
    inverse = transformers_names or strategy == "block"
    assert ("weight_scale_inv" in tensors) == inverse
    if activations is FP8_STATIC:
        assert tensors["activation_scale" if transformers_names else "input_scale"].shape == ()
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if activations.dynamic else "static",
        "weight_block_size": [4, 4] if strategy == "block" else None,
    }
    assert_same_weight(load_quantized(single((8, 8), config, tensors), tmp_path), weight)


def test_fp8_refuses_what_it_cannot_hold() -> None:
    for weight in (
        a_weight("int8", "tensor", (4, 4)),
        a_weight("float8_e4m3fn", "channel", (4, 4)),
    ):
        with pytest.raises(ValueError, match="FP8 per tensor or block"):
            fp8.write(weight)


# What else a file may look like.


def test_a_bias_is_read_beside_a_quantized_weight(tmp_path: Path) -> None:
    tensors = naive_quantized.write(a_weight("int8", "channel", (2, 4)))
    tensors["bias"] = np.array([1, -2], np.float16)
    config = compressed({"strategy": "channel"}, format="int-quantized")
    linear = load(single((2, 4), config, tensors), tmp_path, LINEAR)
    assert linear.bias is not None
    assert linear.bias.dtype == np.float16
    assert linear.bias.tolist() == [1, -2]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_spellings_of_one_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = single(
        (2, 4),
        compressed({"type": "float"}, {"type": "float"}),
        {
            "weight": np.ones((2, 4), E4M3),
            "weight_scale": np.full(shape, 0.5, BF16),
            "input_scale": np.full(shape, 0.25, BF16),
        },
    )
    weight = load_quantized(made, tmp_path)
    assert np.asarray(weight.scales).shape == (1, 1)
    assert weight.input_scale == np.float32(0.25)
    assert np.asarray(weight.input_scale).shape == ()
    np.testing.assert_array_equal(weight.dequantize(), np.full((2, 4), 0.5))


def test_spellings_of_one_scale_per_channel(tmp_path: Path) -> None:
    config = compressed({"type": "float", "strategy": "channel"})
    for shape in ((2, 1), (2,)):
        tensors = {
            "weight": np.ones((2, 4), E4M3),
            "weight_scale": np.array([1, 2], np.float32).reshape(shape),
        }
        found = dequantized(single((2, 4), config, tensors), tmp_path)
        np.testing.assert_array_equal(found, [[1] * 4, [2] * 4])


def test_fbgemm_fp8_caps_activations_and_takes_flat_scales(tmp_path: Path) -> None:
    made = single(
        (2, 4),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
        {
            "weight": np.ones((2, 4), E4M3),
            "weight_scale": np.array([1, 2], np.float32),
            "input_scale_ub": np.array([1200.0], np.float32),
        },
    )
    weight = load_quantized(made, tmp_path)
    assert weight.scheme.activations == ActivationScheme(
        dtype="float8_e4m3fn", strategy="token", upper_bound=1200.0
    )
    np.testing.assert_array_equal(weight.dequantize(), [[1] * 4, [2] * 4])


def test_blocks_at_the_edge_are_short(tmp_path: Path) -> None:
    made = single(
        (5, 8),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [2, 4]},
        {
            "weight": np.ones((5, 8), E4M3),
            "weight_scale_inv": np.arange(1, 7, dtype=np.float32).reshape(3, 2),
        },
    )
    weight = load_quantized(made, tmp_path)
    assert weight.scheme.activations is not None
    assert weight.scheme.activations.group_size == 4
    expected = np.arange(1, 7).reshape(3, 2).repeat(2, axis=0)[:5].repeat(4, axis=1)
    np.testing.assert_array_equal(weight.dequantize(), expected)


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_block_scales_may_be_powers_of_two(tmp_path: Path, dtype: Any) -> None:
    made = single(
        (2, 4),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [2, 4],
            "scale_fmt": "ue8m0",
        },
        {
            "weight": np.ones((2, 4), E4M3),
            "weight_scale_inv": np.array([[130]], np.uint8).view(dtype),
        },
    )
    np.testing.assert_array_equal(dequantized(made, tmp_path), np.full((2, 4), 8.0))


def test_old_names_of_static_input_scales(tmp_path: Path) -> None:
    for name in ("act_scale", "activation_scale"):
        made = single(
            (2, 4),
            {"quant_method": "fp8", "activation_scheme": "static"},
            {
                "weight": np.ones((2, 4), E4M3),
                "weight_scale": np.array(1, np.float32),
                name: np.array(0.5, np.float32),
            },
        )
        assert load_quantized(made, tmp_path).input_scale == 0.5


@pytest.mark.parametrize("k", [128, 160])
def test_gptq_allows_a_short_last_group(tmp_path: Path, k: int) -> None:
    groups = -(-k // 48)
    made = single(
        (8, k),
        gptq_config(group_size=48),
        {
            "qweight": np.broadcast_to(words(0x99999999), (k // 8, 8)),
            "qzeros": np.broadcast_to(words(0x77777777), (groups, 1)),
            "scales": np.repeat(np.arange(1, groups + 1)[:, None], 8, axis=1).astype(np.float16),
        },
    )
    expected = np.repeat(np.arange(1, groups + 1), 48)[:k]
    np.testing.assert_array_equal(dequantized(made, tmp_path), [expected] * 8)


@pytest.mark.parametrize("wrapped", [bits.unpack_words, bits.codes_from_words])
def test_unpacking_leaves_its_input_alone(wrapped: Callable[..., np.ndarray]) -> None:
    packed = words(0xFEA98710)[None]
    packed.flags.writeable = False
    wrapped(packed, 4, 7)
    assert packed.tolist() == [[-22444272]]
