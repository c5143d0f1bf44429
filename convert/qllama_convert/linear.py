"""Reading one Linear of a checkpoint, whatever its format, and checking what came out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.parallel.sharding import Part, shard_bias, shard_weight
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import (
    LinearSpec,
    awq,
    fbgemm_fp8,
    fp8,
    gptq,
    mxfp4_pack_quantized,
    naive_quantized,
    native,
    nvfp4_pack_quantized,
    pack_quantized,
    plain,
)
from qllama_convert.kv_scales import SUFFIXES_IN_LINEARS
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import EMBED_TOKENS, has_bias
from qllama_convert.quantization_config import Quantization

_READERS: dict[str, Callable[[ModuleTensors, tuple[int, int], LinearSpec], QTensor]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fbgemm_fp8.read,
    "pack-quantized": pack_quantized.read,
    "int-quantized": naive_quantized.read,
    "float-quantized": naive_quantized.read,
    "naive-quantized": naive_quantized.read,
    "nvfp4-pack-quantized": nvfp4_pack_quantized.read,
    "mxfp4-pack-quantized": mxfp4_pack_quantized.read,
}
_WRITERS: dict[str, Callable[[QTensor], dict[str, np.ndarray]]] = {
    "gptq": gptq.write,
    "fp8": fp8.write,
    "pack-quantized": pack_quantized.write,
    "int-quantized": naive_quantized.write,
    "float-quantized": naive_quantized.write,
    "naive-quantized": naive_quantized.write,
    "native": native.write,
}
"""The formats that are written, see `qllama_convert.export_config` for which scheme goes where."""

# The bound of unquantized weights, for codes of eight bits.
_SCALE_LIMIT = 65536 / 2**8


@dataclass(frozen=True)
class LinearWeights:
    """The weights of one Linear, on the host."""

    weight: np.ndarray | QTensor  # float [N, K] as stored, or quantized and validated
    bias: np.ndarray | None  # [N], float as stored


class StoredLinear:
    """One Linear of an open checkpoint: parts of it are read, and checked, as they are asked for.

    Formats whose bytes have to be rearranged are read at once, and parts are taken from that.

    Attributes:
        weight: `[N, K]`; a `QTensor`, or a float array, or what stands for one that is not read.
        bias: float `[N]` as stored, or None.
    """

    def __init__(
        self, tensors: ModuleTensors, weight: Any, bias: np.ndarray | None, *, checked: bool
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._tensors = tensors
        self._checked = checked

    @property
    def scheme(self) -> QuantScheme | None:
        """None: not quantized."""
        return self.weight.scheme if isinstance(self.weight, QTensor) else None

    def read(self, part: Part | None = None) -> LinearWeights:
        """The Linear, or the weight of `part` with the bias of its rows.

        Views on the file where stored bytes and `part` allow it.

        Raises:
            CheckpointError: values that no quantizer writes, or damaged files.
        """
        weight, bias = self.weight, self.bias
        if part is not None:
            weight = shard_weight(weight, part)
            bias = None if bias is None else shard_bias(bias, part)
        if self._checked:
            return LinearWeights(weight, bias)
        weight = jax.tree.map(np.asarray, weight)
        try:
            self._check(weight)
        except CheckpointError as error:
            if part is None or part.shape == tuple(self.weight.shape):
                raise
            (first, last), (left, right) = (
                (span.start, span.stop - 1) for span in (part.rows, part.columns)
            )
            raise CheckpointError(
                f"{error} (in the part of rows {first} to {last} and columns {left} to {right}, "
                "where places are counted)"
            ) from error
        return LinearWeights(weight, bias)

    def _check(self, weight: np.ndarray | QTensor) -> None:
        if isinstance(weight, QTensor):
            native.check(self._tensors, weight)
            _check(self._tensors, weight)
        else:
            self._tensors.check_floats("weight", weight)


def open_embedding(checkpoint: Checkpoint, shape: tuple[int, int]) -> StoredLinear:
    """The embedding `[V, D] = shape`, of which nothing is read yet.

    Raises:
        CheckpointError: missing, no float type, or another shape.
    """
    tensors = ModuleTensors(checkpoint, EMBED_TOKENS)
    weight = tensors.view("weight", dtypes=FLOATS, shape=shape)
    return StoredLinear(tensors, weight, None, checked=False)


def read_linear(
    checkpoint: Checkpoint, quantization: Quantization | None, path: str, shape: tuple[int, int]
) -> LinearWeights:
    """Read the Linear at module `path` with weight `[N, K] = shape`.

    Where the stored bytes are what a `QTensor` holds, they stay views on the file.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong dtype or shape, holds values
            that no quantizer writes, or contradicts the config.
    """
    return open_linear(checkpoint, quantization, path, shape).read()


def open_linear(
    checkpoint: Checkpoint, quantization: Quantization | None, path: str, shape: tuple[int, int]
) -> StoredLinear:
    """As `read_linear`, for parts to be read one by one.

    Raises:
        CheckpointError: as `read_linear`; for a plain or a native weight, whatever its values tell
            is for `StoredLinear.read` to raise.
    """
    tensors = ModuleTensors(checkpoint, path)
    spec = quantization.linear(path) if quantization else None
    weight: Any
    if spec is None:
        weight = plain.view(tensors, shape)
    else:
        _refuse_float_weight(tensors)
        if spec.format == "native":
            weight = native.view(tensors, shape, spec)
        else:
            weight = _READERS[spec.format](tensors, shape, spec)
            _check(tensors, weight)
    bias = tensors.read_floats("bias", shape[:1]) if "bias" in tensors else None
    of_kv_cache = SUFFIXES_IN_LINEARS if path.endswith((".k_proj", ".v_proj")) else frozenset()
    tensors.refuse_unread(but=of_kv_cache)
    checked = spec is not None and spec.format != "native"
    return StoredLinear(tensors, weight, bias, checked=checked)


def check_bias(
    checkpoint: Checkpoint, llama: LlamaConfig, path: str, linear: LinearWeights | StoredLinear
) -> None:
    """Raise `CheckpointError` where config.json promises a bias and there is none."""
    if linear.bias is None and has_bias(llama, path):
        raise CheckpointError(
            f"{checkpoint.folder}: {path}.bias is missing, but config.json says that this Linear "
            "has a bias"
        )


def write_linear(
    path: str, linear: LinearWeights, format_name: str | None
) -> dict[str, np.ndarray]:
    """The tensors of one Linear by their full names; the inverse of `read_linear`.

    Args:
        path: of the module.
        linear: what it holds. A float weight is written as it is.
        format_name: of the quantized weight: "gptq", "fp8" or a format of compressed-tensors;
            None for a float weight.

    Raises:
        ValueError: a format that is not written, or one that cannot hold this weight.
    """
    if not isinstance(linear.weight, QTensor):
        arrays = plain.write(linear.weight)
    elif format_name in _WRITERS:
        arrays = _WRITERS[format_name](linear.weight)
    else:
        raise ValueError(
            f"format {format_name!r} is not written; formats that are: {', '.join(_WRITERS)}"
        )
    if linear.bias is not None:
        arrays = arrays | {"bias": linear.bias}
    return {f"{path}.{suffix}": array for suffix, array in arrays.items()}


def _refuse_float_weight(tensors: ModuleTensors) -> None:
    if "weight" not in tensors:
        return
    packed = [suffix for suffix in ("qweight", "weight_packed", "codes") if suffix in tensors]
    if packed:
        raise tensors.error(f"has both weight and {packed[0]}; which one counts is unclear")
    dtype = tensors.info("weight").dtype
    if dtype not in FLOATS:
        return
    scales = [suffix for suffix in tensors.suffixes if "scale" in suffix]
    if scales:
        raise tensors.error(
            f"weight is {dtype} beside {', '.join(sorted(scales))}: this is not a compressed "
            "checkpoint but a simulation of one; save it compressed",
            "weight",
        )
    raise tensors.error(
        f"the config selects this Linear for quantization, but it has only a {dtype} weight; "
        "list it among the ignored modules if that is meant",
        "weight",
    )


def _check(tensors: ModuleTensors, weight: QTensor) -> None:
    try:
        weight.validate()
    except ValueError as error:
        raise tensors.error(str(error)) from error
    scales = np.asarray(weight.scales)
    if scales.max(initial=0) >= _SCALE_LIMIT:
        place = np.unravel_index(int(scales.argmax()), scales.shape)
        raise tensors.error(
            f"the scale at {[int(i) for i in place]} is {float(scales.max()):g}, {_SCALE_LIMIT:g} "
            "or more, which makes weights that overflow: the file is damaged, download it again"
        )
    empty = scales == 0
    if not empty.any():
        return
    # With a scale of 1 where it is 0, and of 0 elsewhere, codes other than the zero point remain.
    lost = np.asarray(replace(weight, scales=empty.astype(np.float32)).dequantize()) != 0
    if lost.any():
        first = [int(i) for i in np.argwhere(lost)[0]]
        raise tensors.error(
            f"{int(empty.sum())} of {scales.size} scales are zero and lose the codes they belong "
            f"to, the first at {first}"
        )
    tensors.warn(f"{int(empty.sum())} of {scales.size} scales are zero; their weights are zero too")
