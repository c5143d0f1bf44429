"""What of a model each device holds, when the weights are split over several.

One table says how each module is split; from it follows the slice of every array of every scheme.
Slices are taken from what the checkpoint holds, on the host, before a weight is packed for a
kernel. The division is Megatron's (Shoeybi et al., 2019): layers that read the residual stream are
split by their outputs, layers that write to it by their inputs, so that only the latter have to be
summed over the devices.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme

Kind = Literal["column", "kv_heads", "row", "vocabulary", "replicated"]

SPLITS: tuple[tuple[str, Kind], ...] = (
    (r".*\.self_attn\.q_proj", "column"),  # whole heads, which follow each other
    (r".*\.self_attn\.[kv]_proj", "kv_heads"),  # likewise; repeated where there are too few
    (r".*\.self_attn\.o_proj", "row"),
    (r".*\.mlp\.(gate|up)_proj", "column"),
    (r".*\.mlp\.down_proj", "row"),
    (r"model\.embed_tokens|lm_head", "vocabulary"),
    (r".*norm", "replicated"),
)
"""Module path -> how its weight `[N, K]` is split: outputs (N), inputs (K), or not at all."""

VOCABULARY_ROWS = 64
"""The rows of a piece of the vocabulary are a multiple of this, which the kernels' tiles divide."""

LARGEST_SIZE = 8
"""Sizes to propose to a user go up to this: the devices of the usual host."""


