"""Continuous batching over a fixed set of cache rows: who runs next, and in what shape.

Prefill and decode are separate dispatches. Waiting requests are prefilled into free rows as soon
as there are any; then all rows decode together, several steps a dispatch. A dispatch is followed by
the next before its tokens are looked at, so that the device does not wait for the host.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qllama.engine.buckets import bucket
from qllama.engine.programs import Features
from qllama.engine.request import Burst, Request
from qllama.engine.runner import Flight, Runner

SMALLEST_CHUNK = 16  # tokens: shorter prompts are padded to this
SMALLEST_CAPACITY = 128
CAPACITY_STEP = 8  # tokens that the attention kernel can move at a time


class Engine:
    """Runs requests on one `Runner`. Not thread-safe: one `run` at a time."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_cache_tokens: int,
    ) -> None:
        """
        Args:
            runner: the model and its compiled programs.
            max_model_len: tokens of the longest sequence, prompt and output.
            max_num_seqs: sequences decoded together at most.
            max_num_batched_tokens: tokens of one prefill dispatch at most.
            max_cache_tokens: rows x capacity of the key-value cache at most; at least
                `max_model_len`.
        """
        self.runner = runner
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_cache_tokens = max_cache_tokens

    def run(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Yield each request whenever it has new tokens, until all have finished.

        Abandoning the iterator abandons the requests.
        """
        if not requests:
            return
        waiting = deque(requests)
        runner = self.runner
        runner.reset(self._row_count(requests), Features.of(requests))
        flight: Flight | None = None
        while waiting or flight or any(runner.rows):
            if admitted := self._admit(waiting):
                more = bool(waiting) and None in runner.rows  # before anything is decoded
                yield from self._prefill(admitted, decode_follows=not more)
                continue
            following = self._decode(flight)
            if flight is not None:
                yield from self._deliver(runner.fetch(flight))
            flight = following

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """float32 logits `[T, V]` of every position of one text, int32 `[T]`."""
        return self.runner.score(tokens, self._scoring_chunk(tokens))

    def hidden_states(self, tokens: np.ndarray) -> jax.Array:
        """What lm_head reads of one text, int32 `[T]`: `[T, D]`."""
        chunks = self.runner.hidden_states(tokens, self._scoring_chunk(tokens))
        return jnp.concatenate(list(chunks))[: len(tokens)]

    def _scoring_chunk(self, tokens: np.ndarray) -> int:
        return bucket(len(tokens), SMALLEST_CHUNK, largest=self.max_num_batched_tokens)

    def _row_count(self, requests: Sequence[Request]) -> int:
        """As many rows as there is memory for, should all grow as long as the longest may."""
        longest = max(request.total_tokens for request in requests)
        room = self.max_cache_tokens // self._capacity(longest)
        count = bucket(min(len(requests), self.max_num_seqs), largest=self.max_num_seqs)
        while count > max(room, 1):
            count //= 2
        return max(count, 1)

    def _admit(self, waiting: deque[Request]) -> dict[int, Request]:
        """Give free rows to the first of `waiting` whose prompts fit one dispatch together."""
        free = [row for row, request in enumerate(self.runner.rows) if request is None]
        admitted: dict[int, Request] = {}
        while waiting and free:
            group = [*admitted.values(), waiting[0]]
            if admitted and bucket(len(group)) * self._chunk(group) > self.max_num_batched_tokens:
                break
            admitted[free.pop(0)] = waiting.popleft()
        if admitted:
            for request in admitted.values():
                request.scheduled = time.monotonic()
            self.runner.admit(admitted)
        return admitted

    def _chunk(self, requests: Iterable[Request]) -> int:
        """Tokens to read at once of each of these prompts."""
        longest = max(len(request.prompt) for request in requests)
        return bucket(longest, SMALLEST_CHUNK, largest=self.max_num_batched_tokens)

    def _prefill(self, admitted: dict[int, Request], *, decode_follows: bool) -> Iterator[Request]:
        runner, chunk = self.runner, self._chunk(admitted.values())
        self._reserve()
        if decode_follows and any(request.max_tokens > 1 for request in admitted.values()):
            runner.prepare_decode()
        longest = max(len(request.prompt) for request in admitted.values())
        readings = (
            runner.prefill(
                [row for row, r in admitted.items() if len(r.prompt) > start], start, chunk
            )
            for start in range(0, longest, chunk)
        )
        for reading in _one_behind(readings):
            yield from self._deliver(runner.fetch_first(reading))

    def _decode(self, flight: Flight | None) -> Flight | None:
        """Start the next dispatch behind `flight`, unless every request will have ended by then."""
        steps = self.runner.steps
        flying = flight.requests if flight is not None else ()
        for request in self.runner.rows:
            if request is not None:
                expected = len(request.output) + steps * (request in flying)
                if expected < request.max_tokens:
                    self._reserve()
                    return self.runner.decode()
        return None

    def _reserve(self) -> None:
        """Room in the cache for every text and the next two decode dispatches, as far as it may go
        on. So before it is read too: prefill is compiled for the room there is, and would be again.
        """
        ahead = 2 * self.runner.steps
        needs = [
            min(len(request.prompt) + max(len(request.output), 1) + ahead, request.total_tokens)
            for request in self.runner.rows
            if request is not None
        ]
        self.runner.reserve(self._capacity(max(needs)))

    def _capacity(self, tokens: int) -> int:
        capacity = bucket(tokens, SMALLEST_CAPACITY, largest=self.max_model_len)
        return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP

    def _deliver(self, bursts: Iterable[tuple[int, Request, Burst]]) -> Iterator[Request]:
        """Hand each request what it got, and free the rows of those that ended."""
        for row, request, burst in bursts:
            request.receive(burst)
            if request.finish_reason is not None:
                self.runner.release(row, clear=request.finish_reason == "error")
            yield request


def _one_behind[T](items: Iterator[T]) -> Iterator[T]:
    """Each of `items` when the next has been made."""
    last = next(items)
    for item in items:
        yield last
        last = item
    yield last
