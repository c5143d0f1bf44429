"""Calibration sequences as batches of few shapes, and what the layers make of each of them.

Legend: B rows, T tokens, D hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_LENGTHS = 4  # batches have at most so many different lengths, each a program of its own


@dataclass(frozen=True)
class Batch:
    """Rows of about one length. Padding is at the right, where nothing attends to it."""

    tokens: np.ndarray  # int32 [B, T], 0 where padded
    lengths: jax.Array  # int32 [B], 0 for a row that is nothing but padding
    mask: jax.Array  # bool [B, T], True for tokens that count


def make_batches(sequences: Sequence[np.ndarray], tokens_per_batch: int) -> list[Batch]:
    """The sequences, short ones first, in batches of `tokens_per_batch` tokens or less.

    Args:
        sequences: int32 `[T_i]`, none empty.
        tokens_per_batch: padding included; a longer sequence is a batch by itself.
    """
    step = -(-max(map(len, sequences)) // _LENGTHS)
    classes: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        classes.setdefault(-(-len(sequence) // step), []).append(sequence)
    batches = []
    for _, members in sorted(classes.items()):
        length = max(map(len, members))
        count = -(-len(members) // max(1, tokens_per_batch // length))
        rows = -(-len(members) // count)
        batches += [
            _batch(members[start : start + rows], rows, length)
            for start in range(0, len(members), rows)
        ]
    return batches


def _batch(sequences: Sequence[np.ndarray], rows: int, length: int) -> Batch:
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    mask = np.arange(length) < lengths[:, None]
    return Batch(tokens, jnp.asarray(lengths), jnp.asarray(mask))


class Stream:
    """One array for each batch, on the device or in host memory.

    In host memory, the next array is sent while one is used, and results are fetched while the
    next is computed: read and write batches in order.
    """

    def __init__(self, count: int, *, on_device: bool) -> None:
        self._arrays: list[jax.Array | np.ndarray | None] = [None] * count
        self._on_device = on_device
        self._sent: tuple[int, jax.Array] | None = None
        self._fetching: int | None = None

    def __getitem__(self, i: int) -> jax.Array:
        if self._on_device:
            return jnp.asarray(self._arrays[i])
        current = self._sent[1] if self._sent and self._sent[0] == i else self._send(i)
        following = i + 1
        if following < len(self._arrays):
            self._sent = (following, self._send(following))
        return current

    def __setitem__(self, i: int, array: jax.Array) -> None:
        self._arrays[i] = array
        if self._on_device:
            return
        array.copy_to_host_async()
        self._settle()
        self._fetching = i

    def finish(self) -> None:
        """Wait until all arrays are where they belong."""
        self._settle()
        self._sent = None
        jax.block_until_ready([x for x in self._arrays if isinstance(x, jax.Array)])

    def _send(self, i: int) -> jax.Array:
        return jnp.asarray(self._arrays[i])

    def _settle(self) -> None:
        if self._fetching is not None:
            self._arrays[self._fetching] = np.asarray(self._arrays[self._fetching])
            self._fetching = None
