"""The tensors of one module of a checkpoint, read under their rules or refused with their name."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np

from qllama.errors import CheckpointError
from qllama_convert.checkpoint import Checkpoint, TensorInfo

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of unquantized weights, of biases and of scales."""

# Each float type as integers: the bits without the sign, and those of 65536 (F16: infinity), from
# which on a value is larger than any of float16. Larger ones make products overflow, and no
# training ends with them.
_MAGNITUDE = {
    "BF16": ("u2", 0x7FFF, 0x4780),
    "F16": ("u2", 0x7FFF, 0x7C00),
    "F32": ("u4", 0x7FFFFFFF, 0x47800000),
}
_CHUNK = 1 << 20


class ModuleTensors:
    """What a checkpoint stores directly under one module path, such as "lm_head".

    Args:
        checkpoint: an open checkpoint.
        path: module path as in tensor names, without the final dot.
    """

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self.checkpoint = checkpoint
        self.path = path
        prefix = f"{path}."
        below = (name[len(prefix) :] for name in checkpoint.tensors if name.startswith(prefix))
        self.suffixes = frozenset(suffix for suffix in below if "." not in suffix)
        self._accounted: set[str] = set()

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.suffixes

    def info(self, suffix: str) -> TensorInfo:
        """Dtype, shape and file of a tensor; `CheckpointError` when it is missing."""
        if suffix not in self.suffixes:
            there = ", ".join(sorted(self.suffixes)) or "nothing"
            raise self.error(f"tensor {suffix} is missing; the module has {there}")
        return self.checkpoint.tensors[f"{self.path}.{suffix}"]

    def read(
        self, suffix: str, *, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """One tensor, as a view on its file.

        Args:
            suffix: name of the tensor without the module path.
            dtypes: safetensors codes that are right here.
            shape: the only right shape; None: the caller checks.

        Raises:
            CheckpointError: missing, another dtype, another shape.
        """
        self._check_header(suffix, dtypes, shape)
        self._accounted.add(suffix)
        return self.checkpoint.read(f"{self.path}.{suffix}")

    def view(self, suffix: str, *, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        """As `read`, but only the parts that indexing takes of it are read, when numpy needs them:
        an array, or what stands for one."""
        self._check_header(suffix, dtypes, shape)
        self._accounted.add(suffix)
        return self.checkpoint.view(f"{self.path}.{suffix}")

    def _check_header(
        self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None
    ) -> None:
        info = self.info(suffix)
        if info.dtype not in dtypes:
            expected = " or ".join(dtypes)
            raise self.error(f"tensor {suffix} has dtype {info.dtype}, expected {expected}", suffix)
        if shape is not None and tuple(info.shape) != shape:
            raise self.wrong_shape(suffix, str(list(shape)))

    def read_floats(self, suffix: str, shape: tuple[int, ...]) -> np.ndarray:
        """An unquantized tensor, BF16, F16 or F32 as stored, its values in the range of F16."""
        array = self.read(suffix, dtypes=FLOATS, shape=shape)
        self.check_floats(suffix, array)
        return array

    def check_floats(self, suffix: str, array: np.ndarray) -> None:
        """Raise unless all values of a float tensor, or of a part of it, are in the range of F16.

        Raises:
            CheckpointError: the first that is not, by its place in `array`.
        """
        unsigned, mask, limit = _MAGNITUDE[self.info(suffix).dtype]
        flat = array.reshape(-1).view(unsigned)

        def bad_value(start: int) -> int | None:
            bad = (flat[start : start + _CHUNK] & flat.dtype.type(mask)) >= limit
            return start + int(bad.argmax()) if bad.any() else None

        with ThreadPoolExecutor() as pool:
            for place in pool.map(bad_value, range(0, flat.size, _CHUNK)):
                if place is not None:
                    self._refuse_value(suffix, array, place)

    def _refuse_value(self, suffix: str, array: np.ndarray, place: int) -> NoReturn:
        value = float(array.reshape(-1)[place])
        what = f"the value {value:g}" if math.isfinite(value) else "an infinite or NaN value"
        first = [int(i) for i in np.unravel_index(place, array.shape)]
        raise self.error(
            f"tensor {suffix} has {what} at {first}; weights are finite and below 65536: the file "
            "is damaged, download it again",
            suffix,
        )

    def ignore(self, suffix: str) -> None:
        """Account for a tensor that is known and not needed; it may be absent."""
        if suffix in self.suffixes:
            self._accounted.add(suffix)
            self.checkpoint.ignore(f"{self.path}.{suffix}")

    def refuse_unread(self, but: frozenset[str] = frozenset()) -> None:
        """Raise if the module has a tensor that was neither read nor ignored, `but` these."""
        unread = sorted(self.suffixes - self._accounted - but)
        if unread:
            used = ", ".join(sorted(self._accounted))
            raise self.error(
                f"unexpected tensors {', '.join(unread)} beside {used}; the quantization config "
                "and the weight files do not belong together",
                unread[0],
            )

    def wrong_shape(self, suffix: str, expected: str) -> CheckpointError:
        """An error about the shape of a tensor; `expected` in words."""
        found = list(self.info(suffix).shape)
        return self.error(f"tensor {suffix} has shape {found}, expected {expected}", suffix)

    def error(self, message: str, suffix: str | None = None) -> CheckpointError:
        """A `CheckpointError` that begins with the file (of tensor `suffix`) and the module."""
        suffixes = [suffix] if suffix else sorted(self.suffixes)
        files = {self.checkpoint.tensors[f"{self.path}.{name}"].file for name in suffixes}
        where = ", ".join(sorted(files)) or "weight files"
        return CheckpointError(f"{self.checkpoint.folder}: {where}: {self.path}: {message}")

    def warn(self, message: str, *, once: bool = False) -> None:
        """Tell the user what is odd but no error; `once` for all modules with the same oddity."""
        where = "" if once else f"{self.path}: "
        self.checkpoint.warn(f"{self.checkpoint.folder}: {where}{message}")
