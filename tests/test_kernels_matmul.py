"""The kernels, simulated on the CPU, against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qllama_kernels import dequantize, dispatch, pallas, reference, tuning
from qllama_kernels.batch_matmul import BatchConfig
from qllama_kernels.decode_matmul import DecodeConfig
from qllama_kernels.packing import pack_int4

RAGGED_M = (0, 1, 7, 8, 9, 16, 17, 33)
# Small CTAs: the simulator runs each warpgroup as a thread.
DECODE = DecodeConfig(block_m=8, ctas=1, warpgroups=2, stages=2)
BATCH = BatchConfig(block_m=16, warpgroups=1, stages=2)


def random_weight(rng, bits, n, k, group_size, *, asymmetric=False, scale_dtype=jnp.bfloat16):
    """Codes, scales and zeros as a checkpoint has them, over the whole range of the codes."""
    limit = 2 ** (bits - 1)
    codes = jnp.asarray(rng.integers(-limit, limit, (n, k)), jnp.int8)
    groups = -(-k // group_size) if group_size else 1
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (n, groups)), scale_dtype)
    zeros = None
    if asymmetric:
        zeros = jnp.asarray(rng.integers(-limit, limit + 1, (n, groups)), jnp.int16)
    return (pack_int4(codes) if bits == 4 else codes), scales, zeros


def expected_of(x, codes, scales, zeros=None, **kwargs):
    """The oracle: `reference` in float32."""
    return np.asarray(reference.quantized_matmul(x, codes, scales, zeros, **kwargs))


def assert_close(out, expected, tolerance=1e-5):
    """Within `tolerance` of the largest value."""
    out = np.asarray(out, np.float32)
    assert out.shape == expected.shape
    assert np.abs(out - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1)


def interpret(x, packed, *, config=None, **kwargs):
    """The kernel's float32 result; `config` overrules the tuned one."""
    problem = pallas.problem_of(
        x,
        packed.codes,
        packed.scales,
        weight_dtype=kwargs["weight_dtype"],
        group_size=kwargs.get("group_size"),
        g_idx=None,
        input_scale=kwargs.get("input_scale"),
        input_zero=None,
        layout=packed.layout,
    )
    return pallas.quantized_matmul(
        x,
        packed.codes,
        packed.scales,
        packed.zeros,
        problem=problem,
        input_scale=kwargs.get("input_scale"),
        config=config,
        interpret=True,
    )


@pytest.mark.parametrize("m", RAGGED_M)
def test_weight_only_at_every_ragged_m(m):
    rng = np.random.default_rng(m)
    n, k, group = 72, 320, 64
    codes, scales, zeros = random_weight(rng, 4, n, k, group, asymmetric=True)
    packed = dispatch.pack(codes, scales, zeros, k=k, weight_dtype="int4", group_size=group)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    config = BATCH if m > 8 else DECODE
    out = interpret(x, packed, config=config, weight_dtype="int4", group_size=group)
    assert_close(out, expected_of(x, codes, scales, zeros, weight_dtype="int4", group_size=group))


