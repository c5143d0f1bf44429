"""What stands beside the codes: scales, zero points, group indices, input scales."""

import numpy as np
import numpy.typing as npt

from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.module_tensors import FLOATS, ModuleTensors

_SCALAR_SHAPES = ((), (1,), (1, 1))
_EXPONENTS = ("F8_E8M0", "U8")
_G_IDX = ("weight_g_idx", "g_idx")
_CHUNK = 1 << 20  # elements looked at together: what is checked may be larger than memory


def check_columns_divide(
    tensors: ModuleTensors, shape: tuple[int, int], scheme: QuantScheme
) -> None:
    """Raise unless the groups of weights, and those of activations, divide K evenly."""
    k = shape[1]
    activations = scheme.activations
    for what, size in (
        ("weights", scheme.group_size),
        ("activations", activations.group_size if activations else None),
    ):
        if size and k % size:
            raise tensors.error(
                f"K={k} is not divisible by the group size {size} of the {what}; "
                "requantize with a group size that divides it"
            )


def read_scales(
    tensors: ModuleTensors,
    suffix: str,
    shape: tuple[int, int],
    scheme: QuantScheme,
    dtypes: tuple[str, ...] = FLOATS,
) -> np.ndarray:
    """One number per block of the weight `[N, K]`, as the 2-D grid of a `QTensor`.

    Accepts what exporters write: `[]`, `[1]` or `[1, 1]` per tensor, `[N]` or `[N, 1]` per channel,
    else exactly `scheme.scale_shape(shape)`. Dtypes "F8_E8M0" and "U8" are exponents: `2^(e-127)`.
    """
    grid = scheme.scale_shape(shape)
    found = tuple(tensors.info(suffix).shape)
    expected = {"tensor": _SCALAR_SHAPES, "channel": (grid, grid[:1])}.get(scheme.strategy, (grid,))
    if found not in expected:
        text = " or ".join(str(list(spelling)) for spelling in expected)
        if scheme.strategy == "group":
            text += f" ({grid[1]} groups of {scheme.group_size} along K={shape[1]})"
        raise tensors.wrong_shape(suffix, text)
    stored = tensors.read(suffix, dtypes=dtypes)
    if tensors.info(suffix).dtype in _EXPONENTS:
        stored = _powers_of_two(tensors, suffix, stored)
    return stored.reshape(grid)


def _powers_of_two(tensors: ModuleTensors, suffix: str, stored: np.ndarray) -> np.ndarray:
    exponents = stored.view(np.uint8)
    bad = exponents == 255
    if bad.any():
        first = [int(i) for i in np.argwhere(bad)[0]]
        raise tensors.error(
            f"tensor {suffix} has {int(bad.sum())} NaN exponents (255), the first at {first}",
            suffix,
        )
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def read_scalar(tensors: ModuleTensors, suffix: str, dtypes: tuple[str, ...]) -> np.ndarray:
    """A tensor with one element, stored as `[]`, `[1]` or `[1, 1]`, as `[]`."""
    if tuple(tensors.info(suffix).shape) not in _SCALAR_SHAPES:
        raise tensors.wrong_shape(suffix, "a single value, [] or [1]")
    return tensors.read(suffix, dtypes=dtypes).reshape(())


