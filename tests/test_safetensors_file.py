"""The container against the safetensors library: what it writes is read, what it refuses too."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from qllama_convert import safetensors_file
from qllama_convert.safetensors_file import DTYPES, SafetensorsFile, write_safetensors

from qllama.errors import CheckpointError


def file_of(folder: Path, data: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return path


def container(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: object, start: object, stop: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random bytes as every dtype, in several shapes: scalar, empty, odd."""
    tensors = {}
    for code, dtype in DTYPES.items():
        for i, shape in enumerate([(), (3,), (0, 4), (2, 3, 5)]):
            raw = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8)
            if code == "BOOL":
                raw %= 2
            tensors[f"{code}.{i}"] = raw.reshape(-1).view(dtype).reshape(shape)
    return tensors


def library_refuses(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return True
    return False


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = random_tensors(np.random.default_rng(0))
    path = file_of(tmp_path, safetensors.numpy.save(tensors, {"format": "pt", "é": "ü"}))
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "é": "ü"}
    assert file.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        found = file.read(name)
        assert found.dtype == expected.dtype == DTYPES[file.tensors[name].dtype]
        assert found.shape == expected.shape == file.tensors[name].shape
        assert found.tobytes() == expected.tobytes()


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = random_tensors(np.random.default_rng(1))
    tensors["transposed"] = np.arange(6, dtype=np.int32).reshape(2, 3).T
    path = tmp_path / "x.safetensors"
    entries = write_safetensors(path, tensors.items(), {"format": "pt"})
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert DTYPES[read[name]["dtype"]] == expected.dtype
        assert tuple(read[name]["shape"]) == expected.shape
        assert bytes(read[name]["data"]) == expected.tobytes()
    file = SafetensorsFile(path)
    assert file.tensors == entries
    assert all(file.read(name).flags.aligned for name in tensors)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def read_by_the_library(path: Path) -> dict[str, bytes]:
    return {name: bytes(t["data"]) for name, t in safetensors.deserialize(path.read_bytes())}


def test_a_large_file_is_padded_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_move_data", None)
    tensors = {f"{i}": np.full(1 << 23, i, np.uint8) for i in range(5)}
    tensors |= {"odd": np.arange(3, dtype=np.int16), "a": np.ones(9, np.uint8)}
    path = tmp_path / "x.safetensors"
    entries = write_safetensors(path, tensors.items(), {})
    assert read_by_the_library(path) == {name: t.tobytes() for name, t in tensors.items()}
    # In order, but for what would bring later tensors out of line.
    assert sorted(entries, key=lambda name: entries[name].start) == [*"01234", "odd", "a"]
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert path.stat().st_size - size <= size / 100
    file = SafetensorsFile(path)
    assert all(file.read(name).flags.aligned for name in tensors)