@pytest.mark.parametrize("m", RAGGED_M)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bit_at_every_ragged_m(m, dtype):
    rng = np.random.default_rng(m)
    n, k = 72, 256
    x, codes = (
        jnp.asarray(rng.integers(-128, 128, shape) / (1 if dtype == "int8" else 8), dtype)
        for shape in ((m, k), (n, k))
    )
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (n, 1)), jnp.float32)
    input_scale = jnp.asarray(rng.uniform(0.5, 1.5, (m, 1)), jnp.float32)
    packed = dispatch.pack(codes, scales, k=k, weight_dtype=dtype, quantized_input=True)
    kwargs = {"weight_dtype": dtype, "input_scale": input_scale}
    out = interpret(x, packed, config=BATCH if m > 8 else DECODE, **kwargs)
    assert_close(out, expected_of(x, codes, scales, **kwargs))


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (0, 128, 128, BATCH),
        (3, 72, 256, BATCH),
        (17, 200, 384, BATCH),
        (16, 256, 512, BatchConfig(block_m=16, warpgroups=2, blocks=2, stages=2, splits=2)),
        (33, 264, 256, BatchConfig(block_m=32, warpgroups=4, stages=2)),
    ],
)
def test_float8_in_blocks(m, n, k, config):
    rng = np.random.default_rng(m)
    x, codes = (
        jnp.asarray(rng.integers(-64, 64, s) / 8, "float8_e4m3fn") for s in ((m, k), (n, k))
    )
    blocks = -(-n // 128), k // 128
    scales = jnp.asarray(rng.uniform(0.1, 9.0, blocks), jnp.bfloat16)
    input_scale = jnp.asarray(rng.uniform(0.1, 9.0, (m, k // 128)), jnp.float32)
    kwargs = {"weight_dtype": "float8_e4m3fn", "group_size": (128, 128), "input_scale": input_scale}
    packed = dispatch.pack(
        codes,
        scales,
        k=k,
        weight_dtype="float8_e4m3fn",
        group_size=(128, 128),
        quantized_input=True,
    )
    out = interpret(x, packed, config=config, **kwargs)
    assert_close(out, expected_of(x, codes, scales, **kwargs))


@pytest.mark.parametrize(
    ("bits", "group", "asymmetric", "dtype", "scale_dtype"),
    [
        (4, 128, True, "float16", "float16"),
        (4, 32, True, "bfloat16", "float32"),
        (4, None, False, "bfloat16", "float32"),
        (4, None, True, "bfloat16", "bfloat16"),
        (8, 128, False, "bfloat16", "bfloat16"),
        (8, None, False, "float16", "float32"),
    ],
)
@pytest.mark.parametrize("kernel", ["decode", "batch", "dequantize"])
def test_weight_only_schemes(bits, group, asymmetric, dtype, scale_dtype, kernel):
    rng = np.random.default_rng(bits)
    n, k, m = 64, 256, 8
    codes, scales, zeros = random_weight(
        rng, bits, n, k, group, asymmetric=asymmetric, scale_dtype=scale_dtype
    )
    kwargs = {"weight_dtype": f"int{bits}", "group_size": group}
    packed = dispatch.pack(codes, scales, zeros, k=k, **kwargs)
    m = tuning.DENSE_M if kernel == "dequantize" else m
    config = {"decode": DECODE, "batch": BATCH, "dequantize": None}[kernel]
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    out = interpret(x, packed, config=config, **kwargs)
    # The dequantized copy is rounded to 16 bits, the others are not.
    tolerance = 4e-3 if kernel == "dequantize" else 1e-5
    assert_close(out, expected_of(x, codes, scales, zeros, **kwargs), tolerance)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("config", [DECODE, BATCH])
def test_several_tiles_stages_and_splits(config, splits):
    rng = np.random.default_rng(0)
    n, k, group = 264, 640, 128
    codes, scales, _ = random_weight(rng, 4, n, k, group)
    packed = dispatch.pack(codes, scales, k=k, weight_dtype="int4", group_size=group)
    x = jnp.asarray(rng.normal(size=(8, k)), jnp.bfloat16)
    config = type(config)(**{f: getattr(config, f) for f in config.__slots__} | {"splits": splits})
    out = interpret(x, packed, config=config, weight_dtype="int4", group_size=group)
    assert_close(out, expected_of(x, codes, scales, weight_dtype="int4", group_size=group))


def test_a_wide_weight_is_dequantized_by_several_ctas():
    """Of which the last has fewer blocks than the others, and less than its loads in flight."""
    rng = np.random.default_rng(0)
    n, k, group = 72, 128 * (dequantize.BLOCKS + 2) - 64, 64
    codes, scales, zeros = random_weight(rng, 4, n, k, group, asymmetric=True)
    kwargs = {"weight_dtype": "int4", "group_size": group}
    packed = dispatch.pack(codes, scales, zeros, k=k, **kwargs)
    x = jnp.asarray(rng.normal(size=(tuning.DENSE_M, k)), jnp.bfloat16)
    out = interpret(x, packed, config=None, **kwargs)
    assert_close(out, expected_of(x, codes, scales, zeros, **kwargs), 4e-3)


@pytest.mark.parametrize("config", [DECODE, BATCH])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_one_scale_for_all(config, dtype):
    rng = np.random.default_rng(0)
    x, codes = (jnp.asarray(rng.integers(-8, 8, shape), dtype) for shape in ((3, 128), (64, 128)))
    scales, input_scale = jnp.full((1, 1), 0.25, jnp.bfloat16), jnp.float32(0.5)
    kwargs = {"weight_dtype": dtype, "input_scale": input_scale, "group_size": (64, 128)}
    packed = dispatch.pack(
        codes, scales, k=128, weight_dtype=dtype, group_size=(64, 128), quantized_input=True
    )
    out = interpret(x, packed, config=config, **kwargs)
    np.testing.assert_array_equal(out, expected_of(x, codes, scales, **kwargs))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("m", "tile"), [(300, 128), (2 * 128 * 132, 256)])
def test_tiles_of_many_tokens(dtype, m, tile):
    """Neither tokens nor rows fill the last one."""
    weight = {"int8": "w8a8", "float8_e4m3fn": "fp8"}[dtype]
    config = tuning.choose(tuning.Problem(scheme=weight, m=m, n=200, k=384))
    assert config.block_m == tile
    rng = np.random.default_rng(0)
    x, codes = (
        jnp.asarray(rng.integers(-8, 8, shape), dtype) for shape in ((300, 384), (200, 384))
    )
    scales, input_scale = (jnp.asarray(rng.uniform(0.5, 1.5, (rows, 1))) for rows in (200, 300))
    kwargs = {"weight_dtype": dtype, "input_scale": input_scale}
    packed = dispatch.pack(codes, scales, k=384, weight_dtype=dtype, quantized_input=True)
    out = interpret(x, packed, config=config, **kwargs)
    assert_close(out, expected_of(x, codes, scales, **kwargs))


def test_int8_sums_are_exact():
    x = jnp.full((8, 1024), -128, jnp.int8).at[1].set(127)
    codes = jnp.full((64, 1024), -128, jnp.int8).at[5].set(127)
    scales, input_scale = jnp.ones((64, 1), jnp.float32), jnp.ones((8, 1), jnp.float32)
    packed = dispatch.pack(codes, scales, k=1024, weight_dtype="int8", quantized_input=True)
    kwargs = {"weight_dtype": "int8", "input_scale": input_scale}
    out = interpret(x, packed, config=DECODE, **kwargs)
    exact = np.asarray(x, np.int64) @ np.asarray(codes, np.int64).T
    np.testing.assert_array_equal(out, exact.astype(np.float32))


@pytest.mark.parametrize("config", [DECODE, BATCH])
def test_adversarial_weights(config):
    rng = np.random.default_rng(0)
    n, k, group = 64, 256, 128
    codes = rng.integers(-8, 8, (n, k)).astype(np.int8)
    codes[0], codes[1], codes[2] = -8, 7, 0
    scales = rng.uniform(0.5, 1.5, (n, 2)).astype(np.float32)
    scales[3], scales[4], scales[5] = 0.0, 1e30, 2.0**-133  # a subnormal bfloat16
    zeros = rng.integers(-8, 9, (n, 2)).astype(np.int16)
    zeros[0], zeros[1] = 8, -8  # the widest distances there are
    weight = (pack_int4(jnp.asarray(codes)), jnp.asarray(scales, jnp.bfloat16), jnp.asarray(zeros))
    packed = dispatch.pack(*weight, k=k, weight_dtype="int4", group_size=group)
    x = jnp.asarray(rng.normal(size=(8, k)), jnp.bfloat16)
    kwargs = {"weight_dtype": "int4", "group_size": group}
    out = np.asarray(interpret(x, packed, config=config, **kwargs))
    expected = expected_of(x, *weight, **kwargs)
    for row in range(n):  # each against its own size
        if row != 5:
            assert_close(out[:, row], expected[:, row] / 1)
    assert (out[:, 3] == 0).all()
    assert np.isfinite(out).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the simulator's inf * 0
@pytest.mark.parametrize("config", [DECODE, BATCH])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_token_spoils_only_its_row(config, poison):
    rng = np.random.default_rng(0)
    codes, scales, _ = random_weight(rng, 4, 64, 256, 128)
    packed = dispatch.pack(codes, scales, k=256, weight_dtype="int4", group_size=128)
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.bfloat16).at[2, 17].set(poison)
    kwargs = {"weight_dtype": "int4", "group_size": 128}
    out = np.asarray(interpret(x, packed, config=config, **kwargs))
    assert not np.isfinite(out[2]).any()
    good = np.array([0, 1, 3, 4])
    assert_close(out[good], expected_of(x[good], codes, scales, **kwargs))


def test_activation_order():
    rng = np.random.default_rng(0)
    n, k, group = 64, 256, 64
    codes, scales, zeros = random_weight(rng, 4, n, k, group, asymmetric=True)
    g_idx = jnp.asarray(rng.permutation(k) // group, jnp.int32)
    x = jnp.asarray(rng.normal(size=(4, k)), jnp.bfloat16)
    kwargs = {"weight_dtype": "int4", "group_size": group}
    packed = dispatch.pack(codes, scales, zeros, k=k, g_idx=g_idx, **kwargs)
    expected = expected_of(x, codes, scales, zeros, g_idx=g_idx, **kwargs)
    for backend in ("interpret", "xla", "reference"):
        out = dispatch.quantized_matmul(
            x,
            packed.codes,
            packed.scales,
            packed.zeros,
            columns=packed.columns,
            layout=packed.layout,
            out_dtype=jnp.float32,
            backend=backend,
            **kwargs,
        )
        assert_close(out, expected, 1e-5 if backend != "xla" else 1e-2)
    natural = dispatch.unpack(packed, k=k, weight_dtype="int4")
    np.testing.assert_array_equal(natural.codes, codes)
    assert (g_idx[packed.columns] == np.arange(k) // group).all()
    with pytest.raises(NotImplementedError, match="g_idx"):
        dispatch.pack(codes, scales, zeros, k=k, g_idx=g_idx.at[0].set(g_idx[0] ^ 1), **kwargs)


def test_leading_dimensions_bias_and_dtype():
    rng = np.random.default_rng(0)
    codes, scales, _ = random_weight(rng, 4, 64, 128, 128)
    packed = dispatch.pack(codes, scales, k=128, weight_dtype="int4", group_size=128)
    x = jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=64), jnp.bfloat16)
    kwargs = {"weight_dtype": "int4", "group_size": 128}
    out = dispatch.quantized_matmul(
        x,
        packed.codes,
        packed.scales,
        layout=packed.layout,
        bias=bias,
        backend="interpret",
        **kwargs,
    )
    assert out.dtype == jnp.bfloat16
    expected = expected_of(x, codes, scales, **kwargs) + np.asarray(bias, np.float32)
    assert_close(out, expected, 4e-3)


def test_named_backends_refuse_what_they_cannot_run():
    x = jnp.zeros((2, 128), jnp.bfloat16)
    codes, scales, _ = random_weight(np.random.default_rng(0), 4, 64, 128, 128)
    packed = dispatch.pack(codes, scales, k=128, weight_dtype="int4", group_size=128)

    def call(x, codes, scales, backend, **kwargs):
        kwargs = {"weight_dtype": "int4", "group_size": 128} | kwargs
        return dispatch.quantized_matmul(x, codes, scales, backend=backend, **kwargs)

    for backend in ("pallas", "interpret"):
        with pytest.raises(NotImplementedError, match="pack the weight first"):
            call(x, codes, scales, backend)
        with pytest.raises(NotImplementedError, match="float32"):
            call(x.astype(jnp.float32), packed.codes, packed.scales, backend, layout="wgmma4")
        with pytest.raises(NotImplementedError, match="32, 64, 128"):
            call(x, packed.codes, packed.scales, backend, layout="wgmma4", group_size=16)
    # What the kernels refuse, "auto" runs all the same.
    out = call(x.astype(jnp.float32), packed.codes, packed.scales, "auto", layout="wgmma4")
    assert out.shape == (2, 64)
    with pytest.raises(NotImplementedError, match="one scale a row"):
        dispatch.pack(codes, scales, k=128, weight_dtype="int4", quantized_input=True)
    with pytest.raises(ValueError, match="layout='wgmma4' for K=128"):
        call(x, packed.codes[:, :, :4], packed.scales, "auto", layout="wgmma4")
    with pytest.raises(ValueError, match="unknown"):
        call(x, codes, scales, "auto", layout="marlin")


def test_layers_that_share_a_kernel_lower_it_once():
    rng = np.random.default_rng(0)
    codes, scales, _ = random_weight(rng, 4, 256, 256, 128)
    packed = dispatch.pack(codes, scales, k=256, weight_dtype="int4", group_size=128)

    def layers(x, weights):
        for w in weights:
            x = dispatch.quantized_matmul(
                x,
                w.codes,
                w.scales,
                weight_dtype="int4",
                group_size=128,
                layout=w.layout,
                backend="pallas",
            )
        return x

    x = jnp.zeros((8, 256), jnp.bfloat16)
    lowered = jax.jit(layers).trace(x, [packed] * 16).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 1
