"""A checkpoint folder, opened: its JSON files, and every tensor by name, mapped but not read.

Knows files and names only; what the tensors mean is for the formats to say.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, Self

import numpy as np

from qllama.errors import CheckpointError
from qllama_convert.files import first_few, read_json
from qllama_convert.safetensors_file import SafetensorsFile

_WEIGHTS = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_SIDECARS = ("quantize_config.json", "quant_config.json")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})\.safetensors")
_OTHER_CONTAINERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz")


class CheckpointWarning(UserWarning):
    """A checkpoint can be used, but something about it is odd or may be wrong."""


class TensorInfo(NamedTuple):
    """What a weight file's header says of one tensor."""

    dtype: str  # safetensors code, such as "BF16" or "F8_E4M3"
    shape: tuple[int, ...]
    file: str  # file name inside the folder


class Checkpoint:
    """A folder, opened by `open_checkpoint`: everything is known, no tensor has been read.

    Attributes:
        folder: the folder.
        config: `config.json`.
        generation_config: `generation_config.json`, `{}` without that file.
        sidecar: `quantize_config.json`, else `quant_config.json`, else None.
        sidecar_name: which of the two it is.
        tensors: what the weight files hold, sorted by name.
        warnings: what `warn` was told, each message once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        names, weight_map = self._find_weights()
        self._files = {name: SafetensorsFile(folder / name) for name in names}
        self.tensors: Mapping[str, TensorInfo] = _merge(folder, self._files)
        self._read: set[str] = set()
        if weight_map is not None:
            self._check_index(weight_map)
        self._check_metadata()

    def read(self, name: str) -> np.ndarray:
        """The tensor, a read-only view on its mapped file, and from now on not `unread`.

        BF16 and the 8-bit floats have the types of ml_dtypes. A view outlives the checkpoint.

        Raises:
            CheckpointError: there is no such tensor, or numpy cannot hold its dtype.
            ValueError: the checkpoint is closed.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing; the weight files hold "
                f"{len(self.tensors)} others"
            )
        array = self._files[self.tensors[name].file].read(name)
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

    def _find_weights(self) -> tuple[list[str], dict[str, str] | None]:
        """The weight files, and the index (tensor name -> file name) if the folder has one."""
        folder = self.folder
        present = sorted(os.listdir(folder))
        weights = [name for name in present if _is_weights(name)]
        indices = [name for name in present if _is_weights(name.removesuffix(".index.json"))]
        indices = [name for name in indices if name.endswith(_INDEX_SUFFIX)]
        if _WEIGHTS + ".index.json" in indices:
            weight_map = _read_index(folder / (_WEIGHTS + ".index.json"))
            names = sorted(set(weight_map.values()))
            if _WEIGHTS in weights and _WEIGHTS not in names:
                self.warn(
                    f"{folder}: {_WEIGHTS} is ignored, its index lists other files; some tools "
                    "read the former: remove whichever is out of date"
                )
            return names, weight_map
        if _WEIGHTS in weights:
            return [_WEIGHTS], None
        if len(indices) == 1:
            weight_map = _read_index(folder / indices[0])
            return sorted(set(weight_map.values())), weight_map
        if len(weights) == 1 and not _SHARD_NAME.fullmatch(weights[0]):
            return weights, None
        if not indices and _is_complete_set(weights):
            self.warn(
                f"{folder}: {_WEIGHTS}.index.json is missing; the {len(weights)} shards form a "
                "complete set and are used without it"
            )
            return weights, None
        if not weights:
            raise CheckpointError(_no_weights(folder, present))
        raise CheckpointError(
            f"{folder}: cannot tell which weight files belong together: found "
            f"{first_few(indices + weights)}; expected {_WEIGHTS}, or all shards with "
            f"{_WEIGHTS}.index.json. Download what is missing, or leave one model in the folder"
        )

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
        for name, file in self._files.items():
            layout = file.metadata.get("format", "pt")
            if layout != "pt":
                self.warn(
                    f"{self.folder / name}: was written for {layout!r}, not 'pt' (PyTorch); "
                    "its weights may be transposed"
                )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder: read its JSON files and the headers of its weight files.

    Weight files are those of `model.safetensors.index.json`; else `model.safetensors`; else those
    of the only other index; else the only safetensors file, whatever its name; else a complete set
    of numbered shards. `consolidated*.safetensors` and subfolders are left alone.

    Raises:
        CheckpointError: the folder, `config.json`, another JSON file, the index or a weight file
            is missing, unreadable or contradicts itself.
    """
    return Checkpoint(Path(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder}: {what}; expected a checkpoint folder with config.json and "
            "*.safetensors files"
        )
    try:
        present = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    if "config.json" not in present:
        found = first_few(present) if present else "nothing"
        raise CheckpointError(
            f"{folder}: has no config.json (found: {found}); expected a Hugging Face checkpoint "
            "folder"
        )
    return read_json(folder / "config.json")


def _is_weights(name: str) -> bool:
    """Whether a file of this name can hold the model: not Meta's own layout, not hidden."""
    return name.endswith(".safetensors") and not name.startswith((".", "consolidated"))


def _is_complete_set(names: list[str]) -> bool:
    """Whether these are `STEM-00001-of-0000N.safetensors` to `STEM-0000N-of-0000N.safetensors`."""
    matches = [_SHARD_NAME.fullmatch(name) for name in names]
    parts = [(m["stem"], int(m["i"]), int(m["n"])) for m in matches if m]
    count = len(names)
    return bool(parts) and parts == [(parts[0][0], i + 1, count) for i in range(count)]


def _no_weights(folder: Path, present: list[str]) -> str:
    others = [name for name in present if name.endswith(_OTHER_CONTAINERS)]
    if others:
        return (
            f"{folder}: unsupported weight files {first_few(others)}; only safetensors are read. "
            "Load the model with transformers and `save_pretrained` it, or download its "
            "safetensors files"
        )
    own_layout = [name for name in present if name.startswith("consolidated")]
    if own_layout:
        return (
            f"{folder}: holds only {first_few(own_layout)}, the vendor's own layout; download "
            "the files of the Hugging Face layout, model*.safetensors"
        )
    return f"{folder}: has no weight files; expected {_WEIGHTS}, or shards with an index"


def _read_index(path: Path) -> dict[str, str]:
    """The index, tensor name -> file name, each file a plain name that is there."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no usable weight_map; expected an object that gives each tensor's file"
        )
    for tensor, file in weight_map.items():
        # A plain name cannot leave the folder, also not through a linked subfolder. The file itself
        # may well be a link: in the Hugging Face cache every file is.
        if not isinstance(file, str) or not file.endswith(".safetensors") or not _is_plain(file):
            raise CheckpointError(
                f"{path}: puts tensor {tensor} in {file!r}; expected the plain name of a "
                ".safetensors file in the same folder"
            )
    missing = {f for f in weight_map.values() if not os.path.lexists(path.parent / f)}
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(set(weight_map.values()))} weight files are missing: "
            f"{first_few(missing)}; download them"
        )
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a file name has no folder, drive or NUL in it, on any system."""
    return PureWindowsPath(name).name == name and "\0" not in name


def _merge(folder: Path, files: Mapping[str, SafetensorsFile]) -> dict[str, TensorInfo]:
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
