"""What is installed: the three packages, whole, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "qllama": "qllama",
    "kernels/qllama_kernels": "qllama_kernels",
    "convert/qllama_convert": "qllama_convert",
}
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "fixtures", "results"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program away from the checkout and return its stdout; its stderr is the failure."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command[:4]}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in the checkout is not what is asked about."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(sys.executable, *build, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    pip = ("-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", folder)
    run(sys.executable, *pip, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in PACKAGES.values()} <= expected
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_installed_packages_are_imported_from_where_they_are(site: Path) -> None:
    script = "import qllama as q, qllama_convert as c; print(q.__file__, c.__file__, sep='\\n')"
    files = run(sys.executable, "-c", script, cwd=site.parent, PYTHONPATH=str(site)).splitlines()
    assert [Path(file).parent.parent for file in files] == [site, site]


@pytest.mark.skipif(not (ROOT / "qllama/cli").exists(), reason="no command line yet")
def test_the_installed_command_explains_itself(site: Path) -> None:
    text = run(site / "bin" / "qllama", "--help", cwd=site.parent, PYTHONPATH=str(site))
    assert "generate" in text
    assert "quantize" in text


@pytest.mark.skipif(not (ROOT / "qllama/demo/model").exists(), reason="no embedded model yet")
def test_the_installed_package_generates_from_its_embedded_model(site: Path) -> None:
    script = """if True:
        from qllama import LLM, SamplingParams
        llm = LLM()
        (output,) = llm.generate(["It is a truth"], SamplingParams(temperature=0, max_tokens=8))
        print(len(output.outputs[0].token_ids), repr(output.outputs[0].text))
    """
    printed = run(sys.executable, "-c", script, cwd=site.parent, PYTHONPATH=str(site))
    count, text = printed.split(maxsplit=1)
    assert int(count) == 8
    assert any(letter.isalpha() for letter in text)
