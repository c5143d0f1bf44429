"""The `qllama` command: what it writes where, and its exit codes."""

import argparse
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qllama
from qllama import LLM, SamplingParams, demo
from qllama.cli import build_parser, doctor, main
from qllama.cli.backends import running
from qllama.cli.chat import Session, fitting, interruptible, typed_lines
from qllama.cli.doctor import CompileCache, Device, findings
from qllama.cli.messages import styled
from qllama.cli.options import sampling_params
from qllama.cli.tables import in_units, table

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "convert"))
}
SHORT = ["-m", "12", "--max-model-len", "128"]

# The command shows warnings as lines; under pytest's filter they would be exceptions.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=128) as llm:
        yield llm


@pytest.fixture
def loaded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The commands use this model instead of loading it again each time."""
    monkeypatch.setattr("qllama.cli.generate.load_llm", lambda args: llm)
    monkeypatch.setattr("qllama.cli.chat.load_llm", lambda args: llm)
    return llm


def type_in(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


# -- the command itself ---------------------------------------------------------------------------


def test_help_is_quick_because_it_starts_no_jax() -> None:
    script = """if True:
        import sys
        from qllama.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as done:
            assert done.code == 0
        slow = {"jax", "numpy", "transformers", "rich"} & sys.modules.keys()
        assert not slow, slow
    """
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "qllama" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["dance"], "dance"),
        (["generate"], "--prompt"),
        (["generate", "-p", "x", "--temp", "warm"], "--temp"),
    ],
)
def test_arguments_that_make_no_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    written = capsys.readouterr()
    assert (stopped.value.code, written.out) == (2, "")
    assert words in written.err
    assert written.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "no/such/folder", "-p", "x"], "no/such/folder: there is no such folder"),
        (["inspect", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["generate", "-p", "x", "--dtype", "int7"], "dtype='int7'"),
        (["generate", "-p", "x", "--backend", "magic"], "backend='magic'"),
        (["generate", "-p", "x", "--max-model-len", "9999999"], "max_model_len=9999999"),
        (["generate", "-p", "x", "--system", "y"], "--chat"),
        (["generate", "-p", "x", "--echo", "--json"], "--echo"),
        (["generate", "-p", "a\udcffb"], "UTF-8"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    assert words in written.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "x", "-m", "0"], "max_tokens"),
        (["-p", "x", "--temp", "-1"], "temperature"),
        (["-p", "x", "--temp", "0", "-n", "2"], "n must be 1"),
        (["-p", "word " * 500], "max_model_len=128"),
    ],
)
def test_mistakes_about_the_request(
    loaded: LLM, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert words in written.err


def test_a_broken_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(demo.model_path(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert main(["generate", str(folder), "-p", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cut short" in error


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (NotImplementedError("later"), 2, "error: later\n"),
        (PermissionError("no"), 1, "error: no\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "error: RESOURCE_EXHAUSTED: 9 GiB\n"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise raised

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == shown


def test_a_mistake_of_qllama_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_verbose_shows_where_a_mistake_arose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no/such/folder", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_single_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(args: argparse.Namespace) -> None:
        warnings.warn("something\nodd", UserWarning, stacklevel=1)
        SamplingParams(temperature=0.001)  # logs a warning

    monkeypatch.setattr(doctor, "run", warn)
    assert main(["doctor"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: something odd"
    assert second.startswith("warning: temperature=0.001")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "qllama", "inspect", "--all", "--json"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# -- generate -------------------------------------------------------------------------------------


def test_generate_writes_the_text_that_the_library_gives(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "-p", "It is a truth", "--temp", "0", *SHORT]) == 0
    written = capsys.readouterr()
    params = SamplingParams(temperature=0, max_tokens=12)
    (expected,) = qllama.generate(None, "It is a truth", params, max_model_len=128)
    assert written.out == expected.outputs[0].text + "\n"
    assert written.err == ""


def test_generate_reads_stdin_and_echoes(
    loaded: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = ["--temp", "0", "-m", "5"]
    assert main(["generate", "-p", "Mr. Darcy\n", "--echo", *greedy]) == 0
    expected = capsys.readouterr().out
    type_in(monkeypatch, b"Mr. Darcy\n\n")  # one line break belongs to the prompt
    assert main(["generate", "-p", "-", "--echo", *greedy]) == 0
    assert capsys.readouterr().out == expected
    assert expected.startswith("Mr. Darcy\n")


def test_generate_json(loaded: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "Emma", "--json", "-m", "3", "-n", "2", "--temp", "1"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["prompt"] == "Emma"
    assert [completion["index"] for completion in output["outputs"]] == [0, 1]
    assert all(len(completion["token_ids"]) == 3 for completion in output["outputs"])
    assert output["metrics"]["num_generation_tokens"] == 6


def test_generate_several_completions(loaded: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "Emma", "-m", "3", "-n", "2", "--temp", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("[1] ")
    assert "\n[2] " in text


def test_generate_chat_uses_the_template(loaded: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--chat", "--system", "Be kind.", "--json", "-m", "1"]
    assert main(["generate", "-p", "Who is Emma?", *arguments]) == 0
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who is Emma?"},
    ]
    expected = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert json.loads(capsys.readouterr().out)["prompt"] == expected


def test_generate_stats_are_on_stderr(loaded: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "Emma was", "-m", "9", "--temp", "0", "--stats"]) == 0
    written = capsys.readouterr()
    assert "tokens/s" not in written.out
    lines = dict(line.split(maxsplit=1) for line in written.err.splitlines())
    assert lines["generation"].startswith("9 tokens, ")
    assert lines["backend"].startswith("W4A16 (56 Linears): xla on cpu")
    assert lines.keys() >= {"prompt", "first", "peak", "loading"}


def test_generate_reports_nan(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (output,) = loaded.generate("Emma", SamplingParams(max_tokens=1))
    output.outputs[0].finish_reason = "error"
    monkeypatch.setattr(loaded, "stream", lambda *_: iter([output]))
    assert main(["generate", "-p", "Emma"]) == 2


def test_flags_change_only_what_they_name(llm: LLM) -> None:
    parser = build_parser()
    defaults = llm.default_sampling_params
    assert sampling_params(parser.parse_args(["generate", "-p", "x"]), llm) == defaults
    flags = (
        "-m 7 --temp 0.5 --top-p 0.7 --top-k 9 --min-p 0.1 --seed 3 -n 2 --stop a --stop b "
        "--presence-penalty 1 --frequency-penalty 0.5 --repetition-penalty 1.5"
    )
    args = parser.parse_args(["generate", "-p", "x", *flags.split()])
    assert sampling_params(args, llm) == SamplingParams(
        n=2,
        max_tokens=7,
        temperature=0.5,
        top_p=0.7,
        top_k=9,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
    )


def test_engine_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    class Fake:
        def __init__(self, model: str | None, **options: object) -> None:
            given.update(options, model=model)
            raise ValueError("seen")

    monkeypatch.setattr("qllama.llm.LLM", Fake)
    flags = (
        "--max-model-len 9 --dtype float16 --kv-cache-dtype fp8 --backend xla "
        "--activation-semantics compressed-tensors -tp 2 -dp 3 --revision v1"
    )
    assert main(["generate", "folder", "-p", "x", *flags.split()]) == 2
    assert given == {
        "model": "folder",
        "revision": "v1",
        "max_model_len": 9,
        "dtype": "float16",
        "kv_cache_dtype": "fp8",
        "backend": "xla",
        "activation_semantics": "compressed-tensors",
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
    }


@pytest.mark.parametrize(
    ("kind", "backend", "how"),
    [
        ("ct_w8a8_int8", "auto", "float32 weights dequantized at load, inputs rounded to int8"),
        ("ct_w8a8_int8", "xla", "xla on cpu, from the quantized weights"),
        ("gptq_w4_g128_desc_act", "reference", "reference on cpu, from the quantized weights"),
    ],
)
def test_the_backend_of_each_scheme(
    kind: str, backend: str, how: str, tiny_llama3: Callable[[str], Path]
) -> None:
    with LLM(tiny_llama3(kind), backend=backend, max_model_len=64) as llm:
        quantized, plain = running(llm)
    assert quantized.linears == 28
    assert quantized.how.endswith(how)
    assert (plain.scheme, plain.linears) == ("unquantized", 1)
    assert plain.how == "xla on cpu, float32 weights"


# -- chat -----------------------------------------------------------------------------------------


def test_chat_through_a_pipe(
    loaded: LLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "conversation.json"
    lines = ["Hello", "", "/system Be brief.", "How is Emma?", f"/save {saved}", "/exit", "Never"]
    type_in(monkeypatch, "\n".join(lines).encode())
    assert main(["chat", "-m", "6", "--temp", "0"]) == 0
    written = capsys.readouterr()
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    answers = [m["content"] for m in json.loads(saved.read_text())["messages"][2::2]]
    assert written.out == "".join(f"{answer}\n" for answer in answers)
    assert "\x1b" not in written.out + written.err


def test_chat_ends_with_its_input(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, b"Hello\n")
    assert main(["chat", "-m", "2"]) == 0


def test_chat_needs_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(demo.model_path(), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    type_in(monkeypatch, b"Hello\n")
    assert main(["chat", str(folder), "--max-model-len", "64"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_commands(llm: LLM, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    session = Session(llm, SamplingParams(max_tokens=4, temperature=0))

    def remark(line: str) -> str:
        assert session.take(line)
        written = capsys.readouterr()
        assert written.out == ""
        return written.err

    assert "no answer yet" in remark("/stats")
    assert session.take("Hello")
    assert len(session.messages) == 2
    capsys.readouterr()
    assert "tokens/s" in remark("/stats")
    assert "of 128 tokens" in remark("/stats")
    assert "/save FILE" in remark("/help")
    assert "/nonsense" in remark("/nonsense")
    assert "error: say where to" in remark("/save")
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    assert "error: " in remark(f"/save {occupied}")
    assert occupied.read_text() == "mine"
    assert "error: " in remark(f"/save {tmp_path}/no/such/folder")
    remark("/system Be brief.")
    remark("/reset")
    assert (session.messages, session.system) == ([], "Be brief.")
    remark("/system")
    assert session.system is None
    assert not session.take("/exit")


def test_a_long_conversation_forgets_its_beginning(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(llm, SamplingParams(max_tokens=16, temperature=0), system="Be brief.")
    for i in range(5):
        assert session.take(f"Tell me something about Emma and Mr. Knightley, number {i}.")
        assert session.last is not None
        assert len(session.last.prompt_token_ids) <= 128 - 16
        assert "Be brief." in (session.last.prompt or "")
        assert f"number {i}." in (session.last.prompt or "")
    assert session.messages[0]["role"] == "user"
    assert "no longer fit" in capsys.readouterr().err


def test_a_message_too_long_is_refused_and_changes_nothing(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(llm, SamplingParams(max_tokens=4))
    assert session.take("word " * 300)
    assert session.messages == []
    assert "too long" in capsys.readouterr().err


def test_fitting_begins_with_a_user() -> None:
    messages = [{"role": role, "content": ""} for role in ("user", "assistant") * 3]
    messages.append({"role": "user", "content": ""})
    assert fitting(messages, lambda kept: True) == messages
    assert fitting(messages, lambda kept: len(kept) < 7) == messages[2:]
    assert fitting(messages, lambda kept: len(kept) < 3) == messages[6:]
    with pytest.raises(ValueError, match="too long"):
        fitting(messages, lambda kept: False)


def test_an_answer_can_be_stopped_and_the_next_is_whole(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    undisturbed = Session(llm, params)
    undisturbed.take("Hello")
    session = Session(llm, params)
    session.take("Hello", stopped=lambda: True)
    whole, part = (s.messages[-1]["content"] for s in (undisturbed, session))
    assert whole.startswith(part)
    assert len(part) < len(whole)
    session.take("/reset")
    session.take("Hello")
    assert session.messages == undisturbed.messages


def test_the_first_ctrl_c_is_noted_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as stopped:  # noqa: PT012
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_does_not_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Hello", KeyboardInterrupt, "again", EOFError])

    def answer(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    assert list(typed_lines()) == ["Hello", "again"]
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_chat_in_a_terminal(tmp_path: Path) -> None:
    """Line editing, colours and Ctrl-D, in a terminal that a second process holds."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    chat = [sys.executable, "-m", "qllama", "chat", "-m", "8", "--max-model-len", "256"]
    terminal = subprocess.Popen(
        [sys.executable, "-c", spawn, *chat],
        env=ENVIRONMENT | {"TERM": "xterm"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert terminal.stdin is not None
    assert terminal.stdout is not None
    screen = b""
    saved = tmp_path / "saved.json"
    steps = [
        (rb"/help lists", b"Hellp\x7fo\r"),
        (rb"\(cut at", f"/save {saved}\r".encode()),
        (rb"2 messages", b"\x04"),
    ]
    try:
        for expected, reply in steps:
            while not re.search(expected + rb".*>>> ", screen, re.DOTALL):
                ready, _, _ = select.select([terminal.stdout], [], [], 120)
                assert ready, screen
                news = os.read(terminal.stdout.fileno(), 4096)
                assert news, screen
                screen += news
            terminal.stdin.write(reply)
            terminal.stdin.flush()
        assert terminal.wait(60) == 0
    finally:
        terminal.kill()
        terminal.wait()
        terminal.stdin.close()
        terminal.stdout.close()
    assert b"\x1b[1;32m" in screen
    assert json.loads(saved.read_text())["messages"][0]["content"] == "Hello"


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {device["platform"] for device in found["devices"]} == {"cpu"}
    assert {"W4A16", "W8A8", "FP8"} <= {backend["scheme"] for backend in found["backends"]}
    assert found["compile_cache"]["folder"] == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "W8A8" in text
    assert "float32" in text


GPU = Device(kind="NVIDIA H100", platform="gpu", compute_capability="9.0", memory=80 << 30)
OLD_GPU = Device(kind="NVIDIA A100", platform="gpu", compute_capability="8.0", memory=40 << 30)
CPU = Device(kind="cpu", platform="cpu", compute_capability=None, memory=None)
CACHE = CompileCache(folder="cache", files=1, size=1, writable=True)
UNSET = {"XLA_PYTHON_CLIENT_ALLOCATOR": None}


@pytest.mark.parametrize(
    ("devices", "driver", "cache", "memory", "words"),
    [
        ((GPU,), "580.1", CACHE, UNSET, []),
        ((CPU,), None, CACHE, UNSET, ["without a GPU"]),
        ((CPU,), "580.1", CACHE, UNSET, ["580.1"]),
        ((), None, CACHE, UNSET, ["no device"]),
        ((OLD_GPU, OLD_GPU), "580.1", CACHE, UNSET, ["no FP8 units"]),
        ((GPU,), "580.1", None, UNSET, ["not kept"]),
        (
            (GPU,),
            "1",
            CompileCache(folder="c", files=1, size=1, writable=False),
            UNSET,
            ["written"],
        ),
        (
            (GPU,),
            "1",
            CompileCache(folder="c", files=1, size=1 << 40, writable=True),
            UNSET,
            ["grown"],
        ),
        ((GPU,), "1", CACHE, {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, ["platform"]),
    ],
)
def test_findings(
    devices: tuple[Device, ...],
    driver: str | None,
    cache: CompileCache | None,
    memory: dict[str, str | None],
    words: list[str],
) -> None:
    found = list(findings(devices, driver, cache, memory))
    assert len(found) == len(words)
    assert all(word in finding.problem for word, finding in zip(words, found, strict=True))


def test_no_device_is_one_line() -> None:
    """A platform that is not installed, which JAX itself answers with an assertion."""
    command = [sys.executable, "-m", "qllama", "generate", "-p", "x"]
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("this machine has CUDA")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: JAX finds no device")
    assert "Traceback" not in done.stderr


# -- text -----------------------------------------------------------------------------------------


def test_tables_align() -> None:
    assert table([["a", "bb", "c"], ["title"], ["ccc", "d", "e"]], right=[1]) == [
        "a    bb  c",
        "title",
        "ccc   d  e",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "0.999 KiB"),
        (1536, "1.5 KiB"),
        (5 << 30, "5 GiB"),
        (1 << 42, "4 TiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert in_units(size) == text


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled("x", "2", io.StringIO()) == "x"
    assert styled("x", "2", Terminal()) == "\x1b[2mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("x", "2", Terminal()) == "x"
