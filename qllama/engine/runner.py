"""The compiled programs of a model and the device state they work on.

Four programs: `prefill` reads a chunk of some prompts, `decode` runs several steps of all rows,
`hidden` reads a chunk of a text that nothing is to follow, `logits` takes that to the vocabulary.
Weights are arguments, cache and slots are donated;
each program is compiled once per static shape and kept.

Legend: B cache rows, P rows of a prefill, T tokens of a chunk, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qllama.engine.buckets import bucket
from qllama.engine.request import Burst, Request, TopLogprobs
from qllama.engine.sampler import (
    Penalties,
    SampleOutput,
    SamplingState,
    TokenLogprobs,
    Variant,
    pack_bad_words,
    request_key,
    sample,
    token_logprobs,
    variant_for,
)
from qllama.model.kv_cache import KVCache, grow_cache, init_cache
from qllama.model.llama import Llama
from qllama.parallel.mesh import make_mesh, replicated
from qllama.parallel.placement import cache_sharding, partition_specs

PROMPT_LOGPROBS_BLOCK = 64  # positions whose logits exist at a time

# Small sums over GPUs in one kernel of XLA's own, not NCCL's: 64 dependent psums of [1, 8192] took
# 20.7 us each in place of 25.3 on two H100s, of [64, 8192] 26.2 in place of 27.3 (jax 0.11.2).
ONE_SHOT_SUMS = {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """One sequence per cache row: where it stands and how it is sampled."""

    token: jax.Array  # int32 [B], the last token, not yet in the cache
    length: jax.Array  # int32 [B], tokens in the cache
    limit: jax.Array  # int32 [B], tokens the whole text may have
    sampling: SamplingState
    penalties: Penalties | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """A piece of P prompts, all starting at position `start`."""

    tokens: jax.Array  # int32 [P, T]
    targets: jax.Array  # int32 [P, T], the prompt token after each
    start: jax.Array  # int32 []
    count: jax.Array  # int32 [P], tokens of the row in this chunk
    length: jax.Array  # int32 [P], tokens of the whole prompt
    rows: jax.Array  # int32 [P], its cache row; B for padding


@dataclass(frozen=True)
class Features:
    """What the programs of a run must be able to do; static, so part of what is compiled."""

    variant: Variant = "greedy"
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    num_stop_ids: int = 8
    # Words are two tokens long at least: with one, the tokens before their last would be an array
    # of no elements, at which XLA's compiler crashes in programs over several devices (jax 0.11.2).
    bad_words: tuple[int, int] = (1, 2)

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Features":
        """The least that serves all of `requests`."""
        variants = {variant_for(request.params) for request in requests}

        def most(name: str) -> int | None:
            counts = [getattr(request.params, name) for request in requests]
            return max((c for c in counts if c is not None), default=None)

        words = [word for request in requests for word in request.bad_words]
        return cls(
            variant=next(v for v in ("full", "sample", "greedy") if v in variants),
            num_logprobs=most("logprobs"),
            num_prompt_logprobs=most("prompt_logprobs"),
            num_stop_ids=bucket(max(len(r.stop_ids) for r in requests), smallest=8),
            bad_words=(
                bucket(max(len(request.bad_words) for request in requests)),
                bucket(max(map(len, words), default=1), smallest=2),
            ),
        )


class Runner:
    """Owns the weights, the cache and the slots. `reset` begins a run; rows are then filled by
    `admit` and `prefill`, and advance together with `decode`."""

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
            on_compile: a context entered around each compilation, given the program's name.
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
        self.programs: dict[tuple[Any, ...], Any] = {}
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
        self.slots = _free_slots(rows, self.config.vocab_size, features, replicated(self.mesh))

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
            _set_rows, self.slots, rows, stacked, donate=(0,), over=replicated(self.mesh)
        )
        for row, request in requests.items():
            self.rows[row] = request

    def release(self, row: int, *, clear: bool = False) -> None:
        """Free a row; `clear` where NaN may lie in its cache: the next tenant must not meet it."""
        self.rows[row] = None
        if clear and self.cache is not None:
            row_id = np.int32(row)
            self.cache = self._call(_clear_row, self.cache, row_id, donate=(0,), over=self.cached)

    def prefill(self, rows: Sequence[int], start: int, size: int) -> Iterator[tuple[int, Burst]]:
        """Read prompt tokens `start` to `start + size` of the requests in `rows`.

        Yields (row, first token) for each prompt that ends in the chunk. Prompt log probabilities
        are appended to the requests.
        """
        assert self.cache is not None
        padded = bucket(len(rows))
        tokens: Any = np.zeros((padded, size + 1), np.int32)
        count: Any = np.zeros(padded, np.int32)
        length: Any = np.zeros(padded, np.int32)
        row_ids: Any = np.array([*rows, *[len(self.rows)] * (padded - len(rows))], np.int32)
        begin: Any = np.int32(start)
        requests = [self._request(row) for row in rows]
        for i, request in enumerate(requests):
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
            _prefill,
            self.cache,
            self.slots,
            chunk,
            donate=(1, 2),
            context=bucket(start + size, largest=self.cache.capacity),
            features=self.features,
        )
        output, prompt_logprobs = jax.device_get((output, prompt_logprobs))
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            if request.params.prompt_logprobs is not None:
                known = min(count[i], length[i] - 1 - start)
                request.prompt_logprobs += [
                    _at(prompt_logprobs, (i, t), request.params.prompt_logprobs)
                    for t in range(known)
                ]
            if start + count[i] == length[i]:
                yield row, _burst(request, output, [(i,)])

    def decode(self) -> Iterator[tuple[int, Burst]]:
        """Run `steps` steps of all occupied rows; yields each row with what it got."""
        alive = np.array([request is not None for request in self.rows])
        self.cache, self.slots, ran, output = self._call_model(
            _decode,
            self.cache,
            self.slots,
            alive,
            donate=(1, 2),
            steps=self.steps,
            features=self.features,
        )
        ran, output = jax.device_get((ran, output))
        for row, request in enumerate(self.rows):
            if request is not None:
                places = [(int(t), row) for t in np.flatnonzero(ran[:, row])]
                yield row, _burst(request, output, places)

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
                _hidden, cache, padded, span, donate=(1,), context=context
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
        _, logits = self._call_model(_logits, hidden, donate=())
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
        name = function.__name__.strip("_")
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
        key = (name, shapes, *static.values())
        if key not in self.programs:
            jitted = self._jit(functools.partial(function, **static), arguments, donate, over)
            with self.on_compile(name):
                self.programs[key] = jitted.lower(*arguments).compile(
                    compiler_options=self._options(name)
                )
        return self.programs[key](*arguments)

    def _options(self, name: str) -> dict[str, bool] | None:
        """What XLA is told of a program: decoding sums little and often."""
        devices = self.mesh.devices
        sums = name == "decode" and devices.size > 1 and devices.flat[0].platform == "gpu"
        return ONE_SHOT_SUMS if sums else None

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


@functools.partial(jax.jit, static_argnames=("rows", "vocab_size", "features", "over"))
def _free_slots(rows: int, vocab_size: int, features: Features, over: NamedSharding) -> Slots:
    penalties = None
    if features.variant == "full":
        penalties = Penalties.neutral(rows, vocab_size, features.bad_words)
    token, length, limit = (jnp.zeros(rows, jnp.int32) for _ in range(3))
    sampling = SamplingState.neutral(rows, features.num_stop_ids)
    slots = Slots(token, length, limit, sampling, penalties)
    return jax.lax.with_sharding_constraint(slots, over)


def _clear_row(cache: KVCache, row: jax.Array) -> KVCache:
    return jax.tree.map(lambda layer: layer.at[row].set(0), cache)


def _set_rows(slots: Slots, rows: jax.Array, values: Slots) -> Slots:
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), slots, values)


def _take_rows(tree: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), tree)


def _prefill(
    model: Llama, cache: KVCache, slots: Slots, chunk: Chunk, *, context: int, features: Features
) -> tuple[KVCache, Slots, SampleOutput, TokenLogprobs | None]:
    rows, size = chunk.tokens.shape
    steps = jnp.arange(size)
    positions = jnp.where(steps < chunk.count[:, None], chunk.start + steps, cache.capacity)
    hidden, cache = model(
        chunk.tokens, positions, cache, rows=chunk.rows, lengths=chunk.length, context=context
    )
    last = hidden[jnp.arange(rows), chunk.count - 1]
    read = chunk.start + chunk.count  # tokens in the cache now
    output = sample(
        model.logits(last),
        _take_rows(slots.sampling, chunk.rows),
        read,
        _take_rows(slots.penalties, chunk.rows),
        variant=features.variant,
        num_logprobs=features.num_logprobs,
        bits_per_pass=_bits_per_pass(),
    )
    ended = jnp.where(read == chunk.length, chunk.rows, slots.token.shape[0])
    drawn = jnp.full_like(slots.token, -1).at[ended].set(output.token, mode="drop")
    slots = replace(
        slots,
        token=jnp.where(drawn < 0, slots.token, drawn),
        length=slots.length.at[chunk.rows].set(read, mode="drop"),
        penalties=None if slots.penalties is None else slots.penalties.update(drawn),
    )
    prompt_logprobs = None
    if features.num_prompt_logprobs is not None:
        prompt_logprobs = _prompt_logprobs(
            model, hidden, chunk.targets, features.num_prompt_logprobs
        )
    return cache, slots, output, prompt_logprobs


def _prompt_logprobs(
    model: Llama, hidden: jax.Array, targets: jax.Array, count: int
) -> TokenLogprobs:
    """Log probabilities of `targets [P, T]` after `hidden [P, T, D]`, a block of T at a time."""
    rows, size, width = hidden.shape
    block = min(size, PROMPT_LOGPROBS_BLOCK)

    def of_block(inputs: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        block_hidden, block_targets = inputs  # [P, block, D], [P, block]
        logits = model.logits(block_hidden).reshape(rows * block, -1)
        logprobs = token_logprobs(logits, block_targets.reshape(-1), count)
        return jax.tree.map(lambda leaf: leaf.reshape(rows, block, *leaf.shape[1:]), logprobs)

    blocks = (
        hidden.reshape(rows, size // block, block, width).swapaxes(0, 1),
        targets.reshape(rows, size // block, block).swapaxes(0, 1),
    )
    logprobs = jax.lax.map(of_block, blocks)  # [blocks, P, block, ...]
    return jax.tree.map(
        lambda leaf: leaf.swapaxes(0, 1).reshape(rows, size, *leaf.shape[3:]), logprobs
    )


def _decode(
    model: Llama, cache: KVCache, slots: Slots, alive: jax.Array, *, steps: int, features: Features
) -> tuple[KVCache, Slots, jax.Array, SampleOutput]:
    """`steps` steps of every row; a row that ends computes on, and nothing of it is kept."""

    def step(
        carry: tuple[KVCache, Slots, jax.Array], _: None
    ) -> tuple[tuple[KVCache, Slots, jax.Array], tuple[jax.Array, SampleOutput]]:
        cache, slots, alive = carry
        positions = jnp.where(alive, slots.length, cache.capacity)
        hidden, cache = model(
            slots.token[:, None], positions[:, None], cache, lengths=slots.length + 1
        )
        output = sample(
            model.logits(hidden[:, 0]),
            slots.sampling,
            slots.length + 1,
            slots.penalties,
            variant=features.variant,
            num_logprobs=features.num_logprobs,
            bits_per_pass=_bits_per_pass(),
        )
        drawn = jnp.where(alive, output.token, -1)
        slots = replace(
            slots,
            token=jnp.where(alive, drawn, slots.token),
            length=slots.length + alive,
            penalties=None if slots.penalties is None else slots.penalties.update(drawn),
        )
        stopped = (drawn[:, None] == slots.sampling.stop_ids).any(axis=1)
        full = slots.length + 1 >= slots.limit
        return (cache, slots, alive & ~stopped & ~full), (alive, output)

    # A static trip count: a GPU runs it without asking the host.
    (cache, slots, _), (ran, output) = jax.lax.scan(step, (cache, slots, alive), length=steps)
    return cache, slots, ran, output


def _hidden(
    model: Llama, cache: KVCache, tokens: jax.Array, span: jax.Array, *, context: int
) -> tuple[KVCache, jax.Array]:
    start, count, length = span
    steps = jnp.arange(tokens.shape[1])
    positions = jnp.where(steps < count, start + steps, cache.capacity)[None]
    hidden, cache = model(tokens, positions, cache, lengths=length[None], context=context)
    return cache, hidden[0]


def _logits(model: Llama, hidden: jax.Array) -> tuple[None, jax.Array]:
    return None, model.logits(hidden)


def _bits_per_pass() -> int:
    """Of the sampler's threshold search: a GPU's passes cost launches, a CPU's cost work."""
    return 4 if jax.default_backend() == "gpu" else 1


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
