"""The journal: runs that are killed go on, and end with the same bytes as one that was not."""

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantize_cases import digests, float_checkpoint, token_ids

import qllama
from qllama.gptq import journal
from qllama.gptq.journal import journal_folder, open_journal

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration")

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "convert"))
}
LAYERS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_checkpoint(tmp_path_factory.mktemp("source") / "model", layers=LAYERS)


def quantize(source: Path, output: Path, **options: Any) -> Any:
    """The run that all tests interrupt."""
    return qllama.quantize(source, output, dataset=token_ids(), **options)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(source, folder)
    return digests(folder)


# -- killed ----------------------------------------------------------------------------------------


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """The same run in a process of its own."""
    script = f"""if True:
        import sys, warnings
        sys.path.insert(0, {str(ROOT / "tests")!r})
        warnings.simplefilter("ignore")
        import qllama
        from quantize_cases import token_ids
        qllama.quantize({str(source)!r}, {str(output)!r}, dataset=token_ids())
    """
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def signs_of_life(output: Path) -> list[str]:
    """Names in the journal, and beside the output while it is written."""
    return sorted(path.name for path in output.parent.glob(f".{output.name}.*/*"))


def kill_later(process: subprocess.Popen[bytes], output: Path, delay: float) -> bool:
    """Kill the process some time after it has written something new; False: it ended before."""
    before = signs_of_life(output)
    while process.poll() is None and signs_of_life(output) == before and not output.exists():
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), stderr.decode()
    return process.returncode != 0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_started_again_it_makes_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: dict[str, str], kills: int
) -> None:
    chance = random.Random(kills)
    killed, rounds = 0, 0
    while killed < kills:
        rounds += 1
        output = tmp_path / str(rounds) / "out"
        while killed < kills and not output.exists():
            killed += kill_later(start(source, output), output, chance.uniform(0, 0.3))
        if not output.exists():
            last = start(source, output)
            _, stderr = last.communicate()
            assert last.returncode == 0, stderr.decode()
        assert digests(output) == undisturbed
        assert not (journal_folder(output) / "manifest.json").exists()


# -- gone on with ----------------------------------------------------------------------------------


class StoppedError(Exception):
    """Instead of a kill, where a process of its own is not needed."""


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int, how: Exception) -> None:
    """Let a run end after it has written so many units down."""
    write = journal.write_safetensors
    left = iter([write] * units)

    def write_some(path: Path, *arguments: Any) -> Any:
        follow = next(left, None)
        if follow is None:
            path.write_bytes(b"half a fi")
            raise how
        return follow(path, *arguments)

    monkeypatch.setattr(journal, "write_safetensors", write_some)


@pytest.fixture
def interrupted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Path]:
    """An output that is not there, and a journal with some layers."""

    def make(units: int) -> Path:
        with monkeypatch.context() as patch:
            stop_after(patch, units, StoppedError())
            with pytest.raises(StoppedError):
                quantize(source, tmp_path / "out")
        return tmp_path / "out"

    return make


def count_solves(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from qllama.gptq import decide

    solve, solved = decide.quantize_gptq, []

    def count(*arguments: Any, **options: Any) -> Any:
        solved.append(arguments)
        return solve(*arguments, **options)

    monkeypatch.setattr(decide, "quantize_gptq", count)
    return solved


@pytest.mark.parametrize("units", [0, 1, LAYERS - 1])
def test_finished_layers_are_not_quantized_again(
    source: Path,
    interrupted: Callable[[int], Path],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    units: int,
) -> None:
    output = interrupted(units)
    solved = count_solves(monkeypatch)
    report = quantize(source, output)
    assert len(solved) == 4 * (LAYERS - units)
    assert len(report.linears) == 7 * LAYERS
    assert digests(output) == undisturbed
    assert not journal_folder(output).exists()


def test_a_layer_is_written_while_the_next_is_solved(
    source: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved = count_solves(monkeypatch)
    write = journal.write_safetensors

    def write_late(path: Path, *arguments: Any) -> Any:
        layer = int(re.findall(r"unit_(\d+)", path.name)[0])
        if layer < LAYERS - 1:
            deadline = time.monotonic() + 60
            while len(solved) <= 4 * (layer + 1):
                assert time.monotonic() < deadline, "nobody goes on before this is written"
                time.sleep(0.001)
        return write(path, *arguments)

    monkeypatch.setattr(journal, "write_safetensors", write_late)
    quantize(source, tmp_path / "out")
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_layer_counts_only_with_its_hash(
    source: Path,
    interrupted: Callable[[int], Path],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    output = interrupted(3)
    path = journal_folder(output) / "unit_001.safetensors"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"\\0")
    solved = count_solves(monkeypatch)
    quantize(source, output)
    assert len(solved) == 4 * (LAYERS - 1)
    assert digests(output) == undisturbed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"observer": "absmax"}, "recipe was"),
        ({"dataset": token_ids(11)}, "calibration was"),
    ],
)
def test_runs_are_not_mixed(
    source: Path,
    interrupted: Callable[[int], Path],
    undisturbed: dict[str, str],
    change: dict[str, Any],
    says: str,
) -> None:
    output = interrupted(2)
    with pytest.raises(ValueError, match=f"holds 2 layers of another run.*{says}.*resume=False"):
        qllama.quantize(source, output, **({"dataset": token_ids()} | change))
    quantize(source, output)  # the run itself still goes on
    assert digests(output) == undisturbed


def test_another_model_is_another_run(tmp_path: Path, interrupted: Callable[[int], Path]) -> None:
    output = interrupted(1)
    other = float_checkpoint(tmp_path / "other", layers=LAYERS, rope_theta=10000.0)
    with pytest.raises(ValueError, match=r"of another run.*model was"):
        quantize(other, output)
    quantize(other, output, resume=False)
    assert not journal_folder(output).exists()


def test_a_damaged_manifest_is_refused(source: Path, interrupted: Callable[[int], Path]) -> None:
    output = interrupted(1)
    manifest = journal_folder(output) / "manifest.json"
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "run": {}, "units": [{}]}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged.*resume=False"):
            quantize(source, output)
    manifest.write_text(json.dumps({"version": 99, "run": {}, "units": []}))
    with pytest.raises(ValueError, match="another run"):
        quantize(source, output)


# -- in the way ------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_finished(
    source: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match=r"No space left.* the 2 layers that are finished"):
            quantize(source, output)
    assert not list(journal_folder(output).glob("*.partial"))
    assert not output.exists()
    solved = count_solves(monkeypatch)
    quantize(source, output)
    assert len(solved) == 4 * (LAYERS - 2)
    assert digests(output) == undisturbed


def disk_full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_end_keeps_all_layers(
    source: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("qllama_convert.writer.write_safetensors", disk_full)
        with pytest.raises(OSError, match="No space left"):
            quantize(source, output)
    assert not output.exists()
    solved = count_solves(monkeypatch)
    quantize(source, output)
    assert not solved
    assert digests(output) == undisturbed


def test_a_place_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quantize(source, tmp_path / "file" / "out")


def hold(output: Path, run: dict[str, Any], held: Any, let_go: Any) -> None:
    with open_journal(output, run, resume=True):
        held.set()
        let_go.wait(60)


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(output, {}, held, let_go))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(ValueError, match="in use: another process"):
            quantize(source, output)
    finally:
        let_go.set()
        other.join()
    quantize(source, output)
    assert output.exists()
