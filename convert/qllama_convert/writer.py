"""Writing a checkpoint folder: aside, flushed, then renamed, so that it is there whole or not.

What the tensors are is for the formats to say; this module lays out files.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np

from qllama_convert.names import split_name
from qllama_convert.orbax_arrays import write_orbax
from qllama_convert.partial_folder import move_into_place, partial_folder
from qllama_convert.safetensors_file import write_safetensors
from qllama_convert.weight_files import INDEX, ORBAX, WEIGHTS

Tensors = Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]


def write_checkpoint(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    tensors: Tensors,
    files: Mapping[str, bytes | Path] | None = None,
    container: Literal["safetensors", "orbax"] = "safetensors",
    check: Callable[[Path], None] = lambda folder: None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint folder; equal arguments give equal bytes.

    Whatever goes wrong, an existing folder stays as it is and a new one does not appear. What a
    killed process left beside it, `.NAME.<hex>.partial`, is removed by the next one.

    Args:
        folder: where; its parents are made.
        config: becomes `config.json`, see `exported_config`.
        tensors: name -> array, or (name, array) pairs, which may be made as they are asked for:
            two modules at most are held in memory. Pairs of one module must come together.
        files: what else goes in: file name -> its bytes, or a file to copy (tokenizer, ...).
        container: of the weights; "orbax" (one `model.orbax`) holds all tensors in memory at once.
        check: called with the folder where all of it has been written, before it gets its name;
            what it raises is raised, and nothing appears.
        max_shard_bytes: bytes of tensors after which a new shard begins. A module is never split,
            so a shard with one module may be larger.
        overwrite: replace an existing checkpoint.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: `check_output_folder` refuses, or an argument cannot be written.
        OSError: of the kind that writing met (disk full, no permission, ...).
    """
    folder = check_output_folder(folder, overwrite=overwrite)
    files = files or {}
    _check_file_names(files)
    try:
        with partial_folder(folder) as partial:
            _write_file(partial / "config.json", _json(exported_config(config)))
            for name, content in files.items():
                _write_file(partial / name, content)
            if container == "orbax":
                write_orbax(partial / ORBAX, _pairs(tensors))
            else:
                _write_weights(partial, tensors, max_shard_bytes)
            flush_folder(partial)
            check(partial)
            move_into_place(partial, folder, overwrite=overwrite)
            flush_folder(folder.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot write {folder}: {reason}; nothing there was changed"
        ) from error
    return folder


def check_output_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The folder as an absolute path, if `write_checkpoint` may write it. Ask before long work.

    Raises:
        ValueError: it exists and `overwrite` is false, or what is there is no checkpoint.
    """
    folder = Path(folder).resolve()
    if not os.path.lexists(folder):
        return folder
    if not overwrite:
        raise ValueError(f"{folder} exists; choose another folder, or pass overwrite=True")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise ValueError(
            f"{folder} is not a checkpoint folder (it has no config.json) and is not overwritten; "
            "choose another folder, or remove it yourself"
        )
    return folder


def exported_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as it is written: in words that readers of transformers 4 and 5 both know.

    The dtype under both its names, rotary settings in the spelling of transformers 4, which 5
    reads too. `transformers_version` is kept: it tells readers whose habits the rest follows.
    """
    exported = {**config, "architectures": ["LlamaForCausalLM"]}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        exported |= {"dtype": dtype, "torch_dtype": dtype}
    rope = dict(exported.pop("rope_parameters", None) or {})
    if rope:
        exported["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta"))
        exported["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return exported


def _check_file_names(files: Mapping[str, bytes | Path]) -> None:
    for name in files:
        plain = PureWindowsPath(name).name == name and name not in ("", ".", "..")
        if not plain or name in ("config.json", INDEX) or name.endswith(".safetensors"):
            raise ValueError(f"files: {name!r} is not a plain file name, or one written anyway")


def _write_weights(folder: Path, tensors: Tensors, max_shard_bytes: int) -> None:
    """`model.safetensors`, or numbered shards and their index."""
    shards = []
    numbered = _number_shards(_pairs(tensors), max_shard_bytes)
    for number, group in itertools.groupby(numbered, key=lambda item: item[0]):
        path = folder / f"{number}.safetensors"
        members = ((name, array) for _, name, array in group)
        shards.append((path, write_safetensors(path, members, {"format": "pt"})))
    if not shards:
        raise ValueError("there are no tensors to write")
    if len(shards) == 1:
        shards[0][0].rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, (path, entries) in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(entries, file)
    everything = [entry for _, entries in shards for entry in entries.values()]
    metadata = {
        "total_parameters": sum(math.prod(entry.shape) for entry in everything),
        "total_size": sum(entry.stop - entry.start for entry in everything),
    }
    _write_file(folder / INDEX, _json({"metadata": metadata, "weight_map": weight_map}))


def _pairs(tensors: Tensors) -> Iterable[tuple[str, np.ndarray]]:
    if not isinstance(tensors, Mapping):
        return tensors
    return ((name, tensors[name]) for name in sorted(tensors, key=split_name))


def _number_shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Each tensor with the number of its shard. Tensors of one module stay together."""
    number, filled = 1, 0
    modules: set[str] = set()
    for module, group in itertools.groupby(tensors, key=lambda item: split_name(item[0])[0]):
        if module in modules:
            raise ValueError(f"tensors of {module} come apart; give a module's tensors together")
        modules.add(module)
        members = sorted(group, key=lambda item: item[0])
        nbytes = sum(array.nbytes for _, array in members)
        if filled and filled + nbytes > max_shard_bytes:
            number, filled = number + 1, 0
        filled += nbytes
        for name, array in members:
            yield number, name, array


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def _write_file(path: Path, content: bytes | Path) -> None:
    with open(path, "xb") as file:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, as fsync does for a file's data.

    Some network file systems cannot, and need not: they are asked, not required to.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
