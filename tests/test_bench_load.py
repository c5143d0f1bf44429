"""benchmarks/bench_load.py in its tiny form: loading needs little more than the weights."""

import json
from pathlib import Path

import bench_scripts
import numpy as np
import pytest

bench_load, records = bench_scripts.load("bench_load"), bench_scripts.load("records")
make_checkpoint = bench_scripts.load("make_checkpoint")

# A tensor at a time and a model at a time differ here: 97 MB in 24 layers, 8 MB each as float32.
SHAPE = {
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "vocab_size": 512,
}


def test_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_checkpoint.SHAPES, "small", make_checkpoint._LLAMA | SHAPE)
    case = bench_load.Case(shape="small", layers=24, vocab=512, scheme="bf16")
    record = bench_load.bench_load(case, tmp_path, repeat=1)
    weights = 2 * (24 * (512 * (8 + 2 + 2 + 8) * 64 + 3 * 512 * 1024 + 2 * 512) + 2 * 512**2 + 512)
    assert record["parts"]["checkpoint"] == record["parts"]["placed"] == weights
    assert record["parts"]["largest_tensor"] == 2 * 512 * 1024
    assert record["limit"] == weights + 2 * 512 * 1024 + 2**28
    assert 0 < record["value"] < record["limit"]
    assert record["spread"] == [record["value"]] * 2
    assert (
        record.items()
        >= {
            "benchmark": "load",
            "model": "small",
            "layers": 24,
            "scheme": "bf16",
            "backend": "xla",
            "devices": 1,
        }.items()
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_loading_needs_little_more_than_the_weights(backend: str, tmp_path: Path) -> None:
    """Twenty layers more cost what they weigh, not what they are made of."""

    def peak(layers: int) -> tuple[int, int]:
        checkpoint = make_checkpoint.random_checkpoint(
            tmp_path / str(layers), shape=SHAPE, scheme="W8A8", layers=layers
        )
        found = bench_load.measure_apart(checkpoint, backend, "float32")
        return found["peak"], found["placed"]

    (few, few_placed), (many, many_placed) = peak(4), peak(24)
    assert many - few < 1.15 * (many_placed - few_placed) + 16e6


def test_peak_of_anonymous_memory() -> None:
    before = bench_load.anonymous_memory()
    with bench_load.peak_anonymous_memory(0.001) as peak:
        for _ in range(20):
            array = np.ones(50_000_000, np.uint8)
            del array
    assert 40e6 < peak[0] - before < 80e6
    assert bench_load.anonymous_memory() - before < 40e6


def test_records_merge_by_cell(tmp_path: Path) -> None:
    path = tmp_path / "results" / "load-cpu.json"
    first = records.new_record("load", scheme="W4A16", value=1.0, spread=[1.0, 1.0])
    other = records.new_record("load", scheme="bf16", value=2.0)
    again = records.new_record("load", scheme="W4A16", value=3.0, limit=5)
    records.merge_records(path, [first, other])
    records.merge_records(path, [again])
    assert json.loads(path.read_text()) == [again, other]
    assert len(path.read_text().splitlines()) == 4  # one line each: they are read as differences
    assert first.keys() >= {"benchmark", "device", "devices", "jax", "revision", "date"}


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint.random_checkpoint(
        tmp_path / "tiny", shape=SHAPE, scheme="bf16", layers=1
    )
    assert bench_load.main(["--checkpoint", str(checkpoint), "--repeat", "2"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["value"] <= found["limit"]
