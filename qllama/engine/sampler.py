"""From logits to tokens, on the device: penalties, filters, the draw, log probabilities.

Everything is row by row and in float32; a row's token is a function of its own logits, parameters
and key alone. No sort and no data-dependent control flow, so nothing here makes a GPU wait for the
host. The order of the steps is vLLM's (`vllm/v1/sample/sampler.py`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qllama.engine.sampling_params import SamplingParams

Variant = Literal["greedy", "sample", "full"]

# `lax.top_k` is one kernel on a GPU up to this k, and a sort of the vocabulary above it.
_TOP_K_KERNEL = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """What every variant needs to know of each row."""

    temperature: jax.Array  # float32 [B]; 0 is greedy
    top_k: jax.Array  # int32 [B]; 0 is off
    top_p: jax.Array  # float32 [B]; 1 is off
    min_p: jax.Array  # float32 [B]; 0 is off
    key: jax.Array  # uint32 [B, 2], see `request_key`
    stop_ids: jax.Array  # int32 [B, S], padded with -1: barred below `min_position`
    min_position: jax.Array  # int32 [B]: prompt length + min_tokens

    @classmethod
    def neutral(cls, rows: int, num_stop_ids: int = 8) -> Self:
        """Rows that are greedy and restrict nothing."""
        return cls(
            temperature=jnp.zeros(rows, jnp.float32),
            top_k=jnp.zeros(rows, jnp.int32),
            top_p=jnp.ones(rows, jnp.float32),
            min_p=jnp.zeros(rows, jnp.float32),
            key=jnp.zeros((rows, 2), jnp.uint32),
            stop_ids=jnp.full((rows, num_stop_ids), -1, jnp.int32),
            min_position=jnp.zeros(rows, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What only the variant "full" needs; `count` and `last_tokens` advance with the output."""

    repetition: jax.Array  # float32 [B]; 1 is off
    frequency: jax.Array  # float32 [B]; 0 is off
    presence: jax.Array  # float32 [B]; 0 is off
    bias: jax.Array  # float32 [B, V]
    in_prompt: jax.Array  # bool [B, V]
    count: jax.Array  # int32 [B, V]: how often each token is in the output
    bad_words: jax.Array  # int32 [B, W, L]: token sequences, padded with -1 on the left
    last_tokens: jax.Array  # int32 [B, L - 1]: end of the output, padded with -1 on the left

    @classmethod
    def neutral(cls, rows: int, vocab_size: int, bad_words: tuple[int, int] = (32, 8)) -> Self:
        """Rows that change no logit; `bad_words` is (W, L)."""
        return cls(
            repetition=jnp.ones(rows, jnp.float32),
            frequency=jnp.zeros(rows, jnp.float32),
            presence=jnp.zeros(rows, jnp.float32),
            bias=jnp.zeros((rows, vocab_size), jnp.float32),
            in_prompt=jnp.zeros((rows, vocab_size), bool),
            count=jnp.zeros((rows, vocab_size), jnp.int32),
            bad_words=jnp.full((rows, *bad_words), -1, jnp.int32),
            last_tokens=jnp.full((rows, bad_words[1] - 1), -1, jnp.int32),
        )

    def update(self, token: jax.Array) -> Self:
        """These penalties after `token` int32 `[B]` joined the output; -1 leaves a row alone."""
        rows, ids = jnp.arange(token.shape[0]), _dropped_if_negative(token, self.count)
        count = self.count.at[rows, ids].add(1, mode="drop")
        shifted = jnp.concatenate([self.last_tokens, token[:, None]], axis=1)[:, 1:]
        last_tokens = jnp.where(token[:, None] < 0, self.last_tokens, shifted)
        return replace(self, count=count, last_tokens=last_tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities under the raw logits, before any penalty, filter or temperature."""

    logprob: jax.Array  # float32 [B], of the given token
    rank: jax.Array  # int32 [B], of the given token: 1 + number of larger logits
    top_ids: jax.Array  # int32 [B, n], most likely first
    top_logprobs: jax.Array  # float32 [B, n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SampleOutput:
    """The next tokens. Ties go to the lowest id."""

    token: jax.Array  # int32 [B]
    # bool [B]. False: a logit is NaN or +inf, or all are barred, and the token means nothing.
    finite: jax.Array
    logprobs: TokenLogprobs | None


def sample(
    logits: jax.Array,
    state: SamplingState,
    positions: jax.Array,
    penalties: Penalties | None = None,
    *,
    variant: Variant,
    num_logprobs: int | None = None,
    bits_per_pass: int = 1,
) -> SampleOutput:
    """Choose the next token of each row.

    Args:
        logits: float32 `[B, V]`.
        state: rows that need more than the variant does are served as if they did not.
        positions: int32 `[B]`, the new token's index in its whole text, prompt included. Together
            with the key it fixes the noise, so a token drawn again after a recompute is the same.
        penalties: of variant "full".
        variant: "greedy" honours `min_position` only, "sample" also temperature and filters, "full"
            also the penalties. Parameters that are off change no bit in the larger variants.
        num_logprobs: None for none, else how many of the most likely tokens to report.
        bits_per_pass: of the threshold search, a divisor of 32. Fewer passes against more work in
            each: 4 suits a GPU, where a pass costs launches, 1 a CPU.

    Raises:
        ValueError: `penalties` missing for "full" or given for another variant.
    """
    if variant not in get_args(Variant) or (variant == "full") != (penalties is not None):
        given = "without" if penalties is None else "with"
        raise ValueError(
            f"variant={variant!r} {given} penalties; 'full' goes with them, 'greedy' and 'sample' "
            "without"
        )
    # Keeps the model before it compiled alike in all variants, and so its logits the same.
    raw = lax.optimization_barrier(logits.astype(jnp.float32))
    logits = adjust_logits(raw, state, positions, penalties)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # An argmax finds NaN before any number, so the winner tells whether the row is sound.
    finite = jnp.isfinite(_pick(logits, token))
    if variant != "greedy":
        # The exponential form of Gumbel-max: the same draw with one logarithm instead of two.
        weights = filtered_weights(logits, state, bits_per_pass=bits_per_pass)
        noise = _exponential(state.key, positions, logits.shape[-1])
        drawn = jnp.argmax(weights / noise, axis=-1).astype(jnp.int32)
        token = jnp.where(state.temperature > 0, drawn, token)
    logprobs = None if num_logprobs is None else token_logprobs(raw, token, num_logprobs)
    return SampleOutput(token=token, finite=finite, logprobs=logprobs)


def adjust_logits(
    logits: jax.Array,
    state: SamplingState,
    positions: jax.Array,
    penalties: Penalties | None = None,
) -> jax.Array:
    """Logits `[B, V]` with bad words and early stop ids at -inf, bias added, repeats penalized."""
    if penalties is not None:
        logits = _bar(logits, _bad_word_ends(penalties))
    early = positions < state.min_position
    logits = _bar(logits, jnp.where(early[:, None], state.stop_ids, -1))
    if penalties is not None:
        logits = _penalize(logits + penalties.bias, penalties)
    return logits


def filtered_weights(
    logits: jax.Array, state: SamplingState, *, bits_per_pass: int = 1
) -> jax.Array:
    """Probabilities `[B, V]` relative to the most likely token after temperature and filters.

    The filters are min_p, then top_k, then top_p of what is left. What they drop weighs 0. Tokens
    that tie at a border are all kept. Rows with temperature 0 get those of temperature 1.
    """
    temperature = jnp.where(state.temperature > 0, state.temperature, 1.0)
    # Subtract first: at the maximum this is 0 however the compiler contracts it, and the weight 1.
    behind = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(behind / temperature[:, None])

    keep = weights >= state.min_p[:, None]
    bits = _ordered_bits(jnp.where(keep, logits, -jnp.inf))
    kth = _threshold(bits, jnp.ones_like(weights), state.top_k, bits_per_pass)
    # A filter that is off is left out by its parameter, not by a threshold that lets all pass:
    # rounded sums over a vocabulary miss their exact value.
    top_k_off = (state.top_k <= 0) | (state.top_k >= logits.shape[-1])
    keep &= top_k_off[:, None] | (bits >= kth[:, None])
    weights = jnp.where(keep, weights, 0.0)

    bits = lax.bitcast_convert_type(weights, jnp.uint32)  # in order, as no weight is negative
    mass = state.top_p * jnp.sum(weights, axis=-1)
    least = _threshold(bits, weights, mass, bits_per_pass)
    top_p_off = state.top_p >= 1
    return jnp.where(top_p_off[:, None] | (bits >= least[:, None]), weights, 0.0)


def token_logprobs(logits: jax.Array, token: jax.Array, n: int) -> TokenLogprobs:
    """Log probability and rank of `token` int32 `[B]`, and the `n` best, from logits `[B, V]`.

    Serves prompts too: row t then holds the logits after token t, and `token[t]` is token t + 1.
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = _pick(logits, token)
    top, top_ids = _top(logits, min(n, logits.shape[-1]))
    return TokenLogprobs(
        logprob=chosen - normalizer,
        rank=jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32) + 1,
        top_ids=top_ids,
        top_logprobs=top - normalizer[:, None],
    )


