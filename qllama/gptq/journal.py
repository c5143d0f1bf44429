"""What a run has finished so far, on disk: stopped at any moment, it goes on from there.

A folder beside the output, `.NAME.quantizing`, holds `manifest.json` and one safetensors file a
unit (a decoder layer, or the head). Each file is written aside, flushed and renamed, first that of
the unit, then the manifest that names it; a unit counts if its file has the hash that the manifest
says. The folder is locked while a process works on it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from qllama_convert.safetensors_file import SafetensorsFile, write_safetensors
from qllama_convert.writer import flush_folder

from qllama.gptq.decide import QuantizedUnit
from qllama.gptq.recipe import LinearRecipe
from qllama.gptq.report import LinearReport, Seconds, linear_from_json
from qllama.quantization.qtensor import QTensor

_MANIFEST = "manifest.json"
_FORMAT_VERSION = 1
_ARRAYS = ("codes", "scales", "zeros", "input_scale")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One finished unit, as the manifest has it."""

    file: str
    sha256: str
    seconds: Seconds
    linears: tuple[LinearReport, ...]


class Journal:
    """The finished units of one run, in order. Made by `open_journal`."""

    def __init__(
        self, folder: Path, lock: int, run: Mapping[str, Any], entries: list[Entry]
    ) -> None:
        self.folder = folder
        self.run = run
        self.entries = entries
        self._lock = lock

    def append(self, unit: QuantizedUnit, seconds: Seconds) -> None:
        """Write the next unit down.

        Raises:
            OSError: of the kind that writing met (disk full, ...); what was there before stays.
        """
        name = f"unit_{len(self.entries):03}.safetensors"
        with self._writing():
            partial = self.folder / f"{name}.partial"
            partial.unlink(missing_ok=True)
            write_safetensors(partial, _tensors(unit), {"format": "pt"})
            digest = _sha256(partial)
            partial.replace(self.folder / name)
            flush_folder(self.folder)
            entry = Entry(name, digest, seconds, tuple(unit.reports))
            self._write_manifest([*self.entries, entry])
        self.entries.append(entry)

    def read(self, number: int, recipes: Mapping[str, LinearRecipe]) -> QuantizedUnit:
        """A finished unit; its arrays are views on the file."""
        entry = self.entries[number]
        file = SafetensorsFile(self.folder / entry.file)
        arrays = {name: file.read(name) for name in file.tensors}
        file.close()
        unit = QuantizedUnit(reports=list(entry.linears))
        for report in entry.linears:
            unit.linears[report.path] = QTensor(
                codes=arrays.pop(f"{report.path}.codes"),
                scales=arrays.pop(f"{report.path}.scales"),
                zeros=arrays.pop(f"{report.path}.zeros", None),
                input_scale=arrays.pop(f"{report.path}.input_scale", None),
                scheme=recipes[report.path].scheme,
                shape=report.figures.shape,
            )
        scales = arrays.pop("k_scale", None), arrays.pop("v_scale", None)
        if scales[0] is not None and scales[1] is not None:
            unit.kv_scales = scales[0], scales[1]
        unit.norms = {name.removesuffix(".weight"): array for name, array in arrays.items()}
        return unit

    def discard(self) -> None:
        """Remove the folder: the result is in place. Call `close` all the same."""
        # In this order, so that an interruption leaves nothing that looks like a journal.
        with contextlib.suppress(OSError):
            (self.folder / _MANIFEST).unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others have the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_manifest(self, entries: list[Entry]) -> None:
        manifest = {
            "version": _FORMAT_VERSION,
            "run": self.run,
            "units": [dataclasses.asdict(entry) for entry in entries],
        }
        partial = self.folder / f"{_MANIFEST}.partial"
        with open(partial, "wb") as file:
            file.write(json.dumps(manifest, indent=1, allow_nan=False).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / _MANIFEST)
        flush_folder(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for path in self.folder.glob("*.partial"):
                path.unlink(missing_ok=True)
            reason = error.strerror or str(error)
            raise OSError(
                error.errno,
                f"cannot write {self.folder}: {reason}; the {len(self.entries)} layers that are "
                "finished are kept there: make room, and run the same command again",
            ) from error


def journal_folder(output: Path) -> Path:
    """Where the journal of a run that makes `output` lies."""
    return output.with_name(f".{output.name}.quantizing")


def open_journal(output: Path, run: Mapping[str, Any], *, resume: bool) -> Journal:
    """Lock the journal of a run, and see how far it came.

    Args:
        output: what the run makes, an absolute path; its parents are made.
        run: what tells this run from others: JSON values. All of it must be as it was.
        resume: go on; else begin again, discarding what is there.

    Raises:
        ValueError: another run left it, or is at work on it.
        OSError: the folder cannot be made.
    """
    folder = journal_folder(output)
    lock = _lock(folder)
    try:
        for path in folder.glob("*.partial"):
            path.unlink()
        if not resume:
            (folder / _MANIFEST).unlink(missing_ok=True)
        entries = _entries(folder, run)
    except BaseException:
        os.close(lock)
        raise
    return Journal(folder, lock, run, entries)


def _lock(folder: Path) -> int:
    """An open file of the folder, locked until it is closed."""
    import fcntl  # not on Windows

    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise
            if os.fstat(lock).st_nlink:
                return lock
            os.close(lock)  # a run that has just ended removed it
    except BlockingIOError:
        raise ValueError(
            f"{folder} is in use: another process is making the same output; wait for it, or "
            "choose another output"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {folder}: {reason}") from error


def _entries(folder: Path, run: Mapping[str, Any]) -> list[Entry]:
    """The units that count."""
    path = folder / _MANIFEST
    if not path.exists():
        return []
    try:
        manifest = json.loads(path.read_bytes())
        version, before = manifest["version"], manifest["run"]
        entries = [_entry(value) for value in manifest["units"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); pass resume=False to begin again, or remove {folder}"
        ) from error
    now = json.loads(json.dumps(run))
    if version != _FORMAT_VERSION or before != now:
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        differs = "; ".join(
            f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names
        )
        raise ValueError(
            f"{folder} holds {len(entries)} layers of another run, and runs are not mixed "
            f"({differs or 'its format is another'}); repeat that run, or pass resume=False to "
            "discard it and begin again"
        )
    for i, entry in enumerate(entries):
        with contextlib.suppress(OSError):
            if _sha256(folder / entry.file) == entry.sha256:
                continue
        return entries[:i]
    return entries


def _entry(value: dict[str, Any]) -> Entry:
    linears = tuple(linear_from_json(linear) for linear in value["linears"])
    return Entry(value["file"], value["sha256"], Seconds(**value["seconds"]), linears)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tensors(unit: QuantizedUnit) -> Iterator[tuple[str, np.ndarray]]:
    for path, weight in unit.linears.items():
        for name in _ARRAYS:
            array = getattr(weight, name)
            if array is not None:
                yield f"{path}.{name}", np.asarray(array)
    for path, norm in unit.norms.items():
        yield f"{path}.weight", norm
    if unit.kv_scales is not None:
        yield from zip(("k_scale", "v_scale"), unit.kv_scales, strict=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
