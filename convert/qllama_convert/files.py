"""Opening the files of a checkpoint folder, and JSON as strictly as a checkpoint deserves.

Whatever is wrong with a file becomes a `CheckpointError` that names it and says what to do.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from qllama.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs"


def open_file(path: Path) -> BinaryIO:
    """The file, open for reading at its start.

    Raises:
        CheckpointError: it is missing, a link to nothing, not a regular file, unreadable, empty, or
            the pointer that Git LFS leaves where the file was not downloaded.
    """
    try:
        # A named pipe would block in open(), so look before opening.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is not a regular file; a file was expected here")
        file = open(path, "rb")  # noqa: SIM115 (handed to the caller)
    except FileNotFoundError:
        what = "is a link to a file that is gone" if os.path.islink(path) else "does not exist"
        raise CheckpointError(f"{path}: {what}; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        start = file.read(len(_LFS_POINTER))
        if not start:
            raise CheckpointError(f"{path}: is empty (0 bytes); download it again")
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in the "
                "folder, or download it with `hf download`"
            )
        file.seek(0)
    except OSError as error:
        file.close()
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError:
        file.close()
        raise
    return file


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: as `open_file` does, or the file does not hold one JSON object.
    """
    with open_file(path) as file:
        try:
            return parse_json(file.read())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; download or correct the file") from error


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which must be UTF-8 and may not repeat a key.

    Raises:
        ValueError: says what `data` is instead.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("is not usable JSON (nested too deeply)") from error
    if not isinstance(value, dict):
        raise ValueError(f"holds a JSON {_json_type(value)}, expected an object")
    return value


def first_few(names: Collection[str]) -> str:
    """The first five names, and how many more there are: for messages about many tensors."""
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"repeats the key {repeated!r}")
    for key in result:
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has the key {key!r}, which is not valid Unicode") from error
    return result


def _json_type(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
