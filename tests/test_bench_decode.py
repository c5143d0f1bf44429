"""The decoding benchmark: a small model measured on the CPU, and processes that fail or hang."""

import argparse
import sys
from pathlib import Path

import bench_scripts
import pytest

bench_decode = bench_scripts.load("bench_decode")


@pytest.fixture(scope="module")
def options() -> argparse.Namespace:
    return argparse.Namespace(
        shape="custom-tiny",
        layers=None,
        scheme=["W4A16"],
        backends=["xla", "nonsense"],
        batch=[2],
        context=[16],
        repeat=1,
        together=2,  # two waves
        timeout=120,
        scratch=None,
        peer_python=None,
    )


@pytest.mark.slow
def test_a_scheme_gets_a_record_with_its_peers(
    options: argparse.Namespace,
    tiny_llama3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_llama3("ct_w4a16_g128")
    monkeypatch.setattr(bench_decode, "_make", lambda scratch, scheme, options: folder)
    (record,) = bench_decode.bench_decode(options)
    assert (record["scheme"], record["batch"], record["context"]) == ("W4A16", 2, 16)
    assert record["value"] > 0
    assert record["limit"] > 0
    assert list(record["peers"]) == ["qllama xla"]  # the one that cannot run costs itself alone
    assert "backend='nonsense' is unknown" in capsys.readouterr().err


def test_a_process_that_hangs_is_stopped(tmp_path: Path) -> None:
    commands = {
        "hangs": [sys.executable, "-c", "import time; time.sleep(60)"],
        "hangs later": [
            sys.executable,
            "-c",
            "print('READY'); input(); import time; time.sleep(60)",
        ],
        "works": [
            sys.executable,
            "-c",
            """print("READY"); input(); print('CELL{"batch": 1, "context": 2}')""",
        ],
    }
    found = dict(bench_decode.run_in_turn(commands, 3))
    assert found == {"hangs": {}, "hangs later": {}, "works": {(1, 2): {"batch": 1, "context": 2}}}
