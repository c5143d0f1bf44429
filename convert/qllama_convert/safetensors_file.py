"""The safetensors container: a strict reader over a mapped file, and a streaming writer.

Eight bytes of little-endian header length, a JSON header that gives each tensor's dtype, shape
and byte range, then the data, little-endian and row-major, without gaps. The library's own numpy
reader cannot return `F8_E4M3`, hence this one. Opening reads the header only.
"""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qllama.errors import CheckpointError
from qllama.threads import one_behind
from qllama_convert.files import open_file, parse_json

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
CODES: dict[np.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

# Packed below a byte, which no numpy dtype can view: their sizes are checked, values never read.
_SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | _SUB_BYTE_BITS

MAX_HEADER = 100_000_000
"""Bytes that the header of a file may have: the library's own limit."""

_MAX_RANK = 64

# Bytes before the data of a large file. A smaller file, or one with thousands of tensors, has its
# header fitted afterwards, at the price of copying the data.
_HEADER_ROOM = 1 << 18
_PADDED_FROM = _HEADER_ROOM << 7
_ODD_BYTES = 1 << 20  # of tensors that wait for the end of the file; beyond, they wait on the disk
_COPY_BYTES = 1 << 24


def data_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes, given the code of its dtype."""
    return math.prod(shape) * _BITS[dtype] // 8


class TensorEntry(NamedTuple):
    """Where one tensor lies; `start` and `stop` are bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One file, mapped: `tensors` and `metadata` are parsed and checked, no data has been read.

    Args:
        path: the file.
        size: of the file in bytes, where only its header is at `path`; no tensor can be read then.

    Raises:
        CheckpointError: the file cannot be opened or its header is not what the format allows.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        with open_file(path) as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
        try:
            whole = len(mapped) if size is None else size
            header, data_start = _read_header(mapped, whole)
            self.metadata = _parse_metadata(header.pop("__metadata__", None))
            self.tensors = {name: _parse_entry(name, entry) for name, entry in header.items()}
            _check_layout(self.tensors, whole - data_start)
        except ValueError as error:
            mapped.close()
            raise CheckpointError(f"{path}: corrupt safetensors file: {error}") from error
        self._data: np.ndarray | None = None
        if size is None:
            self._data = np.frombuffer(mapped, np.uint8)[data_start:]

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file; it stays valid after `close`.

        Raises:
            CheckpointError: the dtype is narrower than a byte.
            ValueError: the file is closed, or only its header is there.
        """
        if self._data is None:
            raise ValueError(f"{self.path} is closed, or no more of it than its header is there")
        dtype, shape, start, stop = self.tensors[name]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {dtype}, which cannot be read; "
                f"readable are {', '.join(DTYPES)}"
            )
        return self._data[start:stop].view(DTYPES[dtype]).reshape(shape)

    view = read  # as for other containers: what indexing does not take is not read

    def close(self) -> None:
        """Let go of the file; it is unmapped when the last view of it is gone."""
        self._data = None


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> dict[str, TensorEntry]:
    """Write a new file and flush it to the disk, each tensor while the next one is made: two are
    held in memory at a time.

    The data lies in the order in which it comes, which keeps every tensor aligned, but for those
    whose size is no multiple of eight bytes: they come last, the widest dtypes first.

    Returns:
        What the header says of each tensor.

    Raises:
        ValueError: a name comes twice, or the format has no code for a dtype.
        OSError: as writing does; `path` may then be there in part.
    """
    entries: dict[str, TensorEntry] = {}
    odd: dict[str, TensorEntry] = {}
    with (
        open(path, "x+b", buffering=0) as file,
        tempfile.SpooledTemporaryFile(_ODD_BYTES, dir=str(path.parent)) as odd_data,
    ):
        # The header comes first but is known last, so room is left for it.
        file.seek(_HEADER_ROOM)
        end = 0
        with one_behind() as behind:
            for name, array in tensors:
                if name in entries or name in odd or name == "__metadata__":
                    raise ValueError(f"{path.name}: tensor name {name} is taken")
                if array.dtype not in CODES:
                    raise ValueError(
                        f"tensor {name} has dtype {array.dtype}, unknown to safetensors"
                    )
                entry = TensorEntry(CODES[array.dtype], array.shape, end, end + array.nbytes)
                octets = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                if array.nbytes % 8:
                    start = odd_data.tell()
                    odd[name] = entry._replace(start=start, stop=start + array.nbytes)
                    odd_data.write(octets)
                else:
                    entries[name] = entry
                    behind(_write_all, file, octets)
                    end = entry.stop
        for name in sorted(odd, key=lambda name: (-_BITS[odd[name].dtype], name)):
            start, stop = odd[name].start, odd[name].stop
            odd_data.seek(start)
            for position in range(start, stop, _COPY_BYTES):
                _write_all(file, odd_data.read(min(_COPY_BYTES, stop - position)))
            entries[name] = odd[name]._replace(start=end, stop=end + stop - start)
            end = entries[name].stop
        header = _encode_header(entries, metadata)
        if len(header) > _HEADER_ROOM or end < _PADDED_FROM:
            _move_data(file, end, to=len(header))
        else:
            header = _encode_header(entries, metadata, size=_HEADER_ROOM)
        file.seek(0)
        _write_all(file, header)
        os.fsync(file.fileno())
    return entries


def _encode_header(
    tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """The bytes before the data of a file: length and header, padded with blanks to a multiple of
    eight and to `size` bytes at least."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape, start, stop) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, size - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _write_all(file: FileIO, octets: bytes | memoryview) -> None:
    """Write what one call may leave unwritten: Linux takes 2 GiB at a time."""
    left = memoryview(octets)
    while left:
        left = left[file.write(left) :]


def _move_data(file: FileIO, size: int, *, to: int) -> None:
    """Move `size` bytes that begin at `_HEADER_ROOM`, in place, and end the file behind them."""
    starts = range(0, size, _COPY_BYTES)
    for start in starts if to < _HEADER_ROOM else reversed(starts):  # never onto what is unmoved
        file.seek(_HEADER_ROOM + start)
        chunk = file.read(min(_COPY_BYTES, size - start))
        file.seek(to + start)
        _write_all(file, chunk)
    file.truncate(to + size)


def _read_header(data: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of so many bytes, and where the data begins. Raises ValueError."""
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(
            f"its first bytes announce a header of {length} bytes, the file has {size} and "
            f"at most {MAX_HEADER} are allowed; it is no safetensors file, or its download broke"
        )
    text = data[8 : 8 + length]
    if not text.startswith(b"{"):
        raise ValueError("the header does not begin with '{'")
    try:
        return parse_json(text), 8 + length
    except ValueError as error:
        raise ValueError(f"the header {error}") from error


def _parse_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def _parse_entry(name: str, entry: object) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} must have dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(
            f"tensor {name} has the unknown dtype {dtype!r}; known are {', '.join(_BITS)}"
        )
    if not _is_sizes(shape) or not _fits_numpy(shape):
        raise ValueError(f"tensor {name} has shape {_short(shape)}, expected a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"tensor {name} has data_offsets {_short(offsets)}, expected [start, stop]"
        )
    bits = math.prod(shape) * _BITS[dtype]
    start, stop = offsets
    if bits != 8 * (stop - start):
        raise ValueError(
            f"tensor {name} is {dtype} {_short(shape)}, which takes {_short(bits)} bits, but its "
            f"data_offsets span {8 * (stop - start)}"
        )
    return TensorEntry(dtype, tuple(shape), start, stop)


def _is_sizes(value: object) -> bool:
    """Whether it is a list of integers, none negative or beyond what any file can have."""
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**63 for i in value)


def _fits_numpy(shape: list[int]) -> bool:
    """numpy counts elements in 63 bits as if no dimension were zero, and has 64 dimensions."""
    return len(shape) <= _MAX_RANK and math.prod(filter(None, shape)) < 2**59


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_layout(tensors: Mapping[str, TensorEntry], size: int) -> None:
    """Raise ValueError unless the tensors cover `size` bytes of data, each byte once."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap"
            raise ValueError(f"tensor {name} starts at byte {entry.start}, not {end}: it {what}")
        end = entry.stop
    if end > size:
        raise ValueError(
            f"it is cut short: the tensors take {end} bytes, {size} are there; download it again"
        )
    if end < size:
        raise ValueError(f"the tensors end at byte {end}, but {size - end} more bytes follow")
