"""The table of configs: what is in it lowers for CUDA, what is not gets a config that fits."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from qllama_kernels import batch_matmul, decode_matmul, dispatch, fragments, pallas, tuning
from qllama_kernels.tuning import Problem

DEVICES = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
# (device, scheme, n, k, m) -> record; an H100's table has the H200's where it has none of its own.
TABLE = {(device, *key): r for device in DEVICES for key, r in tuning.table(device).items()}
SHAPES = [
    (n // (2**split if column else 1), k // (1 if column else 2**split))
    for shapes in (
        [
            ((6144, 4096), True),
            ((4096, 4096), False),
            ((28672, 4096), True),
            ((4096, 14336), False),
        ],
        [
            ((10240, 8192), True),
            ((8192, 8192), False),
            ((57344, 8192), True),
            ((8192, 28672), False),
        ],
    )
    for (n, k), column in shapes
    for split in range(3)
]


def operands(problem):
    """The shapes of one product: tokens, codes, scales, scales of the tokens."""
    n, k, m, group = problem.n, problem.k, problem.m, problem.group_size
    shape = jax.ShapeDtypeStruct
    if tuning.X_BYTES[problem.scheme] == 2:
        rows, columns = fragments.padded_shape(n, k)
        words = 2 * tuning.BITS[problem.scheme]
        codes = shape((rows // 64, columns // 128, words, 128), jnp.int32)
        scales = shape((-(-k // group) if group else 1, n), jnp.bfloat16)
        return shape((m, k), jnp.bfloat16), codes, scales, None
    dtype = jnp.int8 if problem.scheme == "w8a8" else jnp.float8_e4m3fn
    scales, input_scale = shape((n, 1), jnp.bfloat16), shape((m, 1), jnp.float32)
    if problem.scheme == "fp8_block":
        scales = shape((-(-n // 128), k // 128), jnp.bfloat16)
        input_scale = shape((m, k // 128), jnp.float32)
    return shape((m, k), dtype), shape((n, k), dtype), scales, input_scale


def product(problem, config):
    """The function of those operands."""

    def call(x, codes, scales, input_scale):
        return pallas.quantized_matmul(
            x, codes, scales, problem=problem, input_scale=input_scale, config=config
        )

    return call


def lower(problem, config):
    """The CUDA program of one product, as text."""
    traced = jax.jit(product(problem, config)).trace(*operands(problem))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def check_record(key):
    device, scheme, n, k, m = key
    problem = Problem(scheme=scheme, m=m, n=n, k=k, group_size=128 if scheme == "w4a16" else None)
    config = tuning.choose(problem, device)
    assert config == tuning.from_record(TABLE[key])
    assert tuning.fits(problem, config)
    assert "@mosaic_gpu_v2" in lower(problem, config)


@pytest.mark.parametrize("key", sorted(TABLE)[::12], ids=str)
def test_a_sample_of_the_table_lowers(key):
    check_record(key)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(TABLE), ids=str)
def test_all_of_the_table_lowers(key):
    check_record(key)


@pytest.mark.slow
def test_no_config_of_the_table_spills_on_hopper():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin and the wheels that tests/sm90a.py names")
    root = Path(__file__).parent.parent
    path = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "tests"))
    run = subprocess.run(
        [sys.executable, root / "tests" / "sm90a.py"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert reports
    assert [report for report in reports if not report["spilled"] or any(report["spilled"])] == []


def test_dequantizing_product_lowers():
    problem = Problem(scheme="w4a16", m=tuning.DENSE_M, n=256, k=256, group_size=128)
    assert "@mosaic_gpu_v2" in lower(problem, None)


@pytest.mark.parametrize("m", [1, 9, 16, 17, 200])
@pytest.mark.parametrize(
    ("scheme", "n", "k", "group"),
    [
        ("w4a16", 264, 576, 32),
        ("w8a16", 70, 200, None),
        ("w8a8", 264, 384, None),
        ("fp8_block", 264, 384, 128),
    ],
)
def test_odd_shapes_lower(scheme, n, k, group, m):
    problem = Problem(scheme=scheme, m=m, n=n, k=k, group_size=group)
    assert "@mosaic_gpu_v2" in lower(problem, tuning.choose(problem))


def test_tables_are_well_formed():
    folder = resources.files("qllama_kernels").joinpath("configs")
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    assert files
    for file in files:
        for record in json.loads(file.read_text()):
            assert tuning.to_record(tuning.from_record(record)) == {
                name: record[name] for name in ("kernel", "config")
            }
            assert record["m"] in tuning.M_BUCKETS


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8", "fp8", "fp8_block"])
@pytest.mark.parametrize("m", [1, 9, 33, 100, 256, 4096])
def test_heuristic_fits_every_llama_shape(scheme, m):
    for n, k in SHAPES:
        group = 128 if scheme in ("w4a16", "fp8_block") else None
        problem = Problem(scheme=scheme, m=m, n=n, k=k, group_size=group)
        config = tuning.choose(problem)
        assert tuning.fits(problem, config)
        assert isinstance(config, (decode_matmul.DecodeConfig, batch_matmul.BatchConfig))
        if isinstance(config, decode_matmul.DecodeConfig):
            assert config.block_m >= m


@pytest.mark.parametrize("shape", [(1, 64), (8, 128), (136, 576), (64, 100_000)])
def test_heuristic_knows_odd_shapes(shape):
    n, k = shape
    for scheme in ("w4a16", "w8a8"):
        for m in (1, 40, 300):
            problem = Problem(scheme=scheme, m=m, n=n, k=k, group_size=None)
            assert tuning.fits(problem, tuning.choose(problem))


def test_many_tokens_get_the_largest_tiles_that_keep_the_device_busy():
    def tile(scheme, m, n, k):
        return tuning.choose(Problem(scheme=scheme, m=m, n=n, k=k), DEVICES[1]).block_m

    assert tile("fp8", 2048, 4096, 14336) == tile("w8a8", 512, 28672, 4096) == 256
    assert tile("fp8", 512, 4096, 14336) == 128  # 128 tiles, on 132 multiprocessors
    assert tile("w4a16", 2048, 28672, 4096) == 128  # no registers for more


def test_eight_bits_and_a_wave_of_tiles_take_the_largest():
    """What every product of 256 tokens that was tuned chose."""
    for scheme in ("w8a8", "fp8"):
        chosen = tuning.heuristic(Problem(scheme=scheme, m=256, n=28672, k=8192))
        assert chosen == batch_matmul.BatchConfig(block_m=256, warpgroups=2, blocks=1, stages=4)
        chosen = tuning.heuristic(Problem(scheme=scheme, m=256, n=8192, k=28672))
        assert chosen == batch_matmul.BatchConfig(block_m=128, warpgroups=2, blocks=1, stages=6)


def test_eight_bits_and_a_tile_for_each_multiprocessor_are_not_split():
    for scheme, m, ring in (("fp8", 16, (4, 4)), ("w8a8", 32, (4, 4)), ("fp8", 64, (2, 6))):
        config = tuning.heuristic(Problem(scheme=scheme, m=m, n=5120, k=8192))
        assert (config.warpgroups, config.splits) == (1, 1)
        assert (config.block_m, config.blocks, config.stages) == (m, *ring)
    few = tuning.heuristic(Problem(scheme="fp8", m=16, n=1280, k=8192))  # 20 tiles
    assert few.splits > 1


def test_products_of_many_tokens_are_never_left_to_xla():
    for scheme in ("w4a16", "w8a8", "fp8", "fp8_block"):
        problem = Problem(scheme=scheme, m=2048, n=4096, k=4096)
        assert not tuning.xla_is_faster(problem, DEVICES[1])


def test_the_table_is_used_on_its_device_only():
    for device in DEVICES:
        key = next(key for key in sorted(TABLE) if key[:2] == (device, "w4a16"))
        _, scheme, n, k, m = key
        problem = Problem(scheme=scheme, m=m, n=n, k=k, group_size=128)
        assert tuning.choose(problem, device) == tuning.from_record(TABLE[key])
        assert tuning.choose(problem, "some other card") == tuning.heuristic(problem)


def test_an_h100_has_its_own_configs_and_the_others_of_an_h200():
    h200, h100 = (tuning.table(device) for device in DEVICES)
    assert h200.keys() <= h100.keys()
    assert any(h100[key] != h200[key] for key in h200)
    assert any(h100[key] == h200[key] for key in h200)


def test_an_unknown_device_runs_no_kernels_by_itself():
    assert dispatch.kernels_run_here() is (jax.default_backend() == "gpu")