def variant_for(params: SamplingParams) -> Variant:
    """The cheapest variant that does all that `params` ask for."""
    if (
        params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
        or params.logit_bias
        or params.bad_words
    ):
        return "full"
    return "sample" if params.temperature > 0 else "greedy"


def request_key(*path: int) -> np.ndarray:
    """The threefry key, uint32 `[2]`, of one completion.

    `path` is (seed, sample index), or (engine's seed, request's ordinal, sample index) for a
    request without a seed: any integers. A hash, so that near-by seeds have unrelated keys and
    the host needs no device to know them.
    """
    text = "/".join(str(int(part)) for part in path)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4")


def pack_bad_words(sequences: Sequence[Sequence[int]], num: int, length: int) -> np.ndarray:
    """Token sequences as one row of `Penalties.bad_words`, int32 `[num, length]`.

    Raises:
        ValueError: they do not fit.
    """
    longest = max(map(len, sequences), default=0)
    if len(sequences) > num or longest > length:
        raise ValueError(
            f"bad_words are {len(sequences)} token sequences of up to {longest} tokens; "
            f"at most {num} of up to {length} tokens are possible"
        )
    table = np.full((num, length), -1, np.int32)
    for row, sequence in zip(table, sequences, strict=False):
        row[length - len(sequence) :] = sequence
    return table


