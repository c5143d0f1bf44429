"""Which files of a checkpoint folder hold the model's weights, by index or by name."""

import os
import re
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from qllama.errors import CheckpointError
from qllama_convert.files import first_few, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ORBAX = "model.orbax"
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})\.safetensors")
_OTHER_CONTAINERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz")


class WeightFiles(NamedTuple):
    """The weight files of a folder."""

    names: list[str]  # file names inside the folder, sorted; or ORBAX, a folder in it
    weight_map: dict[str, str] | None  # the index: tensor name -> file name
    doubt: str | None = None  # what the user should be warned of


def find_weight_files(folder: Path) -> WeightFiles:
    """`model.orbax`; else the files of `model.safetensors.index.json`; else `model.safetensors`;
    else the files of the only other index; else the only safetensors file; else a complete set of
    numbered shards.

    Raises:
        CheckpointError: there are none, or it is not clear which belong together.
    """
    present = sorted(os.listdir(folder))
    weights = [name for name in present if _may_hold_model(name, ".safetensors")]
    indices = [name for name in present if _may_hold_model(name, ".safetensors.index.json")]
    if ORBAX in present:
        if weights or indices:
            raise CheckpointError(
                f"{folder}: has both {ORBAX} and {first_few(indices + weights)}; which of them is "
                "the model is unclear, remove the other"
            )
        return WeightFiles([ORBAX], None)
    if INDEX in indices:
        found = _from_index(folder / INDEX)
        if WEIGHTS in weights and WEIGHTS not in found.names:
            return found._replace(
                doubt=f"{folder}: {WEIGHTS} is ignored, because {INDEX} lists other files; some "
                "tools read the former: remove whichever is out of date"
            )
        return found
    if WEIGHTS in weights:
        return WeightFiles([WEIGHTS], None)
    if len(indices) == 1:
        return _from_index(folder / indices[0])
    if not indices and _is_complete_set(weights):
        doubt = f"{folder}: {INDEX} is missing; all {len(weights)} numbered shards are used"
        return WeightFiles(weights, None, doubt)
    if len(weights) == 1 and not _SHARD_NAME.fullmatch(weights[0]):
        return WeightFiles(weights, None)
    if not weights:
        raise CheckpointError(f"{folder}: {_why_no_weights(present)}")
    raise CheckpointError(
        f"{folder}: cannot tell which weight files make the model: found "
        f"{first_few(indices + weights)}; expected {WEIGHTS}, or all shards with {INDEX}. "
        "Download what is missing, or leave the files of one model in the folder"
    )


def _may_hold_model(name: str, suffix: str) -> bool:
    """Whether a file of this name is neither hidden nor in Meta's own layout."""
    return name.endswith(suffix) and not name.startswith((".", "consolidated"))


def _is_complete_set(names: list[str]) -> bool:
    """Whether these are `STEM-00001-of-0000N.safetensors` to `STEM-0000N-of-0000N.safetensors`."""
    matches = [_SHARD_NAME.fullmatch(name) for name in names]
    parts = [(m["stem"], int(m["i"]), int(m["n"])) for m in matches if m]
    count = len(names)
    return bool(parts) and parts == [(parts[0][0], i + 1, count) for i in range(count)]


def _why_no_weights(present: list[str]) -> str:
    others = [name for name in present if name.endswith(_OTHER_CONTAINERS)]
    if others:
        return (
            f"unsupported weight files {first_few(others)}; only safetensors are read. Download "
            "the model's safetensors files, or load it with transformers and `save_pretrained` it"
        )
    vendor = [name for name in present if name.startswith("consolidated")]
    if vendor:
        return (
            f"holds only {first_few(vendor)}, the vendor's own layout; download the files of the "
            "Hugging Face layout, model*.safetensors"
        )
    return f"has no weight files; expected {WEIGHTS}, or shards with {INDEX}"


def _from_index(path: Path) -> WeightFiles:
    """The files an index lists, each a plain name that is there."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no usable weight_map; expected an object that gives each tensor's file"
        )
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not _is_plain(file):
            raise CheckpointError(
                f"{path}: puts tensor {tensor} in {file!r}; expected the plain name of a "
                ".safetensors file in the same folder"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.lexists(path.parent / name)]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} weight files are missing: "
            f"{first_few(missing)}; download them"
        )
    return WeightFiles(names, weight_map)


def _is_plain(name: str) -> bool:
    """Whether a file name has no folder, drive or NUL in it, on any system.

    A plain name cannot leave the folder, not even through a linked subfolder. The file itself may
    well be a link: in the Hugging Face cache every file is.
    """
    return PureWindowsPath(name).name == name and "\0" not in name
