"""The CPU benchmark on a small random model, without a peer."""

import time
from pathlib import Path

import bench_scripts
import pytest

bench_cpu = bench_scripts.load("bench_cpu")
make_checkpoint = bench_scripts.load("make_checkpoint")
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@pytest.mark.slow
def test_every_phase_of_both_schemes_gets_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu, "PREFILL", 64)
    monkeypatch.setattr(bench_cpu, "STEPS", 64)
    # Our own processor time: other work must not turn round a difference of two short runs.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    model = make_checkpoint.random_checkpoint(
        tmp_path / "model", shape=SHAPE, scheme="bf16", layers=1, vocab=256
    )
    records = bench_cpu.bench_cpu(model, None, repeat=1)
    assert [(r["scheme"], r["phase"], r["batch"]) for r in records] == [
        (scheme, phase, batch)
        for scheme in ("bf16", "W4A16 g64")
        for phase, batch in (("decode", 1), ("decode", 8), ("prefill", 1))
    ]
    for record in records:
        assert record["value"] > 0
        assert record["peers"] == {}
