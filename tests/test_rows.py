"""Norms, SwiGLU and quantized rows: the kernels, simulated on the CPU, against plain XLA."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from qllama_kernels import row_kernels, rows
from qllama_kernels.rows import Codes

STATIC = Codes("float8_e4m3fn", jnp.float32(0.02))
CODES = {
    "none": None,
    "int8": Codes("int8"),
    "float8": Codes("float8_e4m3fn"),
    "static": STATIC,
}
every_code = pytest.mark.parametrize("codes", CODES.values(), ids=CODES)


def random(seed, *shape, dtype="float32", scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values, dtype)


def assert_equal(found, expected):
    """Bit for bit; NaN equals NaN."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(
            np.asarray(one).astype(np.float32), np.asarray(other).astype(np.float32)
        )


def residual_norm(seed, m, d, s, dtype, codes, backend, addend_dtype="float32"):
    """Of quarters, so that the sum of their squares is exact in whatever order."""
    weight = 1 + random(0, d, scale=0.1).astype(dtype)
    quarters = [jnp.round(random(seed + i, m, d) * 2) / 4 for i in range(s + 1)]
    x, addends = quarters[0].astype(dtype), jnp.stack(quarters[1:]).astype(addend_dtype)
    return rows.residual_norm(x, addends, weight, eps=1e-5, codes=codes, backend=backend)


