"""Hub ids, against a hub on this machine. huggingface_hub reads its settings when it is imported,
so every question is asked in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fake_hub
import pytest
from fake_hub import BROKEN, GATED, MODEL, TOKEN, Hub
from qllama_convert.hub import resolve

from qllama import LLM, demo
from qllama.errors import CheckpointError

NEEDED = {
    "config.json": b"{}",  # every content once: files that are equal are downloaded once
    "generation_config.json": b'{"generation": 1}',
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 1000,
    "model.safetensors.index.json": b'{"index": 1}',
    "quantize_config.json": b'{"quantize_config": 1}',
    "tokenizer.json": b'{"tokenizer": 1}',
    "tokenizer_config.json": b'{"tokenizer_config": 1}',
    "special_tokens_map.json": b'{"special_tokens_map": 1}',
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"# card",
    "LICENSE": b"free",
}
NOT_NEEDED = {
    ".gitattributes": b"*",
    "consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "model.onnx": b"x",
    "model-q4.gguf": b"x",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"x",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"x",
    "training_args.pt": b"x",
    "figure.png": b"x",
}

_SCRIPT = """
import json, resource, sys, warnings
warnings.simplefilter("error")
from qllama_convert import hub
model, options = json.loads(sys.argv[1])
limit = options.pop("file_size_limit", None)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(json.dumps(["folder", str(hub.resolve(model, **options))]))
except ValueError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Answer(NamedTuple):
    kind: str  # "folder", or the name of an error
    text: str  # the path, or the message
    stderr: str

    @property
    def folder(self) -> Path:
        assert self.kind == "folder", self.text
        return Path(self.text)

    @property
    def problem(self) -> str:
        """The message of a CheckpointError, which is one line."""
        assert self.kind == "CheckpointError", self
        assert "\n" not in self.text
        return self.text


