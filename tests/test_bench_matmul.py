"""benchmarks/bench_matmul.py: what needs no GPU of it."""

import json
from pathlib import Path

import bench_scripts
import jax.numpy as jnp
import numpy as np
import pytest
from qllama_kernels.tuning import Problem

bench_matmul = bench_scripts.load("bench_matmul")


def test_limit_is_memory_for_few_tokens_and_arithmetic_for_many() -> None:
    def limit(m: int) -> float:
        problem = Problem(scheme="w4a16", m=m, n=4096, k=8192, group_size=128)
        return bench_matmul.limit_us(problem, 3e12)

    # Half a byte a weight and two bytes for each 128.
    assert limit(1) == pytest.approx(4096 * 8192 * (0.5 + 2 / 128) / 3e12 * 1e6)
    assert limit(8192) == pytest.approx(2 * 8192 * 4096 * 8192 / 800e12 * 1e6)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_operands_are_many_weights_and_the_product_of_the_first(scheme: str) -> None:
    made = bench_matmul.make_weights(scheme, 128, 256)
    operands = bench_matmul.make_operands(made, 3)
    assert len(operands.weights) == 32  # small ones: as many as are ever made
    codes, scales = (np.asarray(array) for array in made.natural)
    x = np.asarray(operands.x, np.float32)
    if scheme == "w8a8":
        weight = codes.astype(np.float32) * np.asarray(scales, np.float32)
        x = x * np.asarray(operands.input_scale)
    else:
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(128, 256)
        signed = np.where(nibbles > 7, nibbles.astype(np.int32) - 16, nibbles)
        weight = signed * np.asarray(scales, np.float32).repeat(128, axis=1)
    found = jnp.asarray(x @ weight.T)
    assert bench_matmul.max_rel_error(found, operands.expected) < 1e-2


def test_a_worker_that_fails_costs_its_own_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "if '--prepare' in sys.argv:\n"
        "    folder = pathlib.Path(sys.argv[sys.argv.index('--folder') + 1])\n"
        "    folder.joinpath('prepared.json').write_text('{}')\n"
        "    sys.exit()\n"
        "scheme, n, k = sys.argv[sys.argv.index('--worker') + 1].split(',')\n"
        "for m in sys.argv[sys.argv.index('--tokens') + 1:]:\n"
        "    if (scheme, m) == ('fp8', '16'): sys.exit('the GPU fell off the bus')\n"
        "    print(json.dumps(dict(scheme=scheme, n=int(n), k=int(k), m=int(m), value=1.0,\n"
        "          limit=1.0, max_rel_error=0.0, kernel='decode', peers={})), flush=True)\n"
    )
    monkeypatch.setattr(bench_matmul, "__file__", str(script))
    out = tmp_path / "records.json"
    flags = "--shapes 128,256 --schemes w8a8 fp8 --tokens 1 16 --no-torch"
    assert bench_matmul.main([*flags.split(), "--json", str(out)]) == 1
    found = {(record["scheme"], record["m"]) for record in json.loads(out.read_text())}
    assert found == {("w8a8", 1), ("w8a8", 16), ("fp8", 1)}
    assert "fell off the bus" in capsys.readouterr().err
