"""A checkpoint folder, opened: its JSON files, and every tensor by name, mapped but not read.

Knows files and names only; what the tensors mean is for the formats to say.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from qllama.errors import CheckpointError
from qllama_convert.files import first_few, read_json
from qllama_convert.orbax_arrays import OrbaxArray, OrbaxArrays
from qllama_convert.safetensors_file import SafetensorsFile, data_size
from qllama_convert.weight_files import ORBAX, find_weight_files

_SIDECARS = ("quantize_config.json", "quant_config.json")


class CheckpointWarning(UserWarning):
    """A checkpoint can be used, but something about it is odd or may be wrong."""


class TensorInfo(NamedTuple):
    """What a weight file's header says of one tensor."""

    dtype: str  # safetensors code, such as "BF16" or "F8_E4M3"
    shape: tuple[int, ...]
    file: str  # file name inside the folder

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return data_size(self.dtype, self.shape)


class Checkpoint:
    """A folder, opened by `open_checkpoint`: everything is known, no tensor has been read.

    Attributes:
        folder: the folder.
        config: `config.json`.
        generation_config: `generation_config.json`, `{}` without that file.
        sidecar: `quantize_config.json`, else `quant_config.json`, else None.
        sidecar_name: which of the two it is.
        tensors: what the weight files hold, sorted by name.
        metadata: of each weight file, by its name.
        warnings: what `warn` was told, each message once.
        headers_only: whether some weight files have no more than their headers in the folder, so
            that their tensors cannot be read.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self.headers_only = bool(sizes)
        self.warnings: list[str] = []
        self.config = _read_config(folder)
        generation_config = folder / "generation_config.json"
        self.generation_config: dict[str, Any] = (
            read_json(generation_config) if os.path.lexists(generation_config) else {}
        )
        self.sidecar_name = next(
            (name for name in _SIDECARS if os.path.lexists(folder / name)), None
        )
        self.sidecar: dict[str, Any] | None = (
            None if self.sidecar_name is None else read_json(folder / self.sidecar_name)
        )
        weights = find_weight_files(folder)
        if weights.doubt is not None:
            self.warn(weights.doubt)
        self._files = {
            name: OrbaxArrays(folder / name)
            if name == ORBAX
            else SafetensorsFile(folder / name, (sizes or {}).get(name))
            for name in weights.names
        }
        self.tensors: Mapping[str, TensorInfo] = _merge(folder, self._files)
        self.metadata = {name: file.metadata for name, file in self._files.items()}
        self._read: set[str] = set()
        if weights.weight_map is not None:
            self._check_index(weights.weight_map)
        self._check_metadata()

    def read(self, name: str) -> np.ndarray:
        """The tensor, a read-only view on its mapped file, and from now on not `unread`.

        BF16 and the 8-bit floats have the types of ml_dtypes. A view outlives the checkpoint.

        Raises:
            CheckpointError: there is no such tensor, or numpy cannot hold its dtype.
            ValueError: the checkpoint is closed.
        """
        array = self._file_of(name).read(name)
        self._read.add(name)
        return array

    def view(self, name: str) -> np.ndarray | OrbaxArray:
        """As `read`, but only the parts that indexing takes of it are read, when numpy needs them.

        Raises:
            CheckpointError: there is no such tensor, or numpy cannot hold its dtype. Asking for
                values raises it too, where files are damaged.
            ValueError: the checkpoint is closed.
        """
        array = self._file_of(name).view(name)
        self._read.add(name)
        return array

    def ignore(self, name: str) -> None:
        """Count a tensor as known and deliberately not needed."""
        self._read.add(name)

    def unread(self) -> list[str]:
        """The tensors that were neither `read` nor `ignore`d, sorted."""
        return [name for name in self.tensors if name not in self._read]

    def warn(self, message: str) -> None:
        """Add a message to `warnings` and issue it as a `CheckpointWarning`, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            warnings.warn(message, CheckpointWarning, stacklevel=2)

    def close(self) -> None:
        """Let go of the weight files. What was read stays valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _file_of(self, name: str) -> SafetensorsFile | OrbaxArrays:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing; the weight files hold "
                f"{len(self.tensors)} others"
            )
        return self._files[self.tensors[name].file]

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        absent = [
            f"{name} ({file})"
            for name, file in weight_map.items()
            if name not in self.tensors or self.tensors[name].file != file
        ]
        if absent:
            raise CheckpointError(
                f"{self.folder}: {len(absent)} tensors are not in the file where the index puts "
                f"them: {first_few(absent)}; index and shards are not of one checkpoint, "
                "download both again"
            )
        unlisted = self.tensors.keys() - weight_map.keys()
        if unlisted:
            self.warn(
                f"{self.folder}: {len(unlisted)} tensors are in the shards but not in the index: "
                f"{first_few(unlisted)}"
            )

    def _check_metadata(self) -> None:
        for name, metadata in self.metadata.items():
            layout = metadata.get("format", "pt")
            if layout != "pt":
                self.warn(
                    f"{self.folder / name}: was written for {layout!r}, not 'pt' (PyTorch); "
                    "its weights may be transposed"
                )


def open_checkpoint(folder: str | Path, *, sizes: Mapping[str, int] | None = None) -> Checkpoint:
    """Open a checkpoint folder: read its JSON files and the headers of its weight files.

    `weight_files.find_weight_files` says which those are; `consolidated*` and subfolders are left
    alone.

    Args:
        folder: where it is.
        sizes: bytes of those weight files, by name, of which only the header is there: all about
            them is known and checked as ever, but no tensor can be read.

    Raises:
        CheckpointError: the folder, `config.json`, another JSON file, the index or a weight file
            is missing, unreadable or contradicts itself.
    """
    return Checkpoint(Path(folder), sizes)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        present = os.listdir(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: cannot be opened ({getattr(error, 'strerror', error)}); expected a "
            "checkpoint folder with config.json and *.safetensors files"
        ) from error
    if "config.json" not in present:
        found = first_few(present) if present else "nothing"
        raise CheckpointError(
            f"{folder}: has no config.json (found: {found}); expected a Hugging Face checkpoint "
            "folder"
        )
    return read_json(folder / "config.json")


def _merge(
    folder: Path, files: Mapping[str, SafetensorsFile | OrbaxArrays]
) -> dict[str, TensorInfo]:
    """All tensors of all files, sorted by name."""
    tensors: dict[str, TensorInfo] = {}
    for file_name, file in files.items():
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            other = tensors[min(twice)].file
            raise CheckpointError(
                f"{folder}: {len(twice)} tensors are in {file_name} and in {other} or other "
                f"shards: {first_few(twice)}; remove the shard that does not belong here"
            )
        for name, entry in file.tensors.items():
            tensors[name] = TensorInfo(entry.dtype, entry.shape, file_name)
    return dict(sorted(tensors.items()))
