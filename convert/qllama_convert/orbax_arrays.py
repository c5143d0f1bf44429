"""Weights kept by orbax, as arrays that are restored fast and onto any sharding.

A tree of arrays by the parts of their names, `model.norm.weight` at `["model"]["norm"]["weight"]`,
in zarr over OCDBT, not compressed: packed codes hardly shrink. `orbax.checkpoint` restores the
folder as it stands; here single arrays are read, or parts of them, as a loader asks for them. They
are stored in chunks, so that a part is read without the whole.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qllama.errors import CheckpointError
from qllama_convert.safetensors_file import CODES, TensorEntry

_ARRAY = "/.zarray"  # ends the key that describes an array

# Chunks are read whole. Of this size, those at the borders of a part cost little, and an array is
# some tens of reads.
_CHUNK_BYTES = 1 << 21
_INDEX_BYTES = 1 << 26  # what the index of all chunks may take in memory; that of 70B takes a tenth

# After a failure the folder has to stay away for this many looks, one every 50 ms.
_QUIET_LOOKS = 10
_WRITERS_END = 30.0  # seconds after which whoever still writes is left to the next export


class OrbaxArray:
    """An array in such a folder, or a part of one, read when numpy asks for it.

    Indexed by slices and by one array of integers, as numpy would; each index gives a part of what
    it is applied to, and nothing is read by it.
    """

    def __init__(self, folder: Path, name: str, stored: Any) -> None:
        self.folder = folder
        self.name = name
        self._stored = stored
        self.dtype: np.dtype = stored.dtype.numpy_dtype
        self.shape: tuple[int, ...] = tuple(stored.shape)

    def __getitem__(self, index: Any) -> "OrbaxArray":
        indices = index if isinstance(index, tuple) else (index,)
        inside = tuple(
            slice(*one.indices(size)) if isinstance(one, slice) else one
            for one, size in zip(indices, self.shape, strict=False)
        )
        part = self._stored[inside]
        return OrbaxArray(self.folder, self.name, part.translate_to[(0,) * part.rank])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, from the disk.

        Raises:
            CheckpointError: the files are damaged.
        """
        try:
            array = np.asarray(self._stored.read().result(), dtype)
        except Exception as error:  # of whatever type tensorstore has for it
            raise _unreadable(self.folder, self.name, error) from error
        array.flags.writeable = False
        return array


class OrbaxArrays:
    """One folder, opened: names, dtypes and shapes are known, no array has been read.

    Raises:
        CheckpointError: the folder is not what orbax writes.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._arrays = _open_arrays(path)
        except Exception as error:  # of whatever type tensorstore has for it
            raise _unreadable(path, "its list of arrays", error) from error
        self.tensors: dict[str, TensorEntry] = {}
        for name, array in self._arrays.items():
            dtype = array.dtype.numpy_dtype
            if dtype not in CODES:
                raise CheckpointError(f"{path}: {name} has dtype {dtype}, which is not read")
            self.tensors[name] = TensorEntry(CODES[dtype], tuple(array.shape), 0, 0)

    def view(self, name: str) -> OrbaxArray:
        """One array, not read."""
        return OrbaxArray(self.path, name, self._arrays[name])

    def read(self, name: str) -> np.ndarray:
        """One array, from the disk.

        Raises:
            CheckpointError: its files are damaged.
        """
        return np.asarray(self.view(name))

    def close(self) -> None:
        """Let go of the files."""
        self._arrays = {}


def write_orbax(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write all of them, which are held in memory together, and flush them to the disk.

    Raises:
        ValueError: two names do not fit into one tree, or there are none.
        OSError: as writing does; nothing is left of `path`.
    """
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for name, array in tensors:
        *parents, last = name.split(".")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        if last in branch:
            raise ValueError(f"{path.name}: tensor name {name} is taken")
        branch[last] = array
    if not tree:
        raise ValueError("there are no tensors to write")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    chunks = jax.tree.map(lambda array: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.resolve(), args=ocp.args.PyTreeSave(tree, save_args=chunks))
    except ValueError as error:  # tensorstore's way to say that the disk is full
        number = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(number[1]) if number else errno.EIO
        _remove_for_good(path)
        raise OSError(code, os.strerror(code)) from error
    for file in (file for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_for_good(path: Path) -> None:
    """Remove a folder that is still being written: orbax gives up at the first failure, but
    tensorstore's threads go on with the other arrays, and make the folder anew if it is gone.
    """
    end = time.monotonic() + _WRITERS_END
    quiet = 0
    while quiet < _QUIET_LOOKS and time.monotonic() < end:
        quiet = 0 if path.exists() else quiet + 1
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


def _open_arrays(path: Path) -> dict[str, Any]:
    """Name -> array of tensorstore, not read."""
    import tensorstore

    folder = {"driver": "file", "path": f"{path.resolve()}/"}
    store = {"driver": "ocdbt", "base": folder}
    # Shared and with a cache, so that the index is read once; arrays are not kept in one.
    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": _INDEX_BYTES},
            "cache_pool#arrays": {"total_bytes_limit": 0},
        }
    )
    keys = tensorstore.KvStore.open(store, context=context).result().list().result()
    names = sorted(
        key.decode().removesuffix(_ARRAY) for key in keys if key.decode().endswith(_ARRAY)
    )
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": store | {"path": f"{name}/"},
                "cache_pool": "cache_pool#arrays",
            },
            context=context,
            open=True,
        )
        for name in names
    }
    return {name: array.result() for name, array in opening.items()}


def _unreadable(folder: Path, what: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} cannot be read ({_first_line(error)}); the files are damaged or "
        "incomplete, make or copy them again"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
