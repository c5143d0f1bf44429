"""Opening checkpoint folders: which files count, what is refused, what is warned of."""

import json
import os
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from qllama_convert.checkpoint import Checkpoint, CheckpointWarning, TensorInfo, open_checkpoint

from qllama.errors import CheckpointError

ONE = np.ones((2, 3), np.float32)
INDEX = "model.safetensors.index.json"


def save(path: Path, *names: str, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    safetensors.numpy.save_file(dict.fromkeys(names, ONE), path, metadata)


def save_index(folder: Path, weight_map: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder in which only the weights are wanting."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Two shards, `a` and `b` in the first, `c` in the second."""
    save(folder / "1.safetensors", "a", "b")
    save(folder / "2.safetensors", "c")
    save_index(folder, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    return message


def files_used(checkpoint: Checkpoint) -> set[str]:
    return {info.file for info in checkpoint.tensors.values()}


# What a good folder gives.


def test_every_tensor_equals_the_librarys(tiny_llama3_dir: Path) -> None:
    read = dict(safetensors.deserialize((tiny_llama3_dir / "model.safetensors").read_bytes()))
    with open_checkpoint(str(tiny_llama3_dir)) as checkpoint:
        assert checkpoint.folder == tiny_llama3_dir
        assert checkpoint.config == json.loads((tiny_llama3_dir / "config.json").read_text())
        assert checkpoint.generation_config["eos_token_id"] == checkpoint.config["eos_token_id"]
        assert list(checkpoint.tensors) == sorted(read) == checkpoint.unread()
        assert checkpoint.warnings == []
        for name, tensor in read.items():
            shape = tuple(tensor["shape"])
            info = TensorInfo(tensor["dtype"], shape, "model.safetensors")
            assert checkpoint.tensors[name] == info
            assert checkpoint.read(name).tobytes() == bytes(tensor["data"])
            assert checkpoint.read(name).shape == shape
        assert checkpoint.unread() == []


def test_sharded(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors == {
        "a": TensorInfo("F32", (2, 3), "1.safetensors"),
        "b": TensorInfo("F32", (2, 3), "1.safetensors"),
        "c": TensorInfo("F32", (2, 3), "2.safetensors"),
    }
    view = checkpoint.read("c")
    checkpoint.ignore("b")
    assert checkpoint.unread() == ["a"]
    checkpoint.close()
    np.testing.assert_array_equal(view, ONE)
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("a")


def test_reading_a_missing_tensor(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor d is missing"):
        open_checkpoint(sharded).read("d")


def test_a_warning_is_issued_once(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        checkpoint.warn("odd")
        checkpoint.warn("odd")
        checkpoint.warn("odder")
    assert [(str(w.message), w.category) for w in issued] == [
        ("odd", CheckpointWarning),
        ("odder", CheckpointWarning),
    ]
    assert checkpoint.warnings == ["odd", "odder"]


def test_opening_and_reading_take_no_memory(folder: Path) -> None:
    weight = np.zeros((4096, 4096), ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"a": weight}, folder / "model.safetensors")
    tracemalloc.start()
    try:
        view = open_checkpoint(folder).read("a")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert view.nbytes == 1 << 25
    assert peak < 1 << 20


def test_optional_json_files(folder: Path) -> None:
    save(folder / "model.safetensors", "a")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config == {}
    assert checkpoint.sidecar is None
    assert checkpoint.sidecar_name is None
    (folder / "quant_config.json").write_text('{"w_bit": 4}')
    assert open_checkpoint(folder).sidecar == {"w_bit": 4}
    (folder / "quantize_config.json").write_text('{"bits": 8}')
    assert open_checkpoint(folder).sidecar == {"bits": 8}
    assert open_checkpoint(folder).sidecar_name == "quantize_config.json"


# Which files hold the weights.


def test_model_safetensors_is_used_alone(folder: Path) -> None:
    for name in ("model", "expected", "consolidated.00", "._model"):
        save(folder / f"{name}.safetensors", name)
    save(folder / "original" / "model.safetensors", "original")
    assert list(open_checkpoint(folder).tensors) == ["model"]


def test_single_file_of_any_name(folder: Path) -> None:
    save(folder / "gptq_model-4bit-128g.safetensors", "a")
    save(folder / "consolidated.safetensors", "a")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert files_used(open_checkpoint(folder)) == {"gptq_model-4bit-128g.safetensors"}


def test_index_of_another_name(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "gptq_model-4bit-128g.safetensors.index.json")
    assert list(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_numbered_shards_without_index(folder: Path) -> None:
    save(folder / "model-00001-of-00002.safetensors", "a")
    message = refusal(folder)
    assert "model-00001-of-00002.safetensors" in message
    assert "Download what is missing" in message
    save(folder / "model-00002-of-00002.safetensors", "b")
    with pytest.warns(CheckpointWarning, match=r"index.json is missing; all 2 numbered shards"):
        checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == ["a", "b"]
    save(folder / "other-00002-of-00002.safetensors", "c")
    assert "cannot tell which weight files" in refusal(folder)


def test_several_models_in_one_folder(folder: Path) -> None:
    save(folder / "q4.safetensors", "a")
    save(folder / "q8.safetensors", "a")
    message = refusal(folder)
    assert "q4.safetensors, q8.safetensors" in message
    assert "expected model.safetensors" in message


def test_index_beside_model_safetensors(sharded: Path) -> None:
    save(sharded / "model.safetensors", "stale")
    with pytest.warns(CheckpointWarning, match=r"model.safetensors is ignored"):
        assert list(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_files_linked_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    # The Hugging Face cache: every file of a snapshot is a relative link to a blob outside it.
    blobs = tmp_path / "blobs"
    save(blobs / "4d7a", "a")
    (folder / "config.json").rename(blobs / "c0de")
    (folder / "config.json").symlink_to("../blobs/c0de")
    (folder / "model-00001-of-00001.safetensors").symlink_to("../blobs/4d7a")
    save_index(folder, {"a": "model-00001-of-00001.safetensors"})
    assert open_checkpoint(folder).read("a").tolist() == ONE.tolist()
    (blobs / "4d7a").unlink()
    assert "is a link to a file that is gone; download" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_other_containers(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"x")
    message = refusal(folder)
    assert f"unsupported weight files {name}; only safetensors are read" in message


def test_no_weights(folder: Path) -> None:
    assert "has no weight files; expected model.safetensors" in refusal(folder)
    save(folder / "consolidated.safetensors", "a")
    assert "the vendor's own layout" in refusal(folder)


# What is wrong with a folder, its config, its index.


def test_folder_that_is_none(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in refusal(tmp_path / "file")
    assert "has no config.json (found: file)" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="null byte"):
        open_checkpoint("a\0b")


JSON_ERRORS = {
    b"": "is empty",
    b"{": "is not valid JSON",
    b"[]": "holds a JSON array, expected an object",
    b"null": "holds a JSON null",
    b"1": "holds a JSON number",
    b'"x"': "holds a JSON string",
    b"\xff\xfe{\0}\0": "is not UTF-8 text",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "repeats the key 'c'",
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": "5000 digits",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "Git LFS pointer",
}


@pytest.mark.parametrize("content", JSON_ERRORS, ids=list(JSON_ERRORS.values()))
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "quantize_config.json", INDEX]
)
def test_bad_json(name: str, content: bytes, sharded: Path) -> None:
    (sharded / name).write_bytes(content)
    message = refusal(sharded)
    assert message.startswith(str(sharded / name))
    assert JSON_ERRORS[content] in message


@pytest.mark.parametrize("name", ["config.json", "quant_config.json", "1.safetensors"])
def test_not_a_regular_file(name: str, sharded: Path) -> None:
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).mkdir()
    assert f"{name}: is not a regular file" in refusal(sharded)
    (sharded / name).rmdir()
    os.mkfifo(sharded / name)  # opening it would wait for a writer
    assert f"{name}: is not a regular file" in refusal(sharded)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "1.safetensors"])
def test_unreadable_file(name: str, sharded: Path) -> None:
    (sharded / name).chmod(0)
    assert f"{name}: cannot be opened: Permission denied" in refusal(sharded)


def test_denied_permission_is_reported(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object, *args: object) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)
    assert "config.json: cannot be opened: Permission denied" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "1.safetensors"])