Ask = Callable[..., Answer]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub.serve(NEEDED | NOT_NEEDED) as hub:
        yield hub


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """For a process that asks `hub` and has its cache below `folder`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return inherited | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """`ask(model, **options_of_resolve, env={...})`, with a cache that starts empty."""

    def ask(model: str, *, env: dict[str, str] | None = None, **options: Any) -> Answer:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, json.dumps([model, options])],
            env=environment(hub, tmp_path) | (env or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return Answer(*json.loads(done.stdout), done.stderr)

    return ask


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is downloaded.


def test_only_the_files_that_are_needed(hub: Hub, ask: Ask) -> None:
    answer = ask(MODEL)
    assert contents(answer.folder) == NEEDED
    assert hub.downloaded() == NEEDED.keys()
    assert answer.stderr == ""  # progress is for terminals
    assert all("authorization" not in headers for headers in hub.headers)
    assert all("qllama" in headers["user-agent"] for headers in hub.headers)


def test_nothing_is_downloaded_twice(hub: Hub, ask: Ask) -> None:
    first = ask(MODEL).folder
    hub.requests.clear()
    assert ask(MODEL).folder == first
    assert hub.downloaded() == set()
    hub.files["config.json"] = b'{"new": 1}'
    second = ask(MODEL).folder
    assert hub.downloaded() == {"config.json"}
    assert contents(second) == NEEDED | {"config.json": b'{"new": 1}'}
    assert contents(first) == NEEDED


def test_a_tokenizer_alone(hub: Hub, ask: Ask) -> None:
    folder = ask(MODEL, files=["config.json", "tokenizer*", "*.jinja"]).folder
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert contents(folder).keys() == expected == hub.downloaded()


def test_a_revision(hub: Hub, ask: Ask) -> None:
    hub.branches["older"] = {"config.json": b'{"older": true}'}
    folder = ask(MODEL, revision="older").folder
    assert contents(folder) == {"config.json": b'{"older": true}'}
    commit = fake_hub.sha_of(hub.branches["older"])
    assert ask(MODEL, revision=commit).folder == folder
    problem = ask(MODEL, revision="gone").problem
    assert problem == (
        f"{MODEL} at revision 'gone': {hub.endpoint} has the model, but no such branch, tag or "
        "commit"
    )


def test_a_cut_connection_is_resumed(hub: Hub, ask: Ask) -> None:
    name = "model-00002-of-00002.safetensors"
    chunk = 10 * 2**20  # what huggingface_hub writes at a time
    hub.files[name] = bytes(range(256)) * (3 * chunk // 256)
    hub.cuts[name] = [chunk + 1000, 5]
    assert contents(ask(MODEL).folder) == NEEDED | {name: hub.files[name]}
    assert hub.ranges == [f"bytes={chunk}-"] * 2


def test_a_connection_that_stays_cut(hub: Hub, ask: Ask) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.cuts[name] = [0] * 6
    problem = ask(MODEL).problem
    assert problem.startswith(f"{MODEL}: the download broke off (RemoteProtocolError: ")
    assert problem.endswith("; run this again: complete files are kept")
    offline = ask(MODEL, env=OFFLINE).problem
    assert "is incomplete, and HF_HUB_OFFLINE forbids to download it; go online" in offline
    hub.requests.clear()
    assert contents(ask(MODEL).folder) == NEEDED
    assert name in hub.downloaded()
    assert "model-00001-of-00002.safetensors" not in hub.downloaded()


def test_ctrl_c_ends_a_download(hub: Hub, tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.files[name] = bytes(100 << 20)
    hub.slow[name] = 0.2  # twenty seconds in all
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, json.dumps([MODEL, {}])],
        env=environment(hub, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while name not in hub.downloaded():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")


# Offline.


def test_offline_the_cached_copy_is_used(hub: Hub, ask: Ask) -> None:
    online = ask(MODEL).folder
    hub.requests.clear()
    assert ask(MODEL, env=OFFLINE).folder == online
    assert hub.requests == []
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(MODEL, env=nobody).folder == online


def test_offline_without_a_copy(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    cache = tmp_path / "home" / "hub"
    assert ask(MODEL, env=OFFLINE).problem == (
        f"{MODEL}: there is no copy in {cache}, and HF_HUB_OFFLINE forbids to download it; go "
        "online and run this again, or give the folder of a checkpoint"
    )
    assert hub.requests == []
    problem = ask(MODEL, env={"HF_ENDPOINT": "http://127.0.0.1:9"}).problem
    assert f"there is no copy in {cache}, and http://127.0.0.1:9 cannot be reached" in problem
    assert "ConnectError" in problem


# Tokens and refusals.


def test_the_token_is_sent(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    hub.needs_token = True
    problem = ask(MODEL).problem
    assert problem == (
        f"{MODEL}: there is no such folder here and no such model on {hub.endpoint}; check the "
        "spelling, or if the model is private, log in with `hf auth login`, or set HF_TOKEN"
    )
    hub.headers.clear()
    assert contents(ask(MODEL, env={"HF_TOKEN": TOKEN}).folder) == NEEDED
    assert {headers["authorization"] for headers in hub.headers} == {f"Bearer {TOKEN}"}
    (tmp_path / "logged-in").mkdir()
    (tmp_path / "logged-in" / "token").write_text(TOKEN)
    assert ask(MODEL, env={"HF_HOME": str(tmp_path / "logged-in")}).kind == "folder"


def test_a_wrong_token(hub: Hub, ask: Ask) -> None:
    problem = ask(MODEL, env={"HF_TOKEN": "hf_wrong"}).problem
    assert f"{hub.endpoint} does not accept the token; log in with" in problem


def test_models_that_cannot_be_had(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    assert "there is no such folder here and no such model on" in ask("Owner/none").problem
    assert f"is gated; ask for access on {hub.endpoint}, then log in" in ask(GATED).problem
    problem = ask(BROKEN).problem
    assert f"no copy in {tmp_path / 'home' / 'hub'}, and {hub.endpoint} answers 503" in problem
    assert "(The hub is being mended)" in problem


def test_a_full_disk(hub: Hub, ask: Ask, tmp_path: Path) -> None:
    # A limit on file sizes stops the writing where a full disk would.
    hub.files["model-00001-of-00002.safetensors"] = b"1" * 1_000_000
    problem = ask(MODEL, file_size_limit=100_000).problem
    assert problem == (
        f"{MODEL}: cannot be stored in {tmp_path / 'home' / 'hub'}: File too large; HF_HOME names "
        "another folder"
    )
    assert ask(MODEL).kind == "folder"


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"is full; free space .*set HF_HOME"):
        resolve(MODEL)


# Folders.

NO_IDS = [
    "./llama",
    "../llama",
    "/models/llama",
    "~/models/llama",
    "models/llama/",
    "a/b/c",
    "llama",
    "",
    "C:\\models\\llama",
    "owner/na me",
    "owner/.hidden",
    "https://huggingface.co/owner/name",
]


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_id_is_never_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    with pytest.raises(CheckpointError, match="there is no such folder; expected a checkpoint"):
        resolve(name)
    with pytest.raises(CheckpointError, match="there is no such folder; expected a checkpoint"):
        LLM(name)


def test_a_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve(Path(MODEL))
    Path(MODEL).mkdir(parents=True)
    assert resolve(MODEL) == Path(MODEL)
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="revision='main' belongs to a Hub id") as caught:
        resolve(MODEL, "main")
    assert not isinstance(caught.value, CheckpointError)


def test_an_impossible_id(hub: Hub, ask: Ask) -> None:
    assert "no such folder here, and this is no Hub id" in ask("owner/a--b").problem
    assert hub.requests == []


# Looked into, not downloaded.


@pytest.fixture
def inspect(hub: Hub, tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """`qllama inspect MODEL`: its JSON, or text where it is refused, and stderr."""

    def inspect(*arguments: str, env: dict[str, str] | None = None) -> tuple[Any, str]:
        done = subprocess.run(
            [sys.executable, "-m", "qllama", "inspect", MODEL, *arguments],
            env=environment(hub, tmp_path) | (env or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in (0, 2), done.stderr
        return json.loads(done.stdout) if "--json" in arguments and done.stdout else done.stdout, (
            done.stderr
        )

    return inspect


LOOKED_AT = {"folder", "headers_only", "anomalies"}


@pytest.mark.parametrize(
    "kind",
    [
        "gptq_w4_g128_desc_act",
        "ct_fp8_static_kv_fp8",
        pytest.param("bf16_original", marks=pytest.mark.slow),
    ],
)
def test_only_headers_are_fetched(
    kind: str,
    hub: Hub,
    inspect: Callable[..., tuple[Any, str]],
    ask: Ask,
    tiny_llama3: Callable[[str], Path],
) -> None:
    hub.files.clear()
    hub.files.update({p.name: p.read_bytes() for p in tiny_llama3(kind).iterdir() if p.is_file()})
    hub.files.pop("expected.safetensors")
    weights = "model.safetensors"
    remote, stderr = inspect("--json")
    assert stderr == ""
    assert (remote["folder"], remote["headers_only"]) == (MODEL, True)
    assert "tokenizer.json" not in hub.downloaded()
    assert hub.sent[weights] == 100_000 < len(hub.files[weights]) / 10
    notice = "it is not downloaded: scales were not looked at"
    assert any(text.startswith(notice) for text in remote["anomalies"])
    ask(MODEL)  # downloads it
    whole, _ = inspect("--json")
    assert (Path(whole["folder"]).is_dir(), whole["headers_only"]) == (True, False)
    assert {k: v for k, v in remote.items() if k not in LOOKED_AT} == {
        k: v for k, v in whole.items() if k not in LOOKED_AT
    }
    left = [text for text in remote["anomalies"] if not text.startswith(notice)]
    assert left == whole["anomalies"]
    hub.requests.clear()
    assert inspect("--json", env=OFFLINE)[0] == whole
    assert hub.requests == []


def test_the_copy_with_weights_stays_in_use(
    hub: Hub, inspect: Callable[..., tuple[Any, str]], ask: Ask
) -> None:
    hub.files.clear()
    hub.files.update(contents(demo.model_path()))
    complete = ask(MODEL).folder
    hub.files["model.safetensors"] += b" " * 8
    text, stderr = inspect()
    assert stderr.startswith(f"error: {MODEL}/model.safetensors: corrupt safetensors file: the ten")
    assert "but 8 more bytes follow" in stderr
    assert text == ""
    assert ask(MODEL, env=OFFLINE).folder == complete


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_long_header(
    knows_ranges: bool, hub: Hub, inspect: Callable[..., tuple[Any, str]]
) -> None:
    hub.knows_ranges = knows_ranges
    hub.files.clear()
    hub.files.update(contents(demo.model_path()))
    data = hub.files["model.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * (1 << 18)
    hub.files["model.safetensors"] = len(header).to_bytes(8, "little") + header + data[8 + length :]
    text, stderr = inspect()
    assert stderr == ""
    assert text.startswith(f"{MODEL}\nLlama, ")
    assert "it is not downloaded: scales were not looked at" in text
    if knows_ranges:
        assert hub.ranges == ["bytes=0-99999", f"bytes=0-{len(header) + 7}"]


def test_inspections_that_are_refused(
    hub: Hub, inspect: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    hub.needs_token = True
    assert f"no such folder here and no such model on {hub.endpoint}" in inspect()[1]
    assert f"there is no copy in {tmp_path / 'home' / 'hub'}, and" in inspect(env=OFFLINE)[1]
    hub.needs_token = False
    assert "'gone': " in inspect("--revision", "gone")[1]
    _, stderr = inspect()  # of files that are no checkpoint
    assert stderr.startswith(f"error: {MODEL}")
    assert str(tmp_path) not in stderr
    assert stderr.count("\n") == 1


# From the outside.


def test_llm_takes_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    hub.files.update(contents(demo.model_path()))
    script = f"""
        from qllama import LLM
        llm = LLM({MODEL!r}, revision="main", tokenizer={MODEL!r}, max_model_len=16)
        print(llm.tokenizer.encode("It is a truth"), llm.logits([1, 2]).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", f"if True:{script}"],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with LLM(max_model_len=16) as llm:
        assert done.stdout == f"{llm.tokenizer.encode('It is a truth')} (2, 4096)\n"
    assert "model.safetensors" in hub.downloaded()


def test_the_demo_model_has_no_revisions() -> None:
    with pytest.raises(ValueError, match="revision='main' belongs to a Hub id"):
        LLM(revision="main")