@pytest.mark.parametrize("room", [64, 1 << 10, 1 << 13, 1 << 20])
def test_data_moves_to_fit_the_header(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up or down, overlapping itself or not, in several pieces."""
    monkeypatch.setattr(safetensors_file, "_HEADER_ROOM", room)
    monkeypatch.setattr(safetensors_file, "_COPY_BYTES", 1000)
    monkeypatch.setattr(safetensors_file, "_ODD_BYTES", 100)
    rng = np.random.default_rng(2)
    tensors = {f"{i}": rng.integers(0, 256, 8 * i + i % 3, np.uint8) for i in range(60)}
    path = tmp_path / "x.safetensors"
    assert write_safetensors(path, tensors.items(), {}) == SafetensorsFile(path).tensors
    assert read_by_the_library(path) == {name: t.tobytes() for name, t in tensors.items()}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + sum(t.nbytes for t in tensors.values())
    assert not path.read_bytes()[8 : 8 + header].endswith(b" " * 8)
    assert list(tmp_path.iterdir()) == [path]


def test_values_of_the_narrow_floats(tmp_path: Path) -> None:
    # 1.0, 0.1, 448 in E4M3 are 38 1d 7e; the same byte is half as much in E4M3FNUZ.
    header = {
        "fn": entry("F8_E4M3", [3], 0, 3),
        "fnuz": entry("F8_E4M3FNUZ", [1], 3, 4),
        "e8m0": entry("F8_E8M0", [1], 4, 5),
        "bf16": entry("BF16", [1], 5, 7),  # at an odd byte: the format allows that
    }
    data = bytes.fromhex("381d7e 38 80") + np.float32(-1.5).tobytes()[2:]
    file = SafetensorsFile(file_of(tmp_path, container(header, data)))
    assert file.read("fn").astype(np.float32).tolist() == [1.0, 0.1015625, 448.0]
    assert file.read("fnuz").astype(np.float32).tolist() == [0.5]
    assert file.read("e8m0").astype(np.float32).tolist() == [2.0]
    assert file.read("bf16").astype(np.float32).tolist() == [-1.5]
    assert file.read("bf16").dtype == ml_dtypes.bfloat16


def test_views_are_read_only_and_outlive_the_file(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    file = SafetensorsFile(file_of(tmp_path, safetensors.numpy.save({"a": values})))
    view = file.read("a")
    assert view.base is not None
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
    file.close()
    file.close()
    np.testing.assert_array_equal(view, values)
    with pytest.raises(ValueError, match="closed"):
        file.read("a")


def test_opening_and_reading_copy_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = 1 << 40  # a sparse file far larger than memory
    with open(path, "wb") as file:
        file.write(container({"a": entry("U8", [size], 0, size)}))
        file.truncate(file.tell() + size)
    assert SafetensorsFile(path).read("a")[-3:].tolist() == [0, 0, 0]


def test_dtypes_below_a_byte_are_known_but_not_read(tmp_path: Path) -> None:
    header = {"a": entry("F4", [4], 0, 2), "b": entry("F6_E2M3", [4], 2, 5)}
    data = container(header, b"12345")
    assert not library_refuses(data)
    file = SafetensorsFile(file_of(tmp_path, data))
    assert file.tensors["b"].dtype == "F6_E2M3"
    with pytest.raises(CheckpointError, match=r"tensor a has dtype F4, which cannot be read"):
        file.read("a")


U8 = entry("U8", [1], 0, 1)
REFUSED_BY_BOTH = {
    "short": (b"\2\0\0", "header of 2 bytes"),
    "long header": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "header past the end": (container({"a": U8}, b"x")[:20], "download broke"),
    "not JSON": (container(b"{oops}"), "header is not valid JSON"),
    "not UTF-8": (container(b'{"\xff": 1}'), "header is not UTF-8"),
    "not an object": (container(b"[]"), "does not begin with"),
    "NUL after header": (container(b"{}\0"), "header is not valid JSON"),
    "lone surrogate": (container(b'{"\\ud800": {}}'), "not valid Unicode"),
    "deep": (container(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "metadata array": (container({"__metadata__": []}), "__metadata__"),
    "metadata number": (container({"__metadata__": {"format": 1}}), "__metadata__"),
    "no dtype": (container({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "tensor a must"),
    "not an entry": (container({"a": 1}), "tensor a must"),
    "unknown dtype": (container({"a": entry("U7", [1], 0, 1)}, b"x"), "unknown dtype 'U7'"),
    "dtype number": (container({"a": {**U8, "dtype": 8}}, b"x"), "unknown dtype 8"),
    "negative size": (container({"a": entry("U8", [-1, -1], 0, 1)}, b"x"), r"shape \[-1, -1\]"),
    "float size": (container({"a": entry("U8", [1.0], 0, 1)}, b"x"), r"shape \[1.0\]"),
    "boolean size": (container({"a": entry("U8", [True], 0, 1)}, b"x"), r"shape \[True\]"),
    "NaN size": (container({"a": entry("U8", [float("nan")], 0, 1)}, b"x"), r"shape \[nan\]"),
    "shape not a list": (container({"a": entry("U8", 1, 0, 1)}, b"x"), "shape 1"),
    "huge sizes": (container({"a": entry("U8", [2**62, 2**62], 0, 1)}, b"x"), "expected a list"),
    "large sizes": (container({"a": entry("U8", [2**50], 0, 1)}, b"x"), "takes"),
    "absurd size": (container({"a": entry("U8", [10**4000], 0, 1)}, b"x"), "expected a list"),
    "endless size": (container({"a": entry("U8", [1], 0, 1)}).replace(b"1]", b"1" * 5000), "head"),
    "one offset": (container({"a": {**U8, "data_offsets": [1]}}, b"x"), "expected .start, stop"),
    "backwards": (container({"a": entry("U8", [1], 1, 0)}, b"x"), "expected .start, stop"),
    "size differs": (container({"a": entry("F32", [1], 0, 1)}, b"x"), "takes 32 bits"),
    "part of a byte": (container({"a": entry("F4", [3], 0, 1)}, b"x"), "takes 12 bits"),
    "overlap": (container({"a": U8, "b": entry("U8", [1], 0, 1)}, b"x"), "overlaps"),
    "gap": (container({"a": U8, "b": entry("U8", [1], 2, 3)}, b"xyz"), "leaves a gap"),
    "gap at the start": (container({"a": entry("U8", [1], 1, 2)}, b"xy"), "leaves a gap"),
    "cut short": (container({"a": entry("U8", [9], 0, 9)}, b"x"), "cut short"),
    "more data": (container({"a": U8}, b"xyz"), "2 more bytes follow"),
}


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_malformed_file(case: str, tmp_path: Path) -> None:
    data, message = REFUSED_BY_BOTH[case]
    assert library_refuses(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(file_of(tmp_path, data))
    assert str(caught.value).startswith(str(tmp_path / "x.safetensors"))
    assert len(str(caught.value)) < 1000


REFUSED_HERE = {
    "repeated tensor": (
        container(b'{"a":%b,"a":%b}' % ((json.dumps(U8).encode(),) * 2), b"x"),
        "a",
    ),
    "unknown key": (container({"a": {**U8, "offset": 0}}, b"x"), "no more"),
    "empty but huge": (container({"a": entry("F32", [0, 2**62], 0, 0)}), "expected a list"),
    "65 dimensions": (container({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "expected a list"),
}


@pytest.mark.parametrize("case", REFUSED_HERE)
def test_stricter_than_the_library(case: str, tmp_path: Path) -> None:
    data, message = REFUSED_HERE[case]
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(file_of(tmp_path, data))


@pytest.mark.parametrize("header", [{}, {"__metadata__": None}])
def test_a_file_without_tensors(header: dict, tmp_path: Path) -> None:
    assert not library_refuses(container(header))
    assert SafetensorsFile(file_of(tmp_path, container(header))).tensors == {}


def test_empty_tensor_of_large_dimensions(tmp_path: Path) -> None:
    data = container({"a": entry("F32", [0, 2**40], 0, 0)})
    assert SafetensorsFile(file_of(tmp_path, data)).read("a").shape == (0, 2**40)


def test_file_that_was_not_downloaded(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        SafetensorsFile(file_of(tmp_path, pointer))
    with pytest.raises(CheckpointError, match="is empty"):
        SafetensorsFile(file_of(tmp_path, b""))
    with pytest.raises(CheckpointError, match="does not exist"):
        SafetensorsFile(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path)


VALID = container(
    {"b": entry("F16", [2, 2], 1, 9), "a": U8, "__metadata__": {"format": "pt"}}, b"012345678"
)


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, len(VALID) - 1),
    inserted=st.lists(st.sampled_from(b' "{}[]:,0129abFUz\\\0\xff'), max_size=3),
    removed=st.integers(0, 12),
    fix_length=st.booleans(),
)
def test_damaged_files_never_pass_nor_crash(
    position: int, inserted: list[int], removed: int, fix_length: bool
) -> None:
    data = VALID[:position] + bytes(inserted) + VALID[position + removed :]
    if fix_length and position > 8:
        data = container(data[8 : data.rindex(b"}") + 1] if b"}" in data else b"", data[-9:])
    with tempfile.TemporaryDirectory() as folder:
        path = file_of(Path(folder), data)
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            return
    assert not library_refuses(data)
    for name, tensor in safetensors.deserialize(data):
        assert file.read(name).tobytes() == bytes(tensor["data"])


def test_writing_refuses_what_cannot_be_read_back(tmp_path: Path) -> None:
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="name a is taken"):
        write_safetensors(tmp_path / "1", [("a", one), ("a", one)], {})
    with pytest.raises(ValueError, match="__metadata__ is taken"):
        write_safetensors(tmp_path / "2", [("__metadata__", one)], {})
    with pytest.raises(ValueError, match="int4"):
        write_safetensors(tmp_path / "3", [("a", one.astype(ml_dtypes.int4))], {})
