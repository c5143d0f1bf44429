"""benchmarks/bench_sharded.py in its tiny form."""

import json
import time
from pathlib import Path

import bench_scripts
import jax
import numpy as np
import pytest
from qllama_convert.loader import load_replicas
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization

from qllama.config import LlamaConfig
from qllama.parallel.mesh import make_mesh

bench_sharded = bench_scripts.load("bench_sharded")
make_checkpoint = bench_scripts.load("make_checkpoint")

SHAPE = make_checkpoint._LLAMA | {
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 256,
}


def test_one_layer_is_many(tmp_path: Path) -> None:
    make_checkpoint.random_checkpoint(tmp_path / "one", shape=SHAPE, scheme="W8A8", layers=1)
    with bench_sharded.RepeatedCheckpoint(tmp_path / "one", 3) as checkpoint:
        config = LlamaConfig.from_hf(checkpoint.config)
        quantization = parse_quantization(checkpoint, linear_shapes(config))
        (model,) = load_replicas(
            checkpoint, config, quantization, [make_mesh(2)], dtype=np.float32, backend="xla"
        )
    assert len(model.layers) == 3
    first, *others = model.layers
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_checkpoint.SHAPES, "small", SHAPE)
    # Here instead of in a process of its own, which would compile for as long again.
    monkeypatch.setattr(
        bench_sharded,
        "measure_apart",
        lambda folders, repeat, timeout: [
            (case, list(bench_sharded.measure(folder, case, repeat)))
            for case, folder in folders.items()
        ],
    )
    monkeypatch.setattr("qllama.llm.open_checkpoint", None)  # restored after the test
    decode = bench_scripts.load("bench_decode")
    monkeypatch.setattr(decode, "FEW", 5)
    monkeypatch.setattr(decode, "MANY", 61)
    # Our own processor time: other work must not turn round a difference of two short runs.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    out = tmp_path / "records.json"
    flags = "--shape small --scheme W8A8 --size 1 2 --batch 2 --context 16 --repeat 1"
    arguments = [*flags.split(), "--json", str(out), "--scratch", str(tmp_path)]
    assert bench_sharded.main(arguments) == 0
    one, two = json.loads(out.read_text())
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["layers"] == two["layers"] == 3
    assert two["peers"] == {"qllama on one device": one["value"]}
    assert one["parts"]["sums alone"] == 0 < two["parts"]["sums alone"]
    for record in (one, two):
        # Norms are not planned; they are much of so small a model.
        assert 0.9 < record["parts"]["planned"] / record["parts"]["held"] <= 1
        assert record["value"] > 0
        assert record["limit"] > 0