@dataclass(frozen=True, eq=False)
class Part:
    """The rectangle of a weight `[N, K]` that one device holds. Rows from N on are zeros.

    It may be of the weight with its rows, or its columns, in another order: see `group_order`.
    """

    rows: slice
    columns: slice
    row_order: np.ndarray | None = None  # int [N]: the old places of the rows; needs `rows_move`
    column_order: np.ndarray | None = None  # int [K], likewise; a `group_order`

    @property
    def shape(self) -> tuple[int, int]:
        """`[N, K]` of the part."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def row_index(self) -> slice | np.ndarray:
        """Where its rows are in the weight."""
        return self.rows if self.row_order is None else self.row_order[self.rows]


def split_kind(path: str) -> Kind:
    """How the module at `path`, such as "model.layers.0.mlp.up_proj", is split."""
    for pattern, kind in SPLITS:
        if re.fullmatch(pattern, path):
            return kind
    raise ValueError(f"there is no rule for splitting {path}")


def local_config(config: LlamaConfig, size: int) -> LlamaConfig:
    """The config of the Llama that one of `size` devices runs. Vocabulary and width stay whole."""
    return replace(
        config,
        intermediate_size=config.intermediate_size // size,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=max(config.num_key_value_heads // size, 1),
    )


def kv_heads(config: LlamaConfig, rank: int, size: int) -> slice:
    """The key-value heads that the query heads of device `rank` of `size` read."""
    first = config.num_key_value_heads * rank // size
    return slice(first, first + max(config.num_key_value_heads // size, 1))


def part_of(
    config: LlamaConfig, path: str, shape: tuple[int, int], rank: int, size: int, rows: int = 1
) -> Part:
    """What device `rank` of `size` holds of the weight `[N, K] = shape` at `path`.

    `rows` that share a scale are kept together where a vocabulary is divided.
    """
    n, k = shape
    kind = split_kind(path)
    every = Part(slice(0, n), slice(0, k))
    if kind == "replicated" or size == 1:
        return every
    if kind == "row":
        return replace(every, columns=slice(rank * k // size, (rank + 1) * k // size))
    if kind == "column":
        return replace(every, rows=slice(rank * n // size, (rank + 1) * n // size))
    if kind == "kv_heads":
        heads = kv_heads(config, rank, size)
        return replace(
            every, rows=slice(heads.start * config.head_dim, heads.stop * config.head_dim)
        )
    step = math.lcm(VOCABULARY_ROWS, rows)
    piece = -(-n // (size * step)) * step
    return replace(every, rows=slice(rank * piece, (rank + 1) * piece))


def shard_weight[W: np.ndarray | QTensor](weight: W, part: Part) -> W:
    """`part` of a host weight: views where rows and columns allow it.

    Arrays that are not read yet are only indexed, if they can be; 4-bit codes in another order of
    columns are read, for their part.

    Columns that are in groups out of order (`g_idx`) are sliced as they lie, and the scales of all
    groups stay: `g_idx` goes on naming them. For groups in order only the part's own stay, hence
    `column_order`, where whoever makes the input can follow it.
    """
    if not isinstance(weight, QTensor):
        columns = part.columns if part.column_order is None else part.column_order[part.columns]
        return _rows(weight, part.row_index)[:, columns]
    rows, columns = _grid_index(weight, part)

    def of_grid(array: Any) -> Any:
        return None if array is None else _rows(array, rows)[:, columns]

    ordered = part.column_order is not None
    return replace(
        weight,
        codes=_columns_of_codes(_rows(weight.codes, part.row_index), part, weight.scheme.bits),
        scales=of_grid(weight.scales),
        zeros=of_grid(weight.zeros),
        g_idx=None if weight.g_idx is None or ordered else weight.g_idx[part.columns],
        shape=part.shape,
    )


def shard_bias(bias: np.ndarray, part: Part) -> np.ndarray:
    """The bias `[N]` of the rows of `part`."""
    return _rows(bias, part.row_index)


def shard_kv_scales(
    config: LlamaConfig, scales: np.ndarray | None, rank: int, size: int
) -> np.ndarray | None:
    """Of scales `[1, 1]` or `[num_key_value_heads, 1]`, those of the heads of device `rank`."""
    if scales is None or scales.shape[0] == 1:
        return scales
    return scales[kv_heads(config, rank, size)]


def group_order(weight: QTensor) -> np.ndarray | None:
    """The order of its columns in which a host weight needs no `g_idx`.

    Returns:
        Where each column is now, int64 `[K]`; None where there is no `g_idx`, or groups that are
        not full would not lie side by side.
    """
    k, group = weight.shape[1], weight.scheme.group_size
    if weight.g_idx is None or group is None:
        return None
    order = np.argsort(weight.g_idx, kind="stable")
    if (weight.g_idx[order] != np.arange(k) // group).any() or k % 2:
        return None
    return order


def rows_move(weight: np.ndarray | QTensor) -> bool:
    """Whether the rows can be in another order: not where blocks of them share scales."""
    return not isinstance(weight, QTensor) or weight.group_size[0] in (1, weight.shape[0])


def _columns_of_codes(codes: Any, part: Part, bits: int) -> Any:
    """The columns of `part` of codes that are rows of it already."""
    columns = part.columns
    if part.column_order is None:
        packed = 2 if bits == 4 else 1
        return codes[:, slice(columns.start // packed, -(-columns.stop // packed))]
    wanted = part.column_order[columns]
    if bits == 8:
        return codes[:, wanted]
    octets = np.asarray(codes[:, wanted // 2])
    nibbles = (octets >> (wanted % 2 * 4).astype(np.uint8)) & np.uint8(0xF)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))


def _grid_index(weight: QTensor, part: Part) -> tuple[slice | np.ndarray, slice]:
    """Which scales belong to `part`."""
    (rows, columns), (tall, wide) = weight.group_size, weight.scales.shape
    own = weight.g_idx is None or part.column_order is not None
    return (
        part.row_index
        if part.row_order is not None and tall > 1
        else _covering(part.rows, rows, tall),
        _covering(part.columns, columns, wide) if own else slice(0, wide),
    )


def _covering(span: slice, block: int, blocks: int) -> slice:
    """Of so many blocks, those that `span` reaches into."""
    return slice(0, 1) if blocks == 1 else slice(span.start // block, -(-span.stop // block))


def _rows(array: Any, rows: slice | np.ndarray) -> Any:
    """`array[rows]`, with zeros for the rows that there are not."""
    taken = array[rows]
    if isinstance(rows, np.ndarray) or rows.stop - rows.start == taken.shape[0]:
        return taken
    missing = rows.stop - rows.start - taken.shape[0]
    return np.concatenate([taken, np.zeros((missing, *taken.shape[1:]), taken.dtype)])


# -- what cannot be split -----------------------------------------------------------------------


def check_split(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, QuantScheme],
    size: int,
) -> None:
    """Raise `ValueError` if the model cannot be split over `size` devices.

    Args:
        config: of the model.
        shapes: path -> `[N, K]` of its Linears.
        schemes: path -> scheme of those that are quantized.
        size: tensor_parallel_size.
    """
    problem = next(_problems(config, shapes, schemes, size), None)
    if problem is None:
        return
    sizes = [
        str(other)
        for other in range(1, LARGEST_SIZE + 1)
        if next(_problems(config, shapes, schemes, other), None) is None
    ]
    listed = " or ".join(filter(None, [", ".join(sizes[:-1]), sizes[-1]]))
    raise ValueError(f"{problem}; use {listed}")


def _problems(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, QuantScheme],
    size: int,
) -> Iterator[str]:
    over = f"cannot be split over {size} devices"
    heads = config.num_key_value_heads
    if heads % size and size % heads:
        yield f"num_key_value_heads={heads} {over}"
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            yield f"{name}={getattr(config, name)} {over}"
    if size == 1:
        return
    for path, scheme in schemes.items():
        yield from _problems_of_linear(config, path, shapes[path], scheme, size)


def _problems_of_linear(
    config: LlamaConfig, path: str, shape: tuple[int, int], scheme: QuantScheme, size: int
) -> Iterator[str]:
    """A part's borders must be borders of what shares a scale, or a byte."""
    over = f"{path} cannot be split over {size} devices"
    n, k = shape
    rows, columns = scheme.scale_block(shape)
    match split_kind(path):
        case "row":
            if k % size:
                yield f"{over}: its K={k} does not divide"
                return
            acts = scheme.activations
            steps = {f"groups of {columns} columns": columns} if columns < k else {}
            if acts is not None and acts.group_size is not None:
                steps[f"input groups of {acts.group_size} columns"] = acts.group_size
            if scheme.bits == 4:
                steps["two codes in a byte"] = 2
            for what, step in steps.items():
                if k // size % step:
                    yield f"{over}: K={k} makes {k // size} columns each, but it has {what}"
        case "column" | "kv_heads":
            part = part_of(config, path, shape, 0, size)
            each = part.rows.stop - part.rows.start
            if 1 < rows < n and each % rows:
                yield f"{over}: N={n} makes {each} rows each, but it has blocks of {rows} rows"
        case _:
            return
