"""What every test stands on: the JAX setting and the checkpoints to test against."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import bench_scripts
import pytest

TESTS = Path(__file__).parent
FIXTURES = Path(os.environ.get("QLLAMA_FIXTURES") or TESTS / "fixtures").resolve()
TINY_LLAMA3 = FIXTURES / "tiny-llama3"


def pytest_configure(config: pytest.Config) -> None:
    """Set JAX up before any test module imports it."""
    if not FIXTURES.is_dir():
        raise pytest.UsageError(f"QLLAMA_FIXTURES={FIXTURES} is not a folder")
    # In the environment, so that processes started by tests have it too.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Each simulated warpgroup holds a thread of XLA's pool while it waits at a barrier. The pool
    # has one for each core, too few on a small machine: they would wait for one another for ever.
    os.environ.setdefault("NPROC", "16")
    selection = config.option.markexpr
    if "gpu" not in selection or "not gpu" in selection:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    # For tests of sharding. Programs on one device run at most a fifth slower for it.
    jax.config.update("jax_num_cpu_devices", 8)


def tiny_llama3_kinds() -> list[str]:
    """The forms of the tiny model that are here, by folder name."""
    return sorted(config.parent.name for config in TINY_LLAMA3.glob("*/config.json"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `tiny_llama3_kind` runs once for every kind that is here."""
    if "tiny_llama3_kind" in metafunc.fixturenames:
        metafunc.parametrize("tiny_llama3_kind", tiny_llama3_kinds(), scope="session")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """`$QLLAMA_FIXTURES`, or the small committed set."""
    return FIXTURES


@pytest.fixture(scope="session")
def tiny_llama3() -> Callable[[str], Path]:
    """Folder of one kind of the tiny model; skips the test where the set lacks it."""

    def folder(kind: str) -> Path:
        if kind not in tiny_llama3_kinds():
            pytest.skip(f"no {kind} in {TINY_LLAMA3}; QLLAMA_FIXTURES names a larger set")
        return TINY_LLAMA3 / kind

    return folder


@pytest.fixture(scope="session")
def tiny_llama3_dir(tiny_llama3_kind: str) -> Path:
    """Folder of each kind of the tiny model in turn."""
    return TINY_LLAMA3 / tiny_llama3_kind


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint that splits over four devices, of a scheme of make_checkpoint: 8 heads
    over 4 key-value heads, one layer, and a vocabulary that 4 does not divide."""
    folder = tmp_path_factory.mktemp("wide")
    make = bench_scripts.load("make_checkpoint").random_checkpoint
    shape = {
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 998,
    }

    @functools.cache
    def checkpoint(scheme: str) -> Path:
        return make(folder / scheme, shape=shape, scheme=scheme)

    return checkpoint


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under CI, a run in which everything was skipped is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes: what started them counts
        return
    if os.environ.get("CI") and session.exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
