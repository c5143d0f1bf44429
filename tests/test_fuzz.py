"""Spoiled checkpoints: whatever is in a folder, `LLM` gives finite logits or a CheckpointError.

Hypothesis spoils a tiny checkpoint of each format, seldom the same way twice. The usual run is the
same every time; `make fuzz` draws new cases, as many as QLLAMA_FUZZ_EXAMPLES says.
"""

import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, Files, Verdict, change_tokenizer
from qllama_convert.checkpoint import CheckpointWarning
from small_checkpoints import KINDS, VOCABULARY, make

from qllama import LLM, CheckpointError

IDS = [1, 5, 9, 20, 33, 61]
PATIENCE = 60  # seconds after which a case counts as a hang
ROOM = 4 << 30  # bytes of address space that it may use, most of it JAX's
EXAMPLES = os.environ.get("QLLAMA_FUZZ_EXAMPLES")  # of every kind of checkpoint

fuzz = settings(
    max_examples=int(EXAMPLES or 20),
    derandomize=EXAMPLES is None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

Base = tuple[Files, np.ndarray]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The files of a kind of checkpoint, and its logits."""
    made: dict[str, Base] = {}

    def base(kind: str) -> Base:
        if kind not in made:
            folder = make(kind, tmp_path_factory.mktemp(kind) / "checkpoint")
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            made[kind] = files, LLM(folder).logits(IDS)
        return made[kind]

    return base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoiled")


def write(files: Files, folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def patience() -> Iterator[None]:
    """Fail where something takes minutes, or gigabytes, instead of a fraction of a second."""
    hung = False

    def give_up(number: int, frame: FrameType | None) -> None:
        nonlocal hung
        hung = True
        raise TimeoutError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert not hung, f"no answer after {PATIENCE} seconds"


def answer(folder: Path, use: Callable[[LLM], None] = lambda llm: None) -> np.ndarray | str:
    """The logits of a checkpoint, or why it was refused; any other exception passes through."""
    with patience(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        warnings.filterwarnings("ignore", "max_model_len is lowered")
        try:
            llm = LLM(folder)
        except CheckpointError as error:
            return str(error)
        with llm:
            assert llm.config.vocab_size == VOCABULARY
            use(llm)
            return llm.logits(IDS[: llm.max_model_len])


def check(found: np.ndarray | str, verdict: Verdict, expected: np.ndarray) -> None:
    note(f"expected: {verdict.value}; found: {found}")
    if isinstance(found, str):
        assert verdict is not Verdict.SAME
        assert 0 < len(found) < 5000
        return
    assert verdict is not Verdict.REFUSED
    assert found.shape == (len(found), VOCABULARY)
    assert np.isfinite(found).all()
    if verdict is Verdict.SAME:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_checkpoint_is_refused_or_read(kind: str, bases: Any, folder: Path) -> None:
    pristine, expected = bases(kind)

    @fuzz
    @given(st.data())
    def spoil(data: st.DataObject) -> None:
        files = dict(pristine)
        mutate = data.draw(st.sampled_from(MUTATIONS))
        verdict = mutate(data.draw, files)
        note(mutate.__name__)
        check(answer(write(files, folder)), verdict, expected)

    spoil()


def test_a_spoiled_tokenizer_is_refused_or_used(bases: Any, folder: Path) -> None:
    pristine, expected = bases("tokenizer")

    donor = LLM(write(pristine, folder))

    def use(llm: LLM) -> None:
        """Read a prompt and write an answer, as generation_config.json says."""
        llm._engines = donor._engines  # the model is the same, and its programs are compiled
        if llm.tokenizer is not None:
            (output,) = llm.generate("the cat", None)
            assert output.outputs[0].token_ids
            assert output.outputs[0].finish_reason != "error"

    @fuzz
    @given(st.data())
    def spoil(data: st.DataObject) -> None:
        files = dict(pristine)
        verdict = change_tokenizer(data.draw, files)
        check(answer(write(files, folder), use), verdict, expected)

    spoil()


def test_formats_agree_about_the_same_weights(bases: Any) -> None:
    """The ground everything above stands on: three ways to store the same codes."""
    awq, packed, gptq = (bases(kind)[1] for kind in ("awq", "packed_asym", "gptq_v2"))
    np.testing.assert_array_equal(awq, packed)
    np.testing.assert_array_equal(gptq, packed)
    assert np.isfinite(packed).all()
    assert packed.std() > 0.1