def test_index_without_weight_map(weight_map: object, sharded: Path) -> None:
    save_index(sharded, weight_map)
    assert "has no usable weight_map" in refusal(sharded)


@pytest.mark.parametrize(
    "file",
    [
        1,
        None,
        ["1.safetensors"],
        "",
        "..",
        "1.bin",
        "config.json",
        "../outside.safetensors",
        "link/outside.safetensors",
        "./1.safetensors",
        "link\\outside.safetensors",
        "C:outside.safetensors",
        "1.safetensors\0.safetensors",
    ],
)
def test_index_that_leaves_the_folder(file: object, sharded: Path, tmp_path: Path) -> None:
    save(tmp_path / "outside.safetensors", "a")
    (sharded / "link").symlink_to("..")
    save_index(sharded, {"a": file})
    assert f"puts tensor a in {file!r}" in refusal(sharded)
    save_index(sharded, {"a": str(tmp_path / "outside.safetensors")})
    assert "expected the plain name" in refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "2.safetensors").unlink()
    assert "1 of 2 weight files are missing: 2.safetensors" in refusal(sharded)


def test_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    save_index(sharded, {"a": "1.safetensors", "b": "2.safetensors", "d": "2.safetensors"})
    message = refusal(sharded)
    assert "2 tensors are not in the file where the index puts them" in message
    assert "b (2.safetensors), d (2.safetensors)" in message


def test_tensor_in_two_shards(sharded: Path) -> None:
    save(sharded / "2.safetensors", "a", "c")
    assert "1 tensors are in 2.safetensors and in 1.safetensors" in refusal(sharded)


def test_tensors_beyond_the_index(sharded: Path) -> None:
    save(sharded / "2.safetensors", "c", *"defghij")
    with pytest.warns(CheckpointWarning, match=r"7 tensors .* d, e, f, g, h and 2 more"):
        checkpoint = open_checkpoint(sharded)
    assert checkpoint.read("j").shape == (2, 3)
    assert "i" in checkpoint.unread()


def test_corrupt_shard(sharded: Path) -> None:
    shard = sharded / "2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: corrupt safetensors file: it is cut short" in refusal(sharded)


def test_format_in_the_metadata(folder: Path) -> None:
    save(folder / "model.safetensors", "a", metadata={"format": "pt", "other": "x"})
    assert open_checkpoint(folder).warnings == []
    save(folder / "model.safetensors", "a", metadata={"format": "mlx"})
    with pytest.warns(CheckpointWarning, match="written for 'mlx', not 'pt'"):
        assert len(open_checkpoint(folder).warnings) == 1
