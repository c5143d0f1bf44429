"""benchmarks/bench_gptq.py in its tiny form."""

import json
from pathlib import Path

import bench_scripts
import pytest

bench_gptq = bench_scripts.load("bench_gptq")


def test_stages_of_a_layer() -> None:
    shape = bench_scripts.load("make_checkpoint").SHAPES["llama-3.1-8b"]
    assert [(stage.name, stage.heights, stage.k) for stage in bench_gptq.stages(shape)] == [
        ("qkv_proj", (4096, 1024, 1024), 4096),
        ("o_proj", (4096,), 4096),
        ("gate_up_proj", (14336, 14336), 4096),
        ("down_proj", (4096,), 14336),
    ]


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gptq.json"
    sizes = ["--sizes", "32,128", "--tokens", "512", "--repeat", "2"]
    bench_gptq.main([*sizes, "--observer", "absmax", "--group-size", "64", "--json", str(out)])
    [record] = json.loads(out.read_text())
    assert json.loads(capfd.readouterr().out) == record
    cell = {"benchmark": "gptq_solver", "n": 32, "k": 128, "scheme": "W4 g64, A16", "tokens": 512}
    assert record.items() >= {**cell, "options": "absmax, static", "metric": "s"}.items()
    assert record["parts"].keys() == {"hessian", "scales", "factor", "solve", "rest"}
    assert sum(record["parts"].values()) == pytest.approx(record["value"], abs=1e-3)
    low, high = record["spread"]
    assert 0 < low <= record["value"] + 1e-4
    assert record["value"] <= high + 1e-4


@pytest.mark.slow
def test_a_whole_model(tiny_llama3, tmp_path: Path) -> None:
    out = tmp_path / "gptq.json"
    model = str(tiny_llama3("bf16_original"))
    sizes = ["--samples", "4", "--length", "32", "--group-size", "64", "--peer", "other tool=9.5"]
    bench_gptq.main(["--model", model, "--devices", "2", *sizes, "--json", str(out)])
    [record] = json.loads(out.read_text())
    cell = {"benchmark": "gptq", "model": "bf16_original", "layers": 4, "samples": 4, "length": 32}
    assert record.items() >= {**cell, "scheme": "W4 g64, A16", "devices": 2}.items()
    assert record["peers"] == {"other tool": 9.5}
    assert record["parts"].keys() == {
        "forward",
        "hessian",
        "factor",
        "solve",
        "io",
        "export",
        "rest",
    }
    assert sum(record["parts"].values()) == pytest.approx(record["value"], abs=0.2)
    assert record["peak_bytes"]["host"] > 0
