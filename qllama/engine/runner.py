"""The driver of a model's programs: it owns the weights, the key-value cache and the slots, turns
requests into arrays, and what comes back into tokens.

Weights are arguments of the programs, cache and slots are donated; each program is compiled once
per static shape and kept, by threads, so that decoding is compiled beside the prefill before it.
What they compute is in `qllama.engine.programs`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qllama_kernels.xla import WITHOUT_TRITON

from qllama.engine import programs
from qllama.engine.buckets import bucket
from qllama.engine.programs import Chunk, Features, Slots
from qllama.engine.request import Burst, Request, TopLogprobs
from qllama.engine.sampler import (
    Penalties,
    SampleOutput,
    SamplingState,
    TokenLogprobs,
    pack_bad_words,
    request_key,
)
from qllama.model.kv_cache import KVCache, grow_cache, init_cache
from qllama.model.llama import Llama
from qllama.parallel.mesh import make_mesh, replicated
from qllama.parallel.placement import cache_sharding, partition_specs

# Small sums over GPUs in one kernel of XLA's own, not NCCL's: 64 dependent psums of [1, 8192] took
# 20.7 us each in place of 25.3 on two H100s, of [64, 8192] 26.2 in place of 27.3 (jax 0.11.2).
ONE_SHOT_SUMS = {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": True}
_DECODE_DONATES = (1, 2)  # cache and slots, behind the weights


@dataclass(frozen=True)
class Flight:
    """A decode dispatch whose tokens have not been fetched."""

    requests: tuple[Request | None, ...]  # whose each row was
    ran: jax.Array  # bool [steps, B], whether the row was still running
    output: SampleOutput  # [steps, B, ...]


@dataclass(frozen=True)
class Reading:
    """A prefill dispatch of which nothing has been fetched."""

    requests: dict[int, Request]  # by row
    start: int  # of the chunk
    size: int
    output: SampleOutput  # [P, ...]
    prompt_logprobs: TokenLogprobs | None  # [P, size, ...]


class Runner:
    """Owns the weights, the cache and the slots. `reset` begins a run; rows are then filled by
    `admit` and `prefill`, whose tokens `fetch_first` brings, and advance together with `decode`,
    whose tokens `fetch` brings."""

    def __init__(
        self,
        model: Llama,
        *,
        cache_dtype: jnp.dtype | type,
        steps: int,
        mesh: Mesh | None = None,
        on_compile: Callable[[str], contextlib.AbstractContextManager[Any]] = (
            lambda name: contextlib.nullcontext()
        ),
    ) -> None:
        """
        Args:
            model: on its devices.
            cache_dtype: of the key-value cache.
            steps: decode steps in one dispatch.
            mesh: of one replica, the one the model was loaded onto; None: the first device. Over
                several devices every program runs inside one `shard_map`: each device with its own
                heads and cache, all of them with the same slots.
            on_compile: a context entered around the wait for each compilation, given the program's
                name.
        """
        self.mesh = make_mesh() if mesh is None else mesh
        self.cached = cache_sharding(self.mesh)
        self.config = model.config  # of what one device holds
        self.cache_dtype = cache_dtype
        self.steps = steps
        self.on_compile = on_compile
        self.graphdef, state = nnx.split(model)
        self.leaves, self.treedef = jax.tree.flatten(state)
        # float32 means float32: GPUs would otherwise multiply in TF32.
        wide = model.embed_tokens[...].dtype == jnp.float32
        self.precision = "highest" if wide else "default"
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.compiling: dict[tuple[Any, ...], Future[Any]] = {}  # not called yet
        self.compilers = ThreadPoolExecutor(2, thread_name_prefix="compile")
        self.features = Features()
        self.rows: list[Request | None] = []
        self.cache: KVCache | None = None
        self.slots: Slots | None = None

    # -- a run ---------------------------------------------------------------------------------

    def reset(self, rows: int, features: Features) -> None:
        """Forget all sequences; make `rows` free rows able to serve `features`."""
        self.features = features
        self.rows = [None] * rows
        if self.cache is not None and self.cache.rows != rows:
            self.cache = None
        self.slots = programs.free_slots(
            rows, self.config.vocab_size, features, replicated(self.mesh)
        )

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in every row."""
        if self.cache is None:
            self.cache = self._init_cache(len(self.rows), capacity)
        elif self.cache.capacity < capacity:
            self.cache = self._call(
                grow_cache, self.cache, donate=(), over=self.cached, capacity=capacity
            )

    def admit(self, requests: Mapping[int, Request]) -> None:
        """Give `requests` the free rows they are keyed by."""
        assert self.slots is not None
        settings = [self._settings(request) for request in requests.values()]
        padding = bucket(len(requests)) - len(requests)
        settings += settings[:1] * padding
        rows = np.array([*requests, *[len(self.rows)] * padding], np.int32)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *settings)
        self.slots = self._call(
            programs.set_rows, self.slots, rows, stacked, donate=(0,), over=replicated(self.mesh)
        )
        for row, request in requests.items():
            self.rows[row] = request

    def release(self, row: int, *, clear: bool = False) -> None:
        """Free a row; `clear` where NaN may lie in its cache: the next tenant must not meet it."""
        self.rows[row] = None
        if clear and self.cache is not None:
            row_id = np.int32(row)
            self.cache = self._call(
                programs.clear_row, self.cache, row_id, donate=(0,), over=self.cached
            )

    def prefill(self, rows: Sequence[int], start: int, size: int) -> Reading:
        """Start reading prompt tokens `start` to `start + size` of the requests in `rows`, and wait
        for nothing."""
        assert self.cache is not None
        padded = bucket(len(rows))
        tokens: Any = np.zeros((padded, size + 1), np.int32)
        count: Any = np.zeros(padded, np.int32)
        length: Any = np.zeros(padded, np.int32)
        row_ids: Any = np.array([*rows, *[len(self.rows)] * (padded - len(rows))], np.int32)
        begin: Any = np.int32(start)
        requests = {row: self._request(row) for row in rows}
        for i, request in enumerate(requests.values()):
            text = request.prompt[start : start + size + 1]
            tokens[i, : len(text)] = text
            count[i] = min(len(text), size)
            length[i] = len(request.prompt)
        chunk = Chunk(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            start=begin,
            count=count,
            length=length,
            rows=row_ids,
        )
        self.cache, self.slots, output, prompt_logprobs = self._call_model(
            programs.prefill,
            self.cache,
            self.slots,
            chunk,
            donate=(1, 2),
            context=bucket(start + size, largest=self.cache.capacity),
            features=self.features,
        )
        return Reading(requests, start, size, output, prompt_logprobs)

    def fetch_first(self, reading: Reading) -> Iterator[tuple[int, Request, Burst]]:
        """Wait for a prefill dispatch; yields row, request and first token of each prompt that ends
        in its chunk. Prompt log probabilities are appended to the requests."""
        stop = reading.start + reading.size
        ends = any(len(request.prompt) <= stop for request in reading.requests.values())
        if not ends and reading.prompt_logprobs is None:
            return
        output, prompt_logprobs = jax.device_get((reading.output, reading.prompt_logprobs))
        for i, (row, request) in enumerate(reading.requests.items()):
            length = len(request.prompt)
            if request.params.prompt_logprobs is not None:
                known = min(stop, length - 1) - reading.start
                request.prompt_logprobs += [
                    _at(prompt_logprobs, (i, t), request.params.prompt_logprobs)
                    for t in range(known)
                ]
            if length <= stop:
                yield row, request, _burst(request, output, [(i,)])

    def prepare_decode(self) -> None:
        """Begin to compile `decode` for the rows and the room there are, and wait for nothing."""
        program = self._with_leaves(programs.decode)
        arguments, static = self._decoding()
        arguments = (self.leaves, *arguments)
        key = _key(program, arguments, static)
        if key not in self.compiled:
            self._begin(key, program, arguments, _DECODE_DONATES, None, static)

    def decode(self) -> Flight:
        """Start `steps` steps of all occupied rows that are still running, and wait for nothing."""
        arguments, static = self._decoding()
        self.cache, self.slots, ran, output = self._call_model(
            programs.decode, *arguments, donate=_DECODE_DONATES, **static
        )
        return Flight(tuple(self.rows), ran, output)

    def fetch(self, flight: Flight) -> Iterator[tuple[int, Request, Burst]]:
        """Wait for a dispatch; yields row, request and tokens of all that have not ended since."""
        waiting = [
            (row, request)
            for row, request in enumerate(flight.requests)
            if request is not None and request.finish_reason is None
        ]
        if not waiting:
            return
        ran, output = jax.device_get((flight.ran, flight.output))
        for row, request in waiting:
            places = [(int(t), row) for t in np.flatnonzero(ran[:, row])]
            yield row, request, _burst(request, output, places)

    def hidden_states(self, tokens: np.ndarray, chunk: int) -> Iterator[jax.Array]:
        """What lm_head reads of one text, int32 `[T]`: `[chunk, D]` at a time, the last padded."""
        capacity = bucket(len(tokens), chunk)
        cache = self._init_cache(1, capacity)
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            padded = np.pad(piece, (0, chunk - len(piece)))[None]
            span = np.array([start, len(piece), len(tokens)], np.int32)
            context = bucket(start + chunk)
            cache, hidden = self._call_model(
                programs.hidden, cache, padded, span, donate=(1,), context=context
            )
            yield hidden

    def score(self, tokens: np.ndarray, chunk: int) -> np.ndarray:
        """float32 logits `[T, V]` of one text, int32 `[T]`, read `chunk` tokens at a time."""
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for i, hidden in enumerate(self.hidden_states(tokens, chunk)):
            rows = logits[i * chunk : (i + 1) * chunk]
            rows[:] = np.asarray(self.logits(hidden))[: len(rows)]
        return logits

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 `[N, V]` of hidden states `[N, D]`."""
        _, logits = self._call_model(programs.logits, hidden, donate=())
        return logits

    def without_layers(self) -> "Runner":
        """A runner that can do nothing but `logits`, and holds no other weights."""
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, self.leaves))
        head = type(model)(self.config, model.embed_tokens[...], [], model.norm, model.lm_head)
        return Runner(
            head,
            cache_dtype=self.cache_dtype,
            steps=1,
            mesh=self.mesh,
            on_compile=self.on_compile,
        )

    # -- details -------------------------------------------------------------------------------

    def _decoding(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `programs.decode` is called with: arrays and static values."""
        wanted = np.array([request is not None for request in self.rows])
        return (self.cache, self.slots, wanted), {"steps": self.steps, "features": self.features}

    def _request(self, row: int) -> Request:
        request = self.rows[row]
        assert request is not None
        return request

    def _settings(self, request: Request) -> Slots:
        """The slot of a request without the row axis, in host arrays."""
        params = request.params
        length = len(request.prompt)
        float32: Any = np.float32  # typed loosely: numpy stands in for jax arrays here
        int32: Any = np.int32
        stop_ids: Any = np.full(self.features.num_stop_ids, -1, np.int32)
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        key: Any = request_key(*request.seed)
        sampling = SamplingState(
            temperature=float32(params.temperature),
            top_k=int32(params.top_k),
            top_p=float32(params.top_p),
            min_p=float32(params.min_p),
            key=key,
            stop_ids=stop_ids,
            min_position=int32(length + params.min_tokens),
        )
        penalties = self._penalties(request) if self.features.variant == "full" else None
        limit = int32(length + request.max_tokens)
        return Slots(int32(0), int32(0), limit, sampling, penalties)

    def _penalties(self, request: Request) -> Penalties:
        params = request.params
        vocab_size = self.config.vocab_size
        words, longest = self.features.bad_words
        float32: Any = np.float32
        bias: Any = np.zeros(vocab_size, np.float32)
        for token, value in (params.logit_bias or {}).items():
            bias[token] = value
        in_prompt: Any = np.zeros(vocab_size, bool)
        in_prompt[request.prompt] = True
        count: Any = np.zeros(vocab_size, np.int32)
        bad_words: Any = pack_bad_words(request.bad_words, words, longest)
        last_tokens: Any = np.full(longest - 1, -1, np.int32)
        return Penalties(
            repetition=float32(params.repetition_penalty),
            frequency=float32(params.frequency_penalty),
            presence=float32(params.presence_penalty),
            bias=bias,
            in_prompt=in_prompt,
            count=count,
            bad_words=bad_words,
            last_tokens=last_tokens,
        )

    def _init_cache(self, rows: int, capacity: int) -> KVCache:
        return init_cache(
            self.config, rows, capacity, self.cache_dtype, copies=self.mesh.size, over=self.cached
        )

    def _call_model(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`function(model, *arguments)`, the weights an argument of the compiled program.

        It returns the cache first; what else it returns is the same on every device.
        """
        program = self._with_leaves(function)
        cache, others = self._call(program, self.leaves, *arguments, **options)
        return cache, *others

    def _with_leaves(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def with_leaves(leaves: list[jax.Array], *arguments: Any, **static: Any) -> Any:
            model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
            with jax.default_matmul_precision(self.precision):
                cache, *others = function(model, *arguments, **static)
            return cache, others

        with_leaves.__name__ = function.__name__
        return with_leaves

    def _call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        donate: tuple[int, ...],
        over: NamedSharding | None = None,
        **static: Any,
    ) -> Any:
        """`function(*arguments, **static)`, compiled once per shapes and static values.

        What it returns lies as `over` says; None: it is a program of the model.
        """
        key = _key(function, arguments, static)
        if key not in self.compiled:
            with self.on_compile(function.__name__):
                self._begin(key, function, arguments, donate, over, static)
                self.compiled[key] = self.compiling.pop(key).result()
        return self.compiled[key](*arguments)

    def _begin(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        donate: tuple[int, ...],
        over: NamedSharding | None,
        static: Mapping[str, Any],
    ) -> None:
        """Trace the program of `key`, and leave it to a thread to compile, unless one does."""
        if key not in self.compiling:
            jitted = self._jit(functools.partial(function, **static), arguments, donate, over)
            self.compiling[key] = self.compilers.submit(
                jitted.lower(*arguments).compile, compiler_options=self._options(function.__name__)
            )

    def _options(self, name: str) -> dict[str, bool] | None:
        """What XLA is told of a program: decoding has small sums, all else has long products."""
        devices = self.mesh.devices
        if devices.flat[0].platform != "gpu":
            return None
        if name == "decode":
            return ONE_SHOT_SUMS if devices.size > 1 else None
        return WITHOUT_TRITON

    def _jit(
        self,
        program: Callable[..., Any],
        arguments: tuple[Any, ...],
        donate: tuple[int, ...],
        over: NamedSharding | None,
    ) -> Any:
        if over is None and self.mesh.size > 1:
            program = jax.shard_map(
                program,
                mesh=self.mesh,
                in_specs=partition_specs(arguments),
                out_specs=(self.cached.spec, PartitionSpec()),
                check_vma=False,  # the kernels say nothing of how their results vary
            )
        return jax.jit(program, donate_argnums=donate, out_shardings=over)


def _key(
    function: Callable[..., Any], arguments: tuple[Any, ...], static: Mapping[str, Any]
) -> tuple[Any, ...]:
    """What a program is compiled for."""
    shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
    return function.__name__, shapes, *static.values()


def _burst(request: Request, output: SampleOutput, places: Sequence[tuple[int, ...]]) -> Burst:
    """The tokens of `request` at `places` of the arrays in `output`."""
    count = request.params.logprobs
    return Burst(
        tokens=[int(output.token[place]) for place in places],
        logprobs=[] if count is None else [_at(output.logprobs, place, count) for place in places],
        finite=all(bool(output.finite[place]) for place in places),
    )


def _at(logprobs: TokenLogprobs | None, place: tuple[int, ...], count: int) -> TopLogprobs:
    assert logprobs is not None
    return TopLogprobs(
        logprob=float(logprobs.logprob[place]),
        rank=int(logprobs.rank[place]),
        top_ids=tuple(logprobs.top_ids[place][:count].tolist()),
        top_logprobs=tuple(logprobs.top_logprobs[place][:count].tolist()),
    )