@pytest.mark.parametrize(
    ("m", "d", "s", "dtype"),
    [
        (1, 128, 8, "bfloat16"),
        (3, 384, 2, "float16"),
        (16, 128, 4, "bfloat16"),
        (33, 128, 1, "bfloat16"),
        (1, 4096, 2, "bfloat16"),
    ],
)
@every_code
def test_residual_norm(m, d, s, codes, dtype):
    arguments = m, m, d, s, dtype, codes
    assert_equal(residual_norm(*arguments, "interpret"), residual_norm(*arguments, "xla"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_of_sums(dtype):
    """All is rounded as in plain XLA; only the sum of squares is in another order."""
    x, addends = random(0, 2, 4096, dtype=dtype), random(1, 4, 2, 4096)
    weight = 1 + random(2, 4096, scale=0.1).astype(dtype)
    run = functools.partial(rows.residual_norm, x, addends, weight, eps=1e-5)
    (x, normed), (expected_x, expected) = run(backend="interpret"), run(backend="xla")
    assert_equal(x, expected_x)
    step = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*np.asarray([normed, expected], np.float32), rtol=step)
    if dtype != "float32":
        assert np.mean(np.asarray(normed != expected)) < 2e-3


@pytest.mark.parametrize(
    ("m", "d", "s", "dtype"),
    [
        (1, 128, 8, "float32"),
        (3, 384, 2, "float16"),
        (33, 128, 1, "bfloat16"),
        (2, 14336, 1, "bfloat16"),
    ],
)
@every_code
def test_swiglu(m, d, s, codes, dtype):
    gate_up = random(m, s, m, 2 * d, scale=3.0)
    run = functools.partial(rows.swiglu, gate_up, dtype=dtype, codes=codes)
    assert_equal(run(backend="interpret"), run(backend="xla"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_swiglu_rounds_as_transformers_does(dtype):
    """`act_fn(gate) * up` in PyTorch: each of the two in float32, then rounded."""
    gate_up = random(0, 1, 8, 2 * 4096, dtype=dtype, scale=3.0)
    gate, up = np.split(np.asarray(gate_up[0], np.float32), 2, axis=-1)
    silu = (gate / (1 + np.exp(-gate))).astype(dtype).astype(np.float32)
    found = np.asarray(rows.swiglu(gate_up, dtype=dtype, backend="xla"))
    # The exponential's last bit moves few over a rounding tie, to the number beside.
    assert np.mean(found != (silu * up).astype(dtype)) < 1e-3
    np.testing.assert_allclose(
        found.astype(np.float32), silu * up, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_code
def test_xla_rounds_the_same_when_it_compiles_all_as_one(codes, dtype):
    """Left to itself it leaves out a rounding before a cast to float32, as codes have it."""

    def run(x, addends, weight, gate_up):
        x, normed = rows.residual_norm(x, addends, weight, eps=1e-5, codes=codes, backend="xla")
        activations = rows.swiglu(gate_up, dtype=x.dtype, codes=codes, backend="xla")
        again = None if codes is None else rows.quantize(x * weight, codes, backend="xla")
        return x, normed, activations, again

    quarters = jnp.round(random(0, 9, 5, 256) * 2) / 4
    weight = 1 + random(1, 256, scale=0.1).astype(dtype)
    inputs = quarters[0].astype(dtype), quarters[1:], weight, random(2, 2, 5, 512)
    assert_equal(jax.jit(run)(*inputs), run(*inputs))


@pytest.mark.parametrize(
    ("m", "k", "dtype"), [(1, 4096, "bfloat16"), (3, 384, "float16"), (16, 128, "float32")]
)
@pytest.mark.parametrize("codes", [c for c in CODES.values() if c], ids=list(CODES)[1:])
def test_quantize(m, k, codes, dtype):
    x = random(m, m, k, dtype=dtype)
    found = rows.quantize(x, codes, backend="interpret")
    assert_equal(found, rows.quantize(x, codes, backend="xla"))


def test_the_first_norm_adds_nothing():
    x = random(0, 3, 256, dtype="bfloat16")
    weight = jnp.ones(256, jnp.bfloat16)
    run = functools.partial(rows.residual_norm, x, None, weight, eps=1e-5)
    unchanged, normed = run(backend="interpret")
    assert unchanged is x
    assert_equal(normed, run(backend="xla")[1])


def test_addends_in_the_compute_dtype():
    arguments = 0, 3, 256, 1, "bfloat16", Codes("int8")
    run = functools.partial(residual_norm, *arguments, addend_dtype="bfloat16")
    assert_equal(run("interpret"), run("xla"))


def test_leading_dimensions():
    x, weight = random(0, 2, 3, 256, dtype="bfloat16"), jnp.ones(256, jnp.bfloat16)
    addends = random(1, 2, 2, 3, 256, dtype="bfloat16").astype(jnp.float32)
    for codes in (None, Codes("int8"), STATIC):
        run = functools.partial(rows.residual_norm, x, addends, weight, eps=1e-5, codes=codes)
        found, expected = run(backend="interpret"), run(backend="xla")
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
        assert_equal(found, expected)
        gate_up = jnp.concatenate([addends, addends], -1)
        run = functools.partial(rows.swiglu, gate_up, dtype=jnp.bfloat16, codes=codes)
        assert_equal(run(backend="interpret"), run(backend="xla"))


@every_code
def test_no_rows(codes):
    x, weight = jnp.zeros((0, 256), jnp.bfloat16), jnp.ones(256, jnp.bfloat16)
    _, normed = rows.residual_norm(x, None, weight, eps=1e-5, codes=codes, backend="interpret")
    assert jax.tree.leaves(normed)[0].shape == (0, 256)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@every_code
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bad_rows_stay_alone(codes, dtype):
    """Zeros, huge and tiny numbers, infinity and NaN, each in a row of its own."""
    huge = float(jnp.finfo(dtype).max)
    x = np.array(random(0, 8, 256))
    x[1] = 0
    x[2, ::3] = huge
    x[3, 5] = np.nan
    x[4, 200] = np.inf
    x[5] = 1e-7
    x[6] *= huge / 8
    x = jnp.asarray(x, dtype)
    weight = jnp.full(256, 0.5, dtype)
    norm = functools.partial(rows.residual_norm, x, None, weight, eps=1e-5, codes=codes)
    gate_up = jnp.concatenate([x, x[:, ::-1]], -1)[None]
    activation = functools.partial(rows.swiglu, gate_up, dtype=dtype, codes=codes)
    for run in (norm, activation):
        found, expected = run(backend="interpret"), run(backend="xla")
        assert_equal(found, expected)
        for leaf in jax.tree.leaves(found):
            if leaf.ndim:
                assert np.isfinite(np.asarray(leaf, np.float32)[[0, 1, 7]]).all()
    if codes is not None:
        run = functools.partial(rows.quantize, x, codes)
        assert_equal(run(backend="interpret"), run(backend="xla"))


@pytest.mark.parametrize("d", [128, 256, 384, 512, 576, 960, 1024, 1792, 2048, 3072, 3584, 4096])
@pytest.mark.parametrize("times", [1, 2, 4, 7])
def test_every_row_is_cut_into_all_of_its_columns(d, times):
    cut = row_kernels.cut_row(d * times)
    assert cut.pieces * cut.columns == d * times
    assert cut.columns % (32 * cut.vector) == 0
    assert 4 <= cut.pieces <= 4 * cut.warpgroups <= 32


@pytest.mark.parametrize("d", [576, 1792])
def test_pieces_that_two_warpgroups_have(d):
    arguments = 0, 2, d, 2, "bfloat16", Codes("int8")
    assert row_kernels.cut_row(d).pieces % 4
    assert_equal(residual_norm(*arguments, "interpret"), residual_norm(*arguments, "xla"))


def test_no_races(monkeypatch):
    params = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", params)
    # Shapes of their own: another test's kernel, traced without, would do.
    arguments = 0, 5, 512, 3, "bfloat16", Codes("int8")
    assert_equal(residual_norm(*arguments, "interpret"), residual_norm(*arguments, "xla"))
    gate_up = random(0, 3, 5, 1024)
    run = functools.partial(rows.swiglu, gate_up, dtype=jnp.bfloat16, codes=Codes("int8"))
    assert_equal(run(backend="interpret"), run(backend="xla"))


def test_named_backends_refuse_what_they_cannot_run():
    weight = jnp.ones(100, jnp.bfloat16)
    x = jnp.ones((2, 100), jnp.bfloat16)
    for backend in ("pallas", "interpret"):
        with pytest.raises(NotImplementedError, match="rows of 100 columns"):
            rows.residual_norm(x, None, weight, eps=1e-5, backend=backend)
    rows.residual_norm(x, None, weight, eps=1e-5, backend="auto")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        rows.quantize(x, Codes("int8"), backend="cuda")


def test_rows_beyond_what_offsets_reach_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(rows, "kernels_run_here", lambda: True)

    def made(m, backend):
        gate_up = jax.ShapeDtypeStruct((1, m, 2 * 14336), jnp.bfloat16)
        run = functools.partial(rows.swiglu, dtype=jnp.bfloat16, backend=backend)
        return str(jax.make_jaxpr(run)(gate_up))

    assert "mpmd_map" in made(70_000, "auto")
    assert "mpmd_map" not in made(75_000, "auto")
    with pytest.raises(NotImplementedError, match="75000 rows of 14336 columns"):
        made(75_000, "pallas")


def test_operations_that_share_a_kernel_lower_it_once():
    def layers(x, addends, weight):
        for _ in range(3):
            x, normed = rows.residual_norm(
                x, addends, weight, eps=1e-5, codes=Codes("int8"), backend="pallas"
            )
            gate = (normed.codes * normed.scale).astype(x.dtype)
            gate_up = jnp.concatenate([gate, gate], -1)[None]
            addends = rows.swiglu(gate_up, dtype=x.dtype, backend="pallas")[None]
        return normed, rows.quantize(x, STATIC, backend="pallas")

    x = jnp.ones((4, 4096), jnp.bfloat16)
    traced = jax.jit(layers).trace(x, x[None], x[0])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3
