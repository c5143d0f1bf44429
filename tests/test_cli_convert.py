"""The commands that write and check checkpoints, and the scripts beside the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_checkpoints
from qllama_convert.read_back import read_fingerprints

import qllama
from qllama.cli import VERBS, main

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    folder = small_checkpoints.make("packed", tmp_path / "in")
    for name, content in small_checkpoints._tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


def test_convert_and_verify(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(packed), str(out), "--to", "gptq"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == [
        f"{out}: gptq, W4A16 (7 Linears)",
        "every weight, scale and zero point is that of the source, read back and compared",
    ]
    assert printed.err == ""
    assert read_fingerprints(out) == read_fingerprints(packed)
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: good\nnote: ")

    assert main(["convert", str(packed), str(out)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main(["convert", str(packed), str(out), "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["to"], report["lossless"], report["rounded"]) == ("compressed-tensors", True, [])
    assert main(["verify", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["problems"], report["comparison"]) == (True, [], None)


def test_a_loss_must_be_allowed(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(packed), str(out), "--to", "bf16"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "7 Linears are rounded" in error
    assert not out.exists()
    assert main([*command, "--allow-lossy"]) == 0
    assert (
        capsys.readouterr().out == f"{out}: bf16, from W4A16 (7 Linears)\nrounded: 7 of 7 Linears\n"
    )


def test_what_is_wrong_is_listed(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packed / "tokenizer.json").unlink()
    config = json.loads((packed / "config.json").read_bytes())
    config["quantization_config"]["quantization_status"] = "frozen"
    (packed / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(packed)]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("\nwrong: ") == 2
    assert printed.err.count("\n") == 1
    assert main(["verify", str(packed), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
    for wrong in (["verify", str(tmp_path / "x")], ["verify", str(packed), "--against", "vllm"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_cannot_be_written(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["convert", str(packed), str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert "file/out: File exists; nothing there was changed" in error
    assert error.count("\n") == 1


def test_the_functions_are_public(packed: Path, tmp_path: Path) -> None:
    report = qllama.convert(packed, tmp_path / "out", "native")
    assert report.lossless
    assert qllama.verify(tmp_path / "out").ok


@pytest.mark.parametrize("name", ["import_hf", "export_hf", "quantize"])
def test_the_scripts_are_the_commands(name: str, packed: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "convert"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "convert" / f"{name}.py"), *arguments],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )

    if name == "quantize":
        done = run("--help")
        assert ("usage: qllama quantize" in done.stdout) == ("quantize" in VERBS)
        return
    done = run(str(packed), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.orbax").exists() == (name == "import_hf")
    assert read_fingerprints(tmp_path / "out") == read_fingerprints(packed)
