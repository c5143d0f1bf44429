"""The Linears of decoder layers on the host, read ahead, sorted and stacked for a loader."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np

from qllama.config import LlamaConfig
from qllama.parallel.sharding import in_group_order, take_rows
from qllama.quantization.qtensor import QTensor, stack_rows
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.linear import LinearWeights, check_bias, read_linear
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
    reorder: bool = False,
) -> Iterator[dict[str, LinearWeights]]:
    """The Linears of all decoder layers by path: of each q, k and v, then o, then the MLP's three.

    Args:
        checkpoint: open.
        config: of the model.
        quantization: of the checkpoint.
        reorder: sort the inner channels of an MLP, whose order is free, by the groups that the
            columns of `down_proj` are in, so that parts of it have whole groups.

    Raises:
        CheckpointError: as `read_linear`, or a bias is missing.
    """
    for i in range(config.num_hidden_layers):
        for group in _GROUPS:
            paths = [f"{layer_path(i)}.{name}" for name in group]
            linears = {
                path: read_model_linear(checkpoint, config, quantization, path) for path in paths
            }
            yield _reordered(linears) if reorder and group is _MLP else linears


def read_model_linear(
    checkpoint: Checkpoint, config: LlamaConfig, quantization: Quantization | None, path: str
) -> LinearWeights:
    """The Linear at module `path` of a model, which has a bias if its config says so.

    Raises:
        CheckpointError: as `read_linear` does, or the bias is missing.
    """
    linear = read_linear(checkpoint, quantization, path, linear_shapes(config)[path])
    check_bias(checkpoint, config, path, linear)
    return linear


def look_ahead[T](items: Iterator[T]) -> Generator[T]:
    """`items`, each made by a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, items, end)
            yield cast(T, item)


def _reordered(linears: dict[str, LinearWeights]) -> dict[str, LinearWeights]:
    """The Linears of an MLP, as they are where `down_proj` has no `g_idx` or gate and up cannot
    follow its order."""
    gate, up, down = linears
    weight = linears[down].weight
    found = in_group_order(weight) if isinstance(weight, QTensor) else None
    if found is None:
        return linears
    ordered, order = found
    gate_rows, up_rows = (_take_rows(linears[path], order) for path in (gate, up))
    if gate_rows is None or up_rows is None:
        return linears
    return {gate: gate_rows, up: up_rows, down: LinearWeights(ordered, linears[down].bias)}


def _take_rows(linear: LinearWeights, order: np.ndarray) -> LinearWeights | None:
    weight = take_rows(linear.weight, order)
    bias = None if linear.bias is None else linear.bias[order]
    return None if weight is None else LinearWeights(weight, bias)


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
