"""The Linears of decoder layers on the host: parts, sorted and stacked for a loader."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from qllama.config import LlamaConfig
from qllama.parallel.sharding import Part, group_order, part_of, rows_move, split_kind
from qllama.quantization.qtensor import QTensor, stack_rows
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.linear import LinearWeights, StoredLinear, check_bias, open_linear
from qllama_convert.names import GATE_UP, QKV, layer_path, linear_shapes
from qllama_convert.quantization_config import Quantization

_MLP = (*GATE_UP, "mlp.down_proj")
_GROUPS = (
    QKV,
    ("self_attn.o_proj",),
    _MLP,
)
"""The Linears of a decoder layer as they are read: together those that cannot be placed alone."""


def read_layers(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    quantization: Quantization | None,
    *,
    ranks: Sequence[int] = (0,),
    size: int = 1,
) -> Iterator[dict[str, LinearWeights]]:
    """The Linears of all decoder layers by path: of each q, k and v, then o, then the MLP's three;
    of each of these, the part of every one of `ranks` in turn.

    A part is read when it comes, without the rest where the format allows that. Parts of a Linear
    split by its inputs have the whole bias. The inner channels of an MLP, whose order is free, are
    sorted by the groups of the columns of `down_proj`, so that its parts have whole groups.

    Args:
        checkpoint: open.
        config: of the model.
        quantization: of the checkpoint.
        ranks: of the devices whose parts are wanted.
        size: over how many devices the model is split.

    Raises:
        CheckpointError: as `read_linear`, or a bias is missing.
    """
    for i in range(config.num_hidden_layers):
        for group in _GROUPS:
            paths = [f"{layer_path(i)}.{name}" for name in group]
            linears = {
                path: open_model_linear(checkpoint, config, quantization, path) for path in paths
            }
            order = _inner_order(linears) if size > 1 and group is _MLP else None
            for rank in ranks:
                parts = {
                    path: part_of_linear(config, path, linear, rank, size)
                    for path, linear in linears.items()
                }
                yield {
                    path: linear.read(_ordered(path, parts[path], order))
                    for path, linear in linears.items()
                }


def read_model_linear(
    checkpoint: Checkpoint, config: LlamaConfig, quantization: Quantization | None, path: str
) -> LinearWeights:
    """The Linear at module `path` of a model, which has a bias if its config says so.

    Raises:
        CheckpointError: as `read_linear` does, or the bias is missing.
    """
    return open_model_linear(checkpoint, config, quantization, path).read()


def open_model_linear(
    checkpoint: Checkpoint, config: LlamaConfig, quantization: Quantization | None, path: str
) -> StoredLinear:
    """As `read_model_linear`, for parts to be read one by one.

    Raises:
        CheckpointError: as `open_linear` does, or the bias is missing.
    """
    linear = open_linear(checkpoint, quantization, path, linear_shapes(config)[path])
    check_bias(checkpoint, config, path, linear)
    return linear


def part_of_linear(
    config: LlamaConfig, path: str, linear: StoredLinear, rank: int, size: int
) -> Part:
    """What device `rank` of `size` holds of the Linear at `path`, or of the embedding."""
    block = linear.scheme.block_size if linear.scheme is not None else None
    return part_of(config, path, linear.weight.shape, rank, size, block[0] if block else 1)


def _inner_order(linears: dict[str, StoredLinear]) -> np.ndarray | None:
    """The order of an MLP's inner channels; None: as they are, since `down_proj` has no `g_idx` or
    gate and up cannot follow it."""
    gate, up, down = (linear.weight for linear in linears.values())
    if not isinstance(down, QTensor) or not rows_move(gate) or not rows_move(up):
        return None
    return group_order(down)


def _ordered(path: str, part: Part, order: np.ndarray | None) -> Part:
    """`part` of one of the three Linears of an MLP whose inner channels are in this order."""
    if order is None:
        return part
    if split_kind(path) == "row":
        return replace(part, column_order=order)
    return replace(part, row_order=order)


def stack(linears: Sequence[LinearWeights]) -> LinearWeights | None:
    """The Linears as one, on the host, where that is exact; None where it is not."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) < len(linears):
        return None
    if len({bias.dtype for bias in biases}) > 1:
        return None
    bias = np.concatenate(biases) if biases else None
    quantized = [linear.weight for linear in linears if isinstance(linear.weight, QTensor)]
    if quantized:
        if len(quantized) < len(linears):
            return None
        stacked = stack_rows(quantized)
        return None if stacked is None else LinearWeights(stacked, bias)
    floats = [linear.weight for linear in linears if not isinstance(linear.weight, QTensor)]
    if len({weight.dtype for weight in floats}) > 1:
        return None
    return LinearWeights(np.concatenate(floats), bias)
