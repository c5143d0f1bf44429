"""Checkpoint folders as written: read by others, whole or not there."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import safetensors.numpy
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.names import split_name
from qllama_convert.writer import check_output_folder, exported_config, write_checkpoint

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 500000.0}
TENSORS = {
    f"model.layers.{layer}.{name}": np.full(shape, layer, dtype)
    for layer in range(3)
    for name, shape, dtype in [
        ("up_proj.weight", (8, 5), np.int8),
        ("up_proj.weight_scale", (8, 1), ml_dtypes.bfloat16),
        ("up_proj.weight_shape", (2,), np.int64),
        ("up_proj.input_scale", (), np.float32),
    ]
}
MODULE_BYTES = 40 + 16 + 16 + 4


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in contents(folder).items() if ".safetensors" in n}


# What is written.


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 300_000])
def test_a_checkpoint_survives(tiny_llama3_dir: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    with open_checkpoint(tiny_llama3_dir) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        out = write_checkpoint(
            tmp_path / "out", config=source.config, tensors=tensors, max_shard_bytes=max_shard_bytes
        )
        with open_checkpoint(out) as written:
            assert written.warnings == []
            assert list(written.tensors) == list(source.tensors)
            for name, expected in tensors.items():
                found = written.read(name)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.tobytes() == expected.tobytes()
            quantization = source.config.get("quantization_config")
            assert written.config.get("quantization_config") == quantization


def test_one_file(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "a" / "b", config=CONFIG, tensors=TENSORS)
    assert out == tmp_path / "a" / "b"
    assert sorted(contents(out)) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == TENSORS.keys()
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert out.stat().st_mode == ordinary.stat().st_mode


def test_shards_and_index(tmp_path: Path) -> None:
    out = write_checkpoint(
        tmp_path / "out", config=CONFIG, tensors=TENSORS, max_shard_bytes=2 * MODULE_BYTES
    )
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert sorted(weights(out)) == [first, second, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": 3 * MODULE_BYTES, "total_parameters": 3 * 51}
    for name, file in index["weight_map"].items():
        assert file == (second if name.startswith("model.layers.2.") else first)
    for file in (first, second):
        listed = {name for name, f in index["weight_map"].items() if f == file}
        assert {name for name, _ in safetensors.deserialize((out / file).read_bytes())} == listed


def test_a_module_is_never_split(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", config=CONFIG, tensors=TENSORS, max_shard_bytes=1)
    weight_map = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(split_name(name)[0], set()).add(file)
    assert [len(f) for f in files.values()] == [1, 1, 1]
    assert len(set(weight_map.values())) == 3


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    backwards = dict(reversed(TENSORS.items()))
    config = dict(reversed(CONFIG.items()))
    one = write_checkpoint(tmp_path / "1", config=CONFIG, tensors=TENSORS, max_shard_bytes=100)
    two = write_checkpoint(tmp_path / "2", config=config, tensors=backwards, max_shard_bytes=100)
    three = write_checkpoint(
        tmp_path / "3", config=CONFIG, tensors=iter(TENSORS.items()), max_shard_bytes=100
    )
    assert contents(one) == contents(two) == contents(three)


def test_two_modules_in_memory_at_most(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer in range(20):
            yield f"{layer}.weight", np.full(1 << 20, layer, np.float32)

    write_checkpoint(tmp_path / "warm", config=CONFIG, tensors=TENSORS)
    tracemalloc.start()
    try:
        out = write_checkpoint(tmp_path / "out", config=CONFIG, tensors=tensors())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6  # all tensors are 84 MB, two are 8 MB, the copying buffer is 17 MB
    assert open_checkpoint(out).read("19.weight").tolist()[-1] == 19


def test_other_files(tmp_path: Path) -> None:
    tokenizer = tmp_path / "blob"
    tokenizer.write_bytes(b"\r\n\xff")
    (tmp_path / "link").symlink_to("blob")
    files: dict[str, bytes | Path] = {
        "tokenizer.json": tmp_path / "link",
        "recipe.yaml": b"a: 1\n",
    }
    out = write_checkpoint(tmp_path / "out", config=CONFIG, tensors=TENSORS, files=files)
    assert (out / "tokenizer.json").read_bytes() == b"\r\n\xff"
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "recipe.yaml").read_bytes() == b"a: 1\n"


# config.json


def test_config_in_both_dialects() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    new = {"dtype": "float16", "rope_parameters": {**scaling, "rope_theta": 5e5}, "x": None}
    old = {"torch_dtype": "float16", "rope_scaling": scaling, "rope_theta": 5e5, "x": None}
    expected = old | {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    assert exported_config(new) == exported_config(old) == expected
    plain = exported_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert plain == {
        "rope_theta": 1e4,
        "rope_scaling": None,
        "architectures": ["LlamaForCausalLM"],
    }
    assert exported_config({"transformers_version": "4.44.0"})["transformers_version"] == "4.44.0"


@pytest.mark.filterwarnings("ignore")  # what transformers warns of is not under test
def test_transformers_reads_the_same_config(tiny_llama3_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = json.loads((tiny_llama3_dir / "config.json").read_bytes())
    out = write_checkpoint(tmp_path / "out", config=config, tensors=TENSORS)
    written = AutoConfig.from_pretrained(out).to_dict()
    source = AutoConfig.from_pretrained(tiny_llama3_dir).to_dict()
    assert written["rope_parameters"]["rope_type"] == "llama3"
    for key in ("torch_dtype", "_name_or_path"):
        written.pop(key, None)
        source.pop(key, None)
    assert written == source


def test_config_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checkpoint(tmp_path / "out", config={"a": float("nan")}, tensors=TENSORS)
    assert list(tmp_path.iterdir()) == []


# Whole or not there.


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint that is in the way."""
    return write_checkpoint(
        tmp_path / "out", config=CONFIG, tensors={"old.weight": np.zeros(1, np.int8)}
    )


