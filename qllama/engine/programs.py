"""The programs of a model that are compiled, and the device state they work on.

`prefill` reads a chunk of some prompts, `decode` runs several steps of all rows, `hidden` reads a
chunk of a text that nothing is to follow, `logits` takes that to the vocabulary. They are pure; of
those that run the model, the cache is what comes first of what they return.

Legend: B cache rows, P rows of a prefill, T tokens of a chunk, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qllama.engine.buckets import bucket
from qllama.engine.request import Request
from qllama.engine.sampler import (
    Penalties,
    SampleOutput,
    SamplingState,
    TokenLogprobs,
    Variant,
    sample,
    token_logprobs,
    variant_for,
)
from qllama.model.kv_cache import KVCache
from qllama.model.llama import Llama

PROMPT_LOGPROBS_BLOCK = 64  # positions whose logits exist at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """One sequence per cache row: where it stands and how it is sampled."""

    token: jax.Array  # int32 [B], the last token, not yet in the cache
    length: jax.Array  # int32 [B], tokens in the cache
    limit: jax.Array  # int32 [B], tokens the whole text may have
    sampling: SamplingState
    penalties: Penalties | None

    def ended(self) -> jax.Array:
        """bool `[B]`: the last token stops the text, or fills it."""
        stopped = (self.token[:, None] == self.sampling.stop_ids).any(axis=1)
        return stopped | (self.length + 1 >= self.limit)


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


def prefill(
    model: Llama, cache: KVCache, slots: Slots, chunk: Chunk, *, context: int, features: Features
) -> tuple[KVCache, Slots, SampleOutput, TokenLogprobs | None]:
    """Read a chunk, and draw the token after it; slots change where the chunk ends the prompt.

    Args:
        model: the weights.
        cache: of B rows.
        slots: of B rows.
        chunk: of P prompts.
        context: cache entries to attend to at most.
        features: see there.

    Returns:
        Cache, slots, what was drawn for each of the P rows, and the log probabilities of
        `chunk.targets`, each `[P, T, ...]`, if `features` asks for them.
    """
    rows, size = chunk.tokens.shape
    steps = jnp.arange(size)
    positions = jnp.where(steps < chunk.count[:, None], chunk.start + steps, cache.capacity)
    hidden, cache = model(
        chunk.tokens, positions, cache, rows=chunk.rows, lengths=chunk.length, context=context
    )
    last = hidden[jnp.arange(rows), chunk.count - 1]
    # Two rows at least: for one, XLA without Triton first writes the whole head out in float32.
    last = jnp.pad(last, ((0, max(2 - rows, 0)), (0, 0)))
    read = chunk.start + chunk.count  # tokens in the cache now
    output = sample(
        model.logits(last)[:rows],
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


def decode(
    model: Llama, cache: KVCache, slots: Slots, wanted: jax.Array, *, steps: int, features: Features
) -> tuple[KVCache, Slots, jax.Array, SampleOutput]:
    """`steps` steps of every row; one that ends computes on, and nothing of it is kept.

    Args:
        model: the weights.
        cache: of B rows.
        slots: of B rows.
        wanted: bool `[B]`, the rows that somebody waits for.
        steps: how many.
        features: see there.

    Returns:
        Cache, slots, bool `[steps, B]` whether the row was still running, and what was drawn,
        `[steps, B, ...]`.
    """

    def step(
        carry: tuple[KVCache, Slots], _: None
    ) -> tuple[tuple[KVCache, Slots], tuple[jax.Array, SampleOutput]]:
        cache, slots = carry
        alive = wanted & ~slots.ended()
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
        return (cache, slots), (alive, output)

    # A static trip count: a GPU runs it without asking the host.
    (cache, slots), (ran, output) = jax.lax.scan(step, (cache, slots), length=steps)
    return cache, slots, ran, output


def hidden(
    model: Llama, cache: KVCache, tokens: jax.Array, span: jax.Array, *, context: int
) -> tuple[KVCache, jax.Array]:
    """Final hidden states `[T, D]` of a chunk of one text.

    Args:
        model: the weights.
        cache: of one row.
        tokens: int32 `[1, T]`.
        span: int32 `[3]`: where the chunk starts, its tokens, those of the whole text.
        context: cache entries to attend to at most.
    """
    start, count, length = span
    steps = jnp.arange(tokens.shape[1])
    positions = jnp.where(steps < count, start + steps, cache.capacity)[None]
    hidden, cache = model(tokens, positions, cache, lengths=length[None], context=context)
    return cache, hidden[0]


def logits(model: Llama, hidden: jax.Array) -> tuple[None, jax.Array]:
    """float32 `[N, V]` of hidden states `[N, D]`, and no cache."""
    return None, model.logits(hidden)


@functools.partial(jax.jit, static_argnames=("rows", "vocab_size", "features", "over"))
def free_slots(rows: int, vocab_size: int, features: Features, over: NamedSharding) -> Slots:
    """Slots of `rows` rows that nobody has, lying as `over` says."""
    penalties = None
    if features.variant == "full":
        penalties = Penalties.neutral(rows, vocab_size, features.bad_words)
    token, length, limit = (jnp.zeros(rows, jnp.int32) for _ in range(3))
    sampling = SamplingState.neutral(rows, features.num_stop_ids)
    slots = Slots(token, length, limit, sampling, penalties)
    return jax.lax.with_sharding_constraint(slots, over)


def clear_row(cache: KVCache, row: jax.Array) -> KVCache:
    """The cache with row `row`, int32 `[]`, of zeros."""
    return jax.tree.map(lambda layer: layer.at[row].set(0), cache)


def set_rows(slots: Slots, rows: jax.Array, values: Slots) -> Slots:
    """The slots with those of `rows`, int32 `[P]`, replaced; a row of B or more is left out."""
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), slots, values)


def _take_rows(tree: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), tree)


def _bits_per_pass() -> int:
    """Of the sampler's threshold search: a GPU's passes cost launches, a CPU's cost work."""
    return 4 if jax.default_backend() == "gpu" else 1
