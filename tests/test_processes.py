"""One run in several processes of this machine: what they say, and what happens when one dies."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

import qllama
from qllama import LLM, SamplingParams
from qllama.cli import build_parser, generate, main
from qllama.parallel.mesh import make_mesh
from qllama.parallel.processes import HEARTBEAT_TIMEOUT

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "It is a truth"
PATIENCE = 100  # seconds: several processes compile at once on few cores


class Processes:
    """`qllama generate` in `count` processes, each with its own devices and output files."""

    def __init__(
        self,
        count: int,
        folder: Path,
        arguments: list[str],
        devices: int = 1,
        only: int | None = None,
        port: int | None = None,
    ) -> None:
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
        self.port = port
        paths = os.pathsep.join(str(ROOT / path) for path in ("", "kernels", "convert"))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        self.folder = folder
        self.running = []
        for i in range(count) if only is None else [only]:
            command = [
                sys.executable,
                "-m",
                "qllama",
                "generate",
                *arguments,
                "--process-id",
                f"{i}",
            ]
            command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
                self.running.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=err)
                )

    def out(self, i: int) -> str:
        return (self.folder / f"{i}.out").read_text()

    def err(self, i: int) -> str:
        return (self.folder / f"{i}.err").read_text()

    def wait(self, i: int, seconds: float = PATIENCE) -> int:
        return self.running[i].wait(seconds)


@contextmanager
def started(
    count: int,
    folder: Path,
    arguments: list[str],
    devices: int = 1,
    only: int | None = None,
    port: int | None = None,
) -> Iterator[Processes]:
    processes = Processes(count, folder, arguments, devices, only, port)
    try:
        yield processes
    finally:
        for process in processes.running:
            process.kill()
            process.wait()


def arguments(model: Path, size: int, tokens: int) -> list[str]:
    return [str(model), "-p", PROMPT, "--temp", "0", "-m", str(tokens), "-tp", str(size)]


def expected_text(model: Path, tokens: int, size: int = 1) -> str:
    with LLM(model, tensor_parallel_size=size) as llm:
        params = SamplingParams(temperature=0, max_tokens=tokens)
        return llm.generate(PROMPT, params)[0].outputs[0].text


def test_two_processes_write_one_text_and_stop_when_one_is_killed(
    tiny_llama3, tmp_path: Path
) -> None:
    model = tiny_llama3("ct_w4a16_g128")
    with started(2, tmp_path, arguments(model, 2, 480)) as processes:
        beginning = expected_text(model, 16).strip()
        until = time.monotonic() + PATIENCE
        while len(processes.out(0)) < len(beginning) + 2 and time.monotonic() < until:
            assert processes.running[0].poll() is None, processes.err(0)
            time.sleep(0.02)
        processes.running[1].kill()
        assert processes.wait(0, HEARTBEAT_TIMEOUT + 10) == 1
        assert processes.out(0).strip().startswith(beginning)
        assert processes.out(1) == ""
        last = processes.err(0).splitlines()[-1]
        assert last.startswith("error: this run of several processes cannot go on; most likely one")


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 2)])
def test_four_devices_in_processes_are_four_devices(
    count: int, devices: int, tiny_llama3, tmp_path: Path
) -> None:
    model = tiny_llama3("ct_w8a8_int8")
    with started(count, tmp_path, arguments(model, 4, 24), devices) as processes:
        codes = [processes.wait(i) for i in range(count)]
        assert codes == [0] * count, processes.err(0)
        assert processes.out(0) == expected_text(model, 24, size=4) + "\n"
        assert [processes.out(i) for i in range(1, count)] == [""] * (count - 1)


@pytest.mark.slow
def test_processes_read_their_parts_of_a_native_folder(tiny_llama3, tmp_path: Path) -> None:
    source = tiny_llama3("gptq_w4_g128_desc_act")
    native = tmp_path / "native"
    qllama.convert(source, native, to="native")
    with started(2, tmp_path, arguments(native, 2, 24)) as processes:
        codes = [processes.wait(i) for i in range(2)]
        assert codes == [0, 0], processes.err(0)
        assert processes.out(0) == expected_text(source, 24, size=2) + "\n"


@pytest.mark.parametrize(
    ("process_id", "message"),
    [
        (0, "this is process 0 of 2, and some of the others have not come to 127.0.0.1:"),
        (1, "nobody answers at the coordinator 127.0.0.1:"),
    ],
)
def test_a_process_that_never_starts(process_id: int, message: str, tmp_path: Path) -> None:
    began = time.monotonic()
    arguments = ["-p", PROMPT, "--initialization-timeout", "1.5"]
    with started(2, tmp_path, arguments, only=process_id) as processes:
        assert processes.wait(0) == 1
        last = processes.err(process_id).splitlines()
        assert time.monotonic() - began < PATIENCE / 2
        assert len(last) == 1
        assert last[0].startswith("error: after 1.5 s not all processes of this run are there: ")
        assert message in last[0]


def test_one_of_three_that_never_starts(tmp_path: Path) -> None:
    arguments = ["-p", PROMPT, "--initialization-timeout"]
    with started(3, tmp_path, [*arguments, "60"], only=0) as first:
        until = time.monotonic() + PATIENCE
        while not answers(first.port) and time.monotonic() < until:
            time.sleep(0.1)
        with started(3, tmp_path, [*arguments, "2"], only=1, port=first.port) as second:
            assert second.wait(0) == 1
            assert f"process 0 answers at 127.0.0.1:{first.port}, but others" in second.err(1)


def test_from_python_it_is_an_exception(tmp_path: Path) -> None:
    script = """
        from qllama.parallel.processes import join
        try:
            join("127.0.0.1:9", 2, 1, initialization_timeout=0.5)
        except TimeoutError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "nobody answers at the coordinator 127.0.0.1:9 (Connection refused)" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--initialization-timeout 3", "--initialization-timeout is for a run of several"),
        (
            "--coordinator a:1 --num-processes 2 --process-id 0 --initialization-timeout 0",
            "initialization_timeout=0.0 must be above 0",
        ),
        ("--coordinator a:1", "--num-processes and --process-id missing"),
        ("--coordinator a --num-processes 2 --process-id 0", "coordinator='a' must be HOST:PORT"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "num_processes=0 must be at least"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "process_id=2 must be from 0"),
    ],
)
def test_arguments_that_do_not_go_together(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-p", "x", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_from_stdin_is_for_one_process() -> None:
    flags = "generate -p - --coordinator a:1 --num-processes 2 --process-id 0"
    with pytest.raises(ValueError, match="-p - reads stdin"):
        generate.run(build_parser().parse_args(flags.split()))


def test_meshes_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="replicas belong to one process, and this run has 2"):
        make_mesh(4, 2)
    with pytest.raises(ValueError, match="leaves out some of the 8 devices of 2 processes"):
        make_mesh(4)
    assert make_mesh(8).size == 8