def _bar(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """`logits` with -inf at `ids` int32 `[B, S]`; negative ids do nothing."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, _dropped_if_negative(ids, logits)].set(-jnp.inf, mode="drop")


def _dropped_if_negative(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Negative ids would count from the end; beyond the end a scatter drops them."""
    return jnp.where(ids < 0, table.shape[-1], ids)


def _bad_word_ends(penalties: Penalties) -> jax.Array:
    """The last token of each word that the output is one token short of, else -1: `[B, W]`."""
    words = penalties.bad_words
    beginning = words[:, :, :-1]
    matches = (beginning < 0) | (beginning == penalties.last_tokens[:, None, :])
    return jnp.where(jnp.all(matches, axis=-1), words[:, :, -1], -1)


def _penalize(logits: jax.Array, penalties: Penalties) -> jax.Array:
    in_output = penalties.count > 0
    repetition = penalties.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(penalties.in_prompt | in_output, repeated, logits)
    logits = logits - penalties.frequency[:, None] * penalties.count
    return logits - jnp.where(in_output, penalties.presence[:, None], 0.0)


def _exponential(key: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard exponential noise, float32 `[B, V]`: a function of key, position and token id."""

    def row(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.bits(key, (vocab_size,), jnp.uint32)

    # All 32 bits count near 0, where the winners of a draw come from. A float32 uniform on a grid
    # of 2^-23 would tie there, and cut the tail, in one draw of a hundred from a large vocabulary.
    uniform = (jax.vmap(row)(key, positions).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 in `x` do."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # one zero, not two
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _threshold(
    bits: jax.Array, weights: jax.Array, target: jax.Array, bits_per_pass: int
) -> jax.Array:
    """The largest t, uint32 `[B]`, with `sum(weights where bits >= t) >= target`.

    Found digit by digit from the top, in base 2^bits_per_pass. Sums of non-negative numbers in a
    fixed order cannot grow as t does, rounded or not, so the search is exact.
    """
    digits = jnp.arange(1, 2**bits_per_pass, dtype=jnp.uint32)

    def find_digit(i: jax.Array, t: jax.Array) -> jax.Array:
        shift = jnp.uint32(32) - jnp.uint32(bits_per_pass) * (i.astype(jnp.uint32) + 1)
        candidates = t[:, None] | (digits << shift)
        above = bits[:, None, :] >= candidates[:, :, None]  # fused into the sum
        total = jnp.sum(jnp.where(above, weights[:, None, :], 0.0), axis=-1)
        digit = jnp.sum(total >= target[:, None], axis=-1, dtype=jnp.uint32)
        return t | (digit << shift)

    start = jnp.zeros(bits.shape[0], jnp.uint32)
    return lax.fori_loop(0, 32 // bits_per_pass, find_digit, start)


def _pick(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]


def _top(logits: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """As `lax.top_k`, in pieces that stay clear of its sort on GPUs."""
    rows = jnp.arange(logits.shape[0])[:, None]
    values, ids = lax.top_k(logits, min(n, _TOP_K_KERNEL))
    for done in range(_TOP_K_KERNEL, n, _TOP_K_KERNEL):
        logits = logits.at[rows, ids].set(-jnp.inf)
        more, more_ids = lax.top_k(logits, min(n - done, _TOP_K_KERNEL))
        values = jnp.concatenate([values, more], axis=1)
        ids = jnp.concatenate([ids, more_ids], axis=1)
    return values, ids
