"""Calibration over several devices: what one device makes, up to rounding, and always the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from drafts import read_tensors
from gptq_reference import activations, heavy_weight
from quantize_cases import digests, float_checkpoint, token_ids

import qllama
from qllama.cli import main
from qllama.gptq import decide
from qllama.gptq.batches import make_batches
from qllama.gptq.hessian import Hessian, accumulate
from qllama.gptq.journal import Journal
from qllama.gptq.linear import quantize_gptq
from qllama.gptq.report import QuantizationReport
from qllama.parallel.mesh import make_mesh, replicated
from qllama.quantization.scheme import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration")

Run = Callable[[int], tuple[Path, QuantizationReport]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_checkpoint(tmp_path_factory.mktemp("source") / "model", layers=3)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The model in W4A16, quantized once with every number of devices asked for."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[int, QuantizationReport] = {}

    def quantized(size: int) -> tuple[Path, QuantizationReport]:
        output = folder / str(size) / "out"
        if size not in made:
            made[size] = quantize(source, output, size)
        return output, made[size]

    return quantized


def quantize(source: Path, output: Path, size: int) -> QuantizationReport:
    return qllama.quantize(source, output, dataset=token_ids(), data_parallel_size=size)


def check_same_figures(expected: QuantizationReport, found: QuantizationReport) -> None:
    """A sum in another order turns codes that lay at a tie, and what follows from them; batches of
    another size on one device do as much."""
    for one, other in zip(expected.linears, found.linears, strict=True):
        assert (one.path, one.figures.tokens) == (other.path, other.figures.tokens)
        assert other.figures.rung == one.figures.rung
        assert other.figures.loss == pytest.approx(one.figures.loss, rel=0.05)
    # Nothing has been rounded yet before the first layer's.
    energies = [linear.figures.output_energy for linear in expected.linears[:3]]
    assert [x.figures.output_energy for x in found.linears[:3]] == pytest.approx(energies, rel=1e-5)
    total = [sum(x.figures.loss for x in report.linears) for report in (expected, found)]
    assert total[1] == pytest.approx(total[0], rel=1e-3)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_devices_report_what_one_does(run: Run, size: int) -> None:
    expected, found = run(1)[1], run(size)[1]
    assert found.device == f"{size} x {expected.device}"
    check_same_figures(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_trained_model(tiny_llama3: Callable[[str], Path], tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(3)
    lengths = (64, 20, 64, 33, 50, 64, 41, 64)
    data = [rng.integers(0, 700, length).tolist() for length in lengths]
    expected, found = (
        qllama.quantize(
            tiny_llama3("bf16_original"), tmp_path / str(n), dataset=data, data_parallel_size=n
        )
        for n in (1, size)
    )
    check_same_figures(expected, found)


def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    append = Journal.append

    def stop(journal: Journal, *unit: Any) -> None:
        if len(journal.entries) == 1:
            raise KeyboardInterrupt
        append(journal, *unit)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, output, 2)
    with pytest.raises(ValueError, match=r"another run.*data_parallel_size was 2, is 1"):
        quantize(source, output, 1)
    quantize(source, output, 2)
    assert digests(output) == digests(run(2)[0])


def test_largest_inputs_are_those_of_one_device(source: Path, tmp_path: Path) -> None:
    """For smoothing, and for scales of inputs and of keys and values. Two devices divide the rows,
    three do not."""
    recipe = {
        "scheme": "W8A8",
        "algorithm": "rtn",
        "smoothquant_strength": 0.8,
        "kv_cache_scheme": "fp8",
        "rules": [{"targets": ["re:.*down_proj"], "scheme": "FP8"}],
    }
    tensors = {}
    for size in (1, 2, 3):
        output = tmp_path / str(size)
        qllama.quantize(source, output, recipe=recipe, dataset=token_ids(), data_parallel_size=size)
        tensors[size] = read_tensors(output / "model.safetensors")
    names = [name for name in tensors[1] if name.endswith(("k_scale", "v_scale", "input_scale"))]
    assert len(names) == 3 * 3
    names += [name for name in tensors[1] if "layernorm" in name]
    for size in (2, 3):
        for name in names:
            found, expected = (tensors[i][name].astype(np.float32) for i in (size, 1))
            np.testing.assert_allclose(found, expected, rtol=1e-2, err_msg=name)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8"])
def test_rows_on_two_devices_get_the_codes_of_one(scheme: str) -> None:
    weights = [heavy_weight(n, 256, seed=n).astype(ml_dtypes.bfloat16) for n in (64, 32)]
    x = jnp.asarray(activations(1024, 256), jnp.float32)
    collected = accumulate(Hessian.zeros(256), x)
    mesh = make_mesh(data_parallel_size=2)
    spread = decide._over_rows(weights, PRESETS[scheme], mesh)
    ones = quantize_gptq(weights, collected, PRESETS[scheme])
    twos = quantize_gptq(spread, jax.device_put(collected, replicated(mesh)), PRESETS[scheme])
    for one, two in zip(ones, twos, strict=True):
        assert isinstance(two.weight.codes, jax.Array)
        assert np.mean(np.asarray(two.weight.codes) == one.weight.codes) > 0.99
        np.testing.assert_array_equal(two.weight.scales, one.weight.scales)
        assert two.report.loss == pytest.approx(one.report.loss, rel=1e-3)
        assert two.report.rtn_loss == pytest.approx(one.report.rtn_loss, rel=1e-5)
        assert two.report.rung == "fp32"


def test_rows_lie_on_all_devices_where_they_can() -> None:
    weight = np.arange(8 * 128, dtype=np.float32).reshape(8, 128)
    for scheme, size, count in [
        ("W4A16", 4, 4),
        ("W8A8", 2, 2),
        ("W8A8", 3, 1),
        ("FP8", 2, 1),
        ("FP8_BLOCK", 2, 1),
        ("W4A16", 1, 1),
    ]:
        mesh = make_mesh(data_parallel_size=size)
        (found,) = decide._over_rows([weight], PRESETS[scheme], mesh)
        shards = found.addressable_shards if isinstance(found, jax.Array) else [found]
        assert len(shards) == count
        np.testing.assert_array_equal(found, weight)


def test_batches_go_round() -> None:
    devices = jax.devices()[:3]
    batches = make_batches([np.ones(8, np.int32)] * 7, 8, devices)
    assert [batch.device for batch in batches] == [*devices, *devices, devices[0]]
    assert [batch.mask.device for batch in batches] == [batch.device for batch in batches]


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (99, r"data_parallel_size=99 needs 99 devices, but there are 8"),
        (0, "data_parallel_size=0 must be a positive integer"),
        (1.5, "data_parallel_size=1.5 must be a positive integer"),
    ],
)
def test_impossible_sizes(source: Path, tmp_path: Path, size: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize(source, tmp_path / "out", size)
    assert not list(tmp_path.iterdir())


def test_the_flag(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-dp", "99", "--dataset", "random-tokens"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *flags]) == 2
    assert "data_parallel_size=99 needs 99 devices" in capsys.readouterr().err
