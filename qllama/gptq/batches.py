"""Calibration sequences as batches of few shapes, and what the layers make of each of them.

Legend: B rows, T tokens, D hidden_size.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

_LENGTHS = 4  # batches have at most so many different lengths, each a program of its own


@dataclass(frozen=True)
class Batch:
    """Rows of about one length. Padding is at the right, where nothing attends to it.

    All that is computed of a batch is computed on its device, where `lengths` and `mask` lie.
    """

    tokens: np.ndarray  # int32 [B, T], 0 where padded
    lengths: jax.Array  # int32 [B], 0 for a row that is nothing but padding
    mask: jax.Array  # bool [B, T], True for tokens that count
    device: jax.Device


def make_batches(
    sequences: Sequence[np.ndarray], tokens_per_batch: int, devices: Sequence[jax.Device]
) -> list[Batch]:
    """The sequences, short ones first, in batches of `tokens_per_batch` tokens or less.

    Args:
        sequences: int32 `[T_i]`, none empty.
        tokens_per_batch: padding included; a longer sequence is a batch by itself.
        devices: get one batch after another in turn.
    """
    step = -(-max(map(len, sequences)) // _LENGTHS)
    classes: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        classes.setdefault(-(-len(sequence) // step), []).append(sequence)
    batches: list[Batch] = []
    for _, members in sorted(classes.items()):
        length = max(map(len, members))
        count = -(-len(members) // max(1, tokens_per_batch // length))
        rows = -(-len(members) // count)
        for start in range(0, len(members), rows):
            device = devices[len(batches) % len(devices)]
            batches.append(_batch(members[start : start + rows], rows, length, device))
    return batches


def _batch(sequences: Sequence[np.ndarray], rows: int, length: int, device: jax.Device) -> Batch:
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    mask = np.arange(length) < lengths[:, None]
    on_device = partial(jax.device_put, device=device)
    return Batch(tokens, on_device(lengths), on_device(mask), device)


class Stream:
    """One array for each batch, on the device of the batch or in host memory.

    In host memory, the next array of every device is sent while one is used, and results are
    fetched while the next are computed: read and write batches in order.
    """

    def __init__(self, batches: Sequence[Batch], *, on_device: bool) -> None:
        self._devices = [batch.device for batch in batches]
        self._ahead = len(set(self._devices))  # so many are on their way, one for each device
        self._arrays: list[jax.Array | np.ndarray | None] = [None] * len(batches)
        self._on_device = on_device
        self._sent: dict[int, jax.Array] = {}
        self._fetching: deque[int] = deque()

    def __getitem__(self, i: int) -> jax.Array:
        if self._on_device:
            return self._send(i)
        current = self._sent.pop(i) if i in self._sent else self._send(i)
        for following in range(i + 1, min(i + 1 + self._ahead, len(self._arrays))):
            if following not in self._sent:
                self._sent[following] = self._send(following)
        return current

    def __setitem__(self, i: int, array: jax.Array) -> None:
        self._arrays[i] = array
        if self._on_device:
            return
        array.copy_to_host_async()
        self._settle(self._ahead - 1)
        self._fetching.append(i)

    def finish(self) -> None:
        """Wait until all arrays are where they belong."""
        self._settle(0)
        self._sent = {}
        jax.block_until_ready([x for x in self._arrays if isinstance(x, jax.Array)])

    def _send(self, i: int) -> jax.Array:
        return jax.device_put(self._arrays[i], self._devices[i])

    def _settle(self, left: int) -> None:
        """Have all but `left` arrays that are being fetched in host memory, the oldest first."""
        while len(self._fetching) > left:
            i = self._fetching.popleft()
            self._arrays[i] = np.asarray(self._arrays[i])