def read_static_input(
    tensors: ModuleTensors, scheme: QuantScheme, scale: str, zero: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`input_scale` (float32 `[]`) and `input_zero` (int8 `[]`) of a `QTensor`, where calibrated.

    A zero point beside symmetric activations is accepted if it is zero, and left out.
    """
    activations = scheme.activations
    if activations is None or activations.dynamic:
        return None, None
    input_scale = read_scalar(tensors, scale, FLOATS).astype(np.float32)
    if activations.symmetric:
        accept_zero(tensors, zero)
        return input_scale, None
    return input_scale, read_scalar(tensors, zero, ("I8",))


def accept_zero(tensors: ModuleTensors, suffix: str) -> None:
    """Account for zero points that a symmetric scheme stores all the same; they must be zero."""
    if suffix in tensors:
        refuse_nonzero(tensors, suffix, tensors.read(suffix, dtypes=("I8", "F8_E4M3")))


def refuse_nonzero(tensors: ModuleTensors, suffix: str, zeros: np.ndarray) -> None:
    """Raise if a symmetric scheme has zero points that are not zero."""
    if (zeros != 0).any():
        raise tensors.error(
            f"tensor {suffix} is not all zero, but the config says symmetric", suffix
        )


def write_static_input(weight: QTensor) -> dict[str, np.ndarray]:
    """The inverse of `read_static_input`, `[1]` each, in the dtype of the weight's scales."""
    arrays: dict[str, np.ndarray] = {}
    if weight.input_scale is not None:
        scale = np.asarray(weight.input_scale).reshape(1)
        arrays["input_scale"] = narrowed(scale, weight.scales.dtype)
    if weight.input_zero is not None:
        arrays["input_zero_point"] = np.asarray(weight.input_zero).reshape(1)
    return arrays


def narrowed(scales: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """The scales in a float type where that changes no value, else as they are."""
    with np.errstate(over="ignore"):
        narrow = scales.astype(dtype)
    exact = np.array_equal(narrow.astype(np.float32), scales.astype(np.float32))
    return narrow if exact else scales


def read_g_idx(
    tensors: ModuleTensors, suffix: str, shape: tuple[int, int], spec: LinearSpec
) -> np.ndarray | None:
    """The group of every column, int32 `[K]`; None when it is simply `k // group_size`.

    Raises:
        CheckpointError: missing although the config says activation order, or a group that does
            not exist.
    """
    if suffix not in tensors and not spec.act_order:
        return None
    _, k = shape
    g_idx = tensors.read(suffix, dtypes=("I32",), shape=(k,))
    groups, size = spec.scheme.scale_shape(shape)[1], spec.scheme.scale_block(shape)[1]
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        first = int(outside.argmax())
        raise tensors.error(
            f"tensor {suffix} puts column {first} in group {g_idx[first]}, but there are "
            f"{groups} groups",
            suffix,
        )
    if np.array_equal(g_idx, np.arange(k) // size):
        return None
    if not spec.act_order:
        tensors.warn(
            f"{suffix} reorders columns although the config says no activation order; it is used",
            once=True,
        )
    return g_idx


def stored_g_idx(checkpoint: Checkpoint, path: str) -> str | None:
    """The name under which a Linear has an index of its columns' groups, if it has one."""
    return next((suffix for suffix in _G_IDX if f"{path}.{suffix}" in checkpoint.tensors), None)


def is_reordered(
    checkpoint: Checkpoint, path: str, scheme: QuantScheme, shape: tuple[int, ...]
) -> bool:
    """Whether a stored index puts the columns of a Linear in other groups than their own."""
    suffix = stored_g_idx(checkpoint, path)
    if suffix is None or scheme.group_size is None:
        return False
    g_idx = checkpoint.read(f"{path}.{suffix}")
    initialised = (g_idx >= 0).all()  # compressed-tensors: -1 where no order was found
    return bool(initialised) and not np.array_equal(g_idx, np.arange(shape[1]) // scheme.group_size)


def refuse_nan(tensors: ModuleTensors, suffix: str, codes: np.ndarray) -> None:
    """Raise if float8_e4m3fn codes contain NaN, which no quantizer means."""
    octets = codes.reshape(-1).view(np.uint8)
    first, count = -1, 0
    for start in range(0, octets.size, _CHUNK):
        bad = (octets[start : start + _CHUNK] & np.uint8(0x7F)) == 0x7F
        if bad.any():
            first = start + int(bad.argmax()) if first < 0 else first
            count += int(bad.sum())
    if count:
        where = [int(i) for i in np.unravel_index(first, codes.shape)]
        raise tensors.error(f"tensor {suffix} has {count} NaN values, the first at {where}", suffix)