def test_an_existing_folder_is_refused(old: Path) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match="exists; choose another folder, or pass overwrite=True"):
        write_checkpoint(old, config=CONFIG, tensors=TENSORS)
    assert contents(old) == before


def test_overwriting(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    view = open_checkpoint(old).read("old.weight")
    out = write_checkpoint(tmp_path / "link", config=CONFIG, tensors=TENSORS, overwrite=True)
    assert out == old
    assert open_checkpoint(old).tensors.keys() == TENSORS.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]
    assert view.tolist() == [0]


def test_overwriting_with_its_own_tensors(old: Path) -> None:
    checkpoint = open_checkpoint(old)
    tensors = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
    before = contents(old)
    write_checkpoint(old, config=checkpoint.config, tensors=tensors, overwrite=True)
    assert contents(old) == before


def test_only_checkpoints_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt", "/"):
        with pytest.raises(ValueError, match="is not a checkpoint folder"):
            check_output_folder(path, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert check_output_folder(tmp_path / "empty", overwrite=True) == tmp_path / "empty"
    with pytest.raises(ValueError, match="exists"):
        check_output_folder(tmp_path / "empty")


def test_a_folder_that_appears_meanwhile(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        write_checkpoint(tmp_path / "out", config={"first": True}, tensors=TENSORS)
        yield from TENSORS.items()

    with pytest.raises(OSError, match="not empty; nothing there was changed"):
        write_checkpoint(tmp_path / "out", config=CONFIG, tensors=tensors())
    assert open_checkpoint(tmp_path / "out").config["first"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_tensors_that_fail_to_come(error: type[BaseException], old: Path, tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "a.weight", np.zeros(10)
        raise error("from the source")

    before = contents(old)
    with pytest.raises(error, match="from the source"):
        write_checkpoint(old, config=CONFIG, tensors=tensors(), overwrite=True, max_shard_bytes=1)
    with pytest.raises(error, match="from the source"):
        write_checkpoint(tmp_path / "new", config=CONFIG, tensors=tensors())
    assert contents(old) == before
    assert list(tmp_path.iterdir()) == [old]


def test_the_last_rename_fails(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    before = contents(old)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error; nothing there was changed"):
        write_checkpoint(old, config=CONFIG, tensors=TENSORS, overwrite=True)
    assert contents(old) == before
    assert list(tmp_path.iterdir()) == [old]


def test_a_full_disk(old: Path, tmp_path: Path) -> None:
    # A limit on file sizes stops the writing where a full disk would, in the middle of a tensor.
    script = """
        import resource, sys
        import numpy as np
        from qllama_convert.writer import write_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        tensors = {f"{i}.weight": np.zeros(30_000, np.int8) for i in range(4)}
        try:
            write_checkpoint(sys.argv[1], config={}, tensors=tensors, overwrite=True)
        except OSError as error:
            print(error, end="")
    """
    before = contents(old)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(old)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert f"cannot write {old}: File too large; nothing there was changed" in done.stdout
    assert contents(old) == before
    assert list(tmp_path.iterdir()) == [old]


STOPS = """
    import os, pathlib, signal, sys
    import numpy as np
    from qllama_convert.writer import write_checkpoint

    def tensors():
        yield "0.weight", np.zeros(10_000, np.int8)
        if sys.argv[2] == "writing":
            stop()

    def stop():
        print("stopped", flush=True)
        signal.pause()

    if sys.argv[2] == "renaming":
        rename = pathlib.Path.rename

        def renamed(path, target):
            result = rename(path, target)
            if target.suffix == ".replaced":
                stop()
            return result

        pathlib.Path.rename = renamed
    write_checkpoint(sys.argv[1], config={}, tensors=tensors(), overwrite=True)
"""


@contextlib.contextmanager
def stopped(out: Path, when: str) -> Iterator[subprocess.Popen[str]]:
    """A process that stands still while it writes a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STOPS), str(out), when],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "stopped\n"
            yield process
        finally:
            process.kill()


def beside(out: Path) -> list[str]:
    return sorted(path.suffix for path in out.parent.iterdir() if path.name.startswith(".out."))


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial", ".out.12345678.txt", ".other.12345678.partial"):
        (tmp_path / name).mkdir()  # not ours
    others = sorted(tmp_path.iterdir())
    with stopped(out, "writing") as process:
        write_checkpoint(out, config=CONFIG, tensors=TENSORS)
        (left,) = tmp_path.glob(".out.????????.partial")  # not that of a living one
        assert (left / "config.json").exists()
        process.kill()
    write_checkpoint(out, config=CONFIG, tensors=TENSORS, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [*others, out]


def test_killed_between_the_renames(old: Path) -> None:
    """The old folder is kept until a new one is in place."""
    before = contents(old)
    with stopped(old, "renaming") as process:
        assert beside(old) == [".partial", ".replaced"]
        write_checkpoint(old, config=CONFIG, tensors=TENSORS)
        assert beside(old) == [".partial", ".replaced"]
        shutil.rmtree(old)
        process.kill()
    with pytest.raises(ValueError, match="no tensors"):
        write_checkpoint(old, config=CONFIG, tensors=[])
    (left,) = old.parent.iterdir()
    assert left.suffix == ".replaced"
    assert contents(left) == before
    write_checkpoint(old, config=CONFIG, tensors=TENSORS)
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_file_systems_without_locks(
    number: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing goes on, and what might be a living writer's stays."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = old.with_name(".out.12345678.partial")
    left.mkdir()
    write_checkpoint(old, config=CONFIG, tensors=TENSORS, overwrite=True)
    assert open_checkpoint(old).tensors.keys() == TENSORS.keys()
    assert sorted(old.parent.iterdir()) == [left, old]


def test_a_folder_taken_for_a_leftover_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer looks just then; the folder is made anew under another name."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (made,) = tmp_path.iterdir()
            made.rmdir()
        if len(calls) == 2:
            raise BlockingIOError
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    out = write_checkpoint(tmp_path / "out", config=CONFIG, tensors=TENSORS)
    assert open_checkpoint(out).tensors.keys() == TENSORS.keys()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"cannot write .*Not a directory"):
        write_checkpoint(tmp_path / "file" / "a" / "out", config=CONFIG, tensors=TENSORS)
    files = {"tokenizer.json": tmp_path / "gone"}
    with pytest.raises(FileNotFoundError, match=r"cannot write .*No such file"):
        write_checkpoint(tmp_path / "out", config=CONFIG, tensors=TENSORS, files=files)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "../a", "a\\b", "/a", "config.json", "x.safetensors"]
)
def test_file_names_that_do_not_belong(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a plain file name, or one written anyway"):
        write_checkpoint(tmp_path / "out", config=CONFIG, tensors=TENSORS, files={name: b""})


def test_tensors_that_cannot_be_written(tmp_path: Path) -> None:
    one = np.zeros(1, np.float32)
    cases = [
        ([], "no tensors"),
        ([("a.weight", one), ("b.weight", one), ("a.bias", one)], "tensors of a come apart"),
        ([("a.weight", one), ("a.weight", one)], "a.weight is taken"),
        ([("a.weight", one.astype(ml_dtypes.int4))], "has dtype int4"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            write_checkpoint(tmp_path / "out", config=CONFIG, tensors=tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.oracle
def test_transformers_runs_what_is_written(
    tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_llama3("bf16_original"))
    tensors = {name: source.read(name) for name in source.tensors}
    out = write_checkpoint(
        tmp_path / "out", config=source.config, tensors=tensors, max_shard_bytes=1_000_000
    )
    assert len(weights(out)) > 2
    golden = safetensors.numpy.load_file(source.folder / "expected.safetensors")
    script = """
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        with torch.no_grad():
            out["logits"] = model(torch.from_numpy(input_ids)[None]).logits[0].numpy()
    """
    found = oracle.run(script, folder=np.array(str(out)), input_ids=golden["input_ids_1"])
    np.testing.assert_allclose(found["logits"], golden["logits_1"], atol=1e-3)
