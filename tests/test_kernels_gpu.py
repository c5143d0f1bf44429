"""The compiled kernels on a GPU: the register path, which the simulator does not know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qllama_kernels import dispatch, pallas, reference, rows, tuning
from test_kernels_matmul import random_weight
from test_rows import every_code, random

pytestmark = pytest.mark.gpu
EDGES = (1, 7, 8, 9, 16, 17, 32, 33, 40, 63, 64, 65, 128, 129, 200, 256, 257, 600, tuning.DENSE_M)


@functools.cache
def weight(scheme, n, k, group=None, asymmetric=False):
    """A weight, packed and natural."""
    rng = np.random.default_rng(0)
    if scheme in ("w4a16", "w8a16"):
        bits = tuning.BITS[scheme]
        codes, scales, zeros = random_weight(rng, bits, n, k, group, asymmetric=asymmetric)
        packed = dispatch.pack(
            codes, scales, zeros, k=k, weight_dtype=f"int{bits}", group_size=group
        )
        return codes, scales, zeros, packed
    if scheme == "fp8_block":
        codes = jnp.asarray(rng.integers(-64, 64, (n, k)) / 8, "float8_e4m3fn")
        scales = jnp.asarray(rng.uniform(0.5, 1.5, (-(-n // 128), k // 128)), jnp.float32)
        packed = dispatch.pack(
            codes,
            scales,
            k=k,
            weight_dtype="float8_e4m3fn",
            group_size=pallas.BLOCK,
            quantized_input=True,
        )
        return codes, scales, None, packed
    dtype = "int8" if scheme == "w8a8" else "float8_e4m3fn"
    values = rng.integers(-128, 128, (n, k)) / (1 if dtype == "int8" else 8)
    codes, scales = jnp.asarray(values, dtype), jnp.asarray(rng.uniform(0.5, 1.5, (n, 1)))
    scales = scales.astype(jnp.float32)
    packed = dispatch.pack(codes, scales, k=k, weight_dtype=dtype, quantized_input=True)
    return codes, scales, None, packed


def check(scheme, m, n, k, *, group=None, asymmetric=False, dtype="bfloat16", backend="pallas"):
    """The dispatched kernel against the reference."""
    codes, scales, zeros, packed = weight(scheme, n, k, group, asymmetric)
    rng = np.random.default_rng(m)
    weight_dtype = {"w4a16": "int4", "w8a16": "int8", "w8a8": "int8"}.get(scheme, "float8_e4m3fn")
    group_size = pallas.BLOCK if scheme == "fp8_block" else group
    kwargs = {"weight_dtype": weight_dtype, "group_size": group_size}
    if scheme in ("w4a16", "w8a16"):
        x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    else:
        x = jnp.asarray(rng.integers(-128, 128, (m, k)) / 8, weight_dtype)
        groups = k // 128 if scheme == "fp8_block" else 1
        kwargs["input_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, (m, groups)), jnp.float32)
    out = dispatch.quantized_matmul(
        x,
        packed.codes,
        packed.scales,
        packed.zeros,
        layout=packed.layout,
        out_dtype=jnp.float32,
        backend=backend,
        **kwargs,
    )
    expected = np.asarray(
        jax.jit(functools.partial(reference.quantized_matmul, **kwargs))(x, codes, scales, zeros)
    )
    # Hopper's fp8 sums keep about 14 bits; the dequantized copy is rounded to 16.
    tolerance = 1e-2 if scheme.startswith("fp8") or m >= tuning.DENSE_M else 1e-4
    assert np.abs(np.asarray(out) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("m", range(1, 41))
def test_every_small_m(m):
    check("w4a16", m, 192, 1024, group=128)


@pytest.mark.parametrize("m", EDGES)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8", "fp8", "fp8_block"])
def test_bucket_edges(scheme, m):
    check(scheme, m, 264, 1152, group=128 if scheme in ("w4a16", "w8a16") else None)


@pytest.mark.parametrize("m", [3, 16, 64, 512])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_weight_only_schemes(scheme, group, asymmetric, dtype, m):
    check(scheme, m, 200, 576, group=group, asymmetric=asymmetric, dtype=dtype)


@pytest.mark.parametrize("record", sorted(tuning.table("NVIDIA H100 80GB HBM3"), key=str), ids=str)
def test_every_config_of_the_table(record):
    scheme, n, k, m = record
    check(scheme, m, n, k, group=128 if scheme == "w4a16" else None)


def test_auto_runs_the_kernels():
    assert dispatch.kernels_run_here()
    check("w4a16", 5, 192, 1024, group=128, backend="auto")


def test_one_compilation_for_many_layers():
    """The second program with the same kernel finds it compiled."""
    _, _, _, packed = weight("w4a16", 192, 1024, 128)
    x = jnp.ones((8, 1024), jnp.bfloat16)
    problem = tuning.Problem(scheme="w4a16", m=8, n=192, k=1024, group_size=128)

    def layers(x, weights):
        run = functools.partial(pallas.quantized_matmul, problem=problem)
        return [run(x, w.codes, w.scales) for w in weights]

    outs = jax.jit(layers)(x, [packed] * 8)
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


# -- between the products --------------------------------------------------------------------------


def check_rows(found, expected, dtype):
    """A float may be off by what reordered sums and other exponentials do, a code by one step."""
    step = max(2 * float(jnp.finfo(dtype).eps), 1e-6)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        tolerance = {"int8": (0, 1), "float8_e4m3fn": (0.13, 2**-9)}.get(str(one.dtype), (step, 0))
        one, other = (np.asarray(a).astype(np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance[0], atol=tolerance[1])


def eighths(*arguments, **options):
    """Random numbers whose sums are exact in any order; XLA has one of its own."""
    return jnp.round(8 * random(*arguments, **options)) / 8


def check_residual_norm(m, d, s, codes, dtype="bfloat16"):
    x, addends = random(0, m, d, dtype=dtype), eighths(1, s, m, d) if s else None
    weight = 1 + random(2, d, scale=0.1).astype(dtype)
    run = functools.partial(rows.residual_norm, x, addends, weight, eps=1e-5, codes=codes)
    (x, normed), (expected_x, expected) = run(backend="pallas"), run(backend="xla")
    np.testing.assert_array_equal(*(np.asarray(a).astype(np.float32) for a in (x, expected_x)))
    check_rows(normed, expected, dtype)


def check_swiglu(m, d, s, codes, dtype="bfloat16"):
    gate_up = eighths(0, s, m, 2 * d, scale=3.0)
    run = functools.partial(rows.swiglu, gate_up, dtype=dtype, codes=codes)
    check_rows(run(backend="pallas"), run(backend="xla"), dtype)


@every_code
@pytest.mark.parametrize("m", [1, 2, 7, 16, 33, 64, 256])
def test_rows_at_every_m(m, codes):
    check_residual_norm(m, 4096, 4, codes)
    check_swiglu(m, 1024, 2, codes)


@every_code
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("s", [0, 1, 2, 8])
@pytest.mark.parametrize("d", [128, 384, 576, 1792, 4096, 8192])
def test_residual_norm(d, s, codes, dtype):
    check_residual_norm(5, d, s, codes, dtype)


@every_code
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("s", [1, 2, 4])
@pytest.mark.parametrize("d", [128, 1792, 3584, 14336, 28672])
def test_swiglu(d, s, codes, dtype):
    check_swiglu(5, d, s, codes, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("k", [128, 384, 4096, 8192])
@pytest.mark.parametrize("code", ["int8", "float8_e4m3fn"])
def test_quantized_rows(code, k, dtype):
    x = random(0, 33, k, dtype=dtype).at[3].set(0.0).at[5, 7].set(jnp.nan).at[6, 7].set(jnp.inf)
    found, expected = (
        rows.quantize(x, rows.Codes(code), backend=backend) for backend in ("pallas", "xla")
    )
    good = np.arange(33) != 5  # the codes of a NaN with no scale are anything
    check_rows(*jax.tree.map(lambda a: a[good], (found, expected)), dtype)
    assert np.isnan(found.scale[5])


def test_many_times_the_same():
    """Warpgroups that met too early or read too late would show here."""
    x, weight = random(0, 256, 8192, dtype="bfloat16"), jnp.ones(8192, jnp.bfloat16)
    addends = random(1, 2, 256, 8192)
    run = jax.jit(functools.partial(rows.residual_norm, eps=1e-5, codes=rows.Codes("int8")))
    first = jax.device_get(run(x, addends, weight))
    for _ in range(200):
        for one, other in zip(
            jax.tree.leaves(first), jax.tree.leaves(run(x, addends, weight)), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_auto_runs_the_kernels_for_any_number_of_rows():
    weight = jnp.ones(256, jnp.bfloat16)
    for m in (1, 256, 5000):
        run = jax.jit(lambda x: rows.residual_norm(x, None, weight, eps=1e-5))
        text = run.lower(jnp.ones((m, 256), jnp.bfloat16)).as_text()
        assert text.count("@mosaic_gpu_v2") == 1
