"""The sampler against a NumPy transcription of vLLM's order of steps, with sorts, in float64."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qllama.engine.sampler import (
    Penalties,
    SamplingState,
    adjust_logits,
    filtered_weights,
    pack_bad_words,
    request_key,
    sample,
    token_logprobs,
    variant_for,
)
from qllama.engine.sampling_params import SamplingParams

LLAMA_3_VOCAB = 128256

weights_of = jax.jit(filtered_weights, static_argnames="bits_per_pass")
draw = jax.jit(sample, static_argnames=("variant", "num_logprobs", "bits_per_pass"))


def random_logits(rows, vocab_size, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab_size)).astype(np.float32)


def keys(rows, first=0):
    return np.stack([request_key(first + row, 0) for row in range(rows)])


def make_state(rows, **values):
    """A neutral state with some fields set, scalars for all rows alike."""
    state = SamplingState.neutral(rows)
    arrays = {
        name: jnp.broadcast_to(jnp.asarray(value, getattr(state, name).dtype), (rows,))
        for name, value in values.items()
        if name not in ("key", "stop_ids")
    }
    arrays |= {name: jnp.asarray(values[name]) for name in ("key", "stop_ids") if name in values}
    return replace(state, **arrays)


# --- the transcription ---------------------------------------------------------------------------


def numpy_adjust(logits, *, prompt, output, params, stop_ids, bad_words):
    """Steps 3 to 5 for one row."""
    logits = logits.astype(np.float64).copy()
    for word in bad_words:
        beginning = list(word[:-1])
        if output[len(output) - len(beginning) :] == beginning:
            logits[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        logits[stop_ids] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in set(prompt) | set(output):
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count
        logits[token] -= params.presence_penalty
    return logits


def numpy_filter(logits, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """Steps 7 to 10 for one row: (kept, sure). Ties at a border are all kept, and where a token
    lies so close to a border that float32 may decide otherwise it is not sure."""
    logits = logits.astype(np.float64) / temperature
    p = scipy.special.softmax(logits)
    kept = p >= min_p * p.max()
    sure = (p > 1e-37) & (np.abs(p / p.max() - min_p) > 1e-5 * min_p)  # 1e-37: float32's end
    sure |= p == p.max()
    if top_k:
        order = np.sort(np.where(kept, logits, -np.inf))[::-1]
        kept &= logits >= order[min(top_k, len(order)) - 1]
    if top_p < 1:
        p = scipy.special.softmax(np.where(kept, logits, -np.inf))
        order = np.sort(p)[::-1]
        mass_above = np.concatenate([[0.0], np.cumsum(order)])[
            np.searchsorted(-order, -p, side="left")
        ]
        kept &= mass_above < top_p
        sure &= np.abs(mass_above - top_p) > 1e-5 * mass_above
    return kept, sure


# --- steps 3 to 5 --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_adjusted_logits_follow_the_order_of_steps(seed):
    rng = np.random.default_rng(seed)
    rows, vocab_size = 5, 40
    logits = random_logits(rows, vocab_size, seed)
    state = make_state(rows, stop_ids=np.full((rows, 4), -1, np.int32))
    penalties = Penalties.neutral(rows, vocab_size, bad_words=(6, 4))
    positions, expected = [], []
    for row in range(rows):
        prompt = rng.integers(0, vocab_size, 6).tolist()
        output = rng.integers(0, vocab_size, rng.integers(0, 12)).tolist()
        params = SamplingParams(
            presence_penalty=rng.uniform(-2, 2),
            frequency_penalty=rng.uniform(-2, 2),
            repetition_penalty=rng.uniform(0.5, 2),
            min_tokens=int(rng.integers(0, 12)),
            logit_bias={int(i): rng.uniform(-100, 100) for i in rng.integers(0, vocab_size, 5)},
        )
        stop_ids = rng.choice(vocab_size, 3, replace=False)
        bad_words = [rng.integers(0, vocab_size, length).tolist() for length in (1, 2, 4)]
        for length in (1, 2, 3):  # some that really are about to come up
            bad_words.append([*output[len(output) - length :], int(rng.integers(vocab_size))])
        bad_words = bad_words[:6]
        expected.append(
            numpy_adjust(
                logits[row],
                prompt=prompt,
                output=output,
                params=params,
                stop_ids=stop_ids,
                bad_words=bad_words,
            )
        )
        positions.append(len(prompt) + len(output))
        state = replace(
            state,
            stop_ids=state.stop_ids.at[row, :3].set(stop_ids),
            min_position=state.min_position.at[row].set(len(prompt) + params.min_tokens),
        )
        bias = np.zeros(vocab_size)
        for token, value in params.logit_bias.items():
            bias[token] = value
        penalties = replace(
            penalties,
            repetition=penalties.repetition.at[row].set(params.repetition_penalty),
            frequency=penalties.frequency.at[row].set(params.frequency_penalty),
            presence=penalties.presence.at[row].set(params.presence_penalty),
            bias=penalties.bias.at[row].set(bias),
            in_prompt=penalties.in_prompt.at[row, np.array(prompt)].set(True),
            bad_words=penalties.bad_words.at[row].set(pack_bad_words(bad_words, 6, 4)),
        )
        for token in output:
            joined = np.full(rows, -1, np.int32)
            joined[row] = token
            penalties = penalties.update(jnp.asarray(joined))
    adjusted = adjust_logits(jnp.asarray(logits), state, jnp.array(positions), penalties)
    np.testing.assert_allclose(adjusted, expected, rtol=1e-5, atol=2e-5)
    assert np.isneginf(expected).any()


def test_a_bad_word_longer_than_the_output_is_not_barred():
    penalties = replace(
        Penalties.neutral(1, 8, bad_words=(2, 3)),
        bad_words=jnp.asarray(pack_bad_words([[1, 2, 3], [4]], 2, 3))[None],
    )
    logits = jnp.zeros((1, 8))

    def barred(penalties):
        adjusted = adjust_logits(logits, SamplingState.neutral(1), jnp.array([5]), penalties)
        return np.flatnonzero(np.isneginf(adjusted[0])).tolist()

    assert barred(penalties) == [4]
    penalties = penalties.update(jnp.array([2]))
    assert barred(penalties) == [4]
    penalties = penalties.update(jnp.array([1])).update(jnp.array([2]))
    assert barred(penalties) == [3, 4]
    penalties = penalties.update(jnp.array([-1]))  # a row that ended changes nothing
    assert barred(penalties) == [3, 4]
    assert penalties.count.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]


def test_bad_words_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 token sequences of up to 3 tokens"):
        pack_bad_words([[1, 2, 3], [1]], 4, 2)


def test_stop_ids_are_barred_up_to_min_position_in_every_variant():
    logits = jnp.asarray([[0.0, 9.0, 1.0, 8.0]] * 2)
    stop_ids = np.array([[1, 3, -1, -1]] * 2, np.int32)
    state = make_state(2, stop_ids=stop_ids, min_position=5)
    for variant in ("greedy", "sample", "full"):
        penalties = Penalties.neutral(2, 4) if variant == "full" else None
        out = draw(logits, state, jnp.array([4, 5]), penalties, variant=variant)
        assert out.token.tolist() == [2, 1]


# --- steps 7 to 10 -------------------------------------------------------------------------------

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.01},
    {"temperature": 5.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.1},
]


def assert_kept(logits, filters, bits_per_pass=1):
    weights = np.asarray(
        weights_of(
            jnp.asarray(logits),
            make_state(len(logits), **({"temperature": 1.0} | filters)),
            bits_per_pass=bits_per_pass,
        )
    )
    for row, weight in zip(logits, weights, strict=True):
        kept, sure = numpy_filter(row, **filters)
        assert (kept & sure).any()
        np.testing.assert_array_equal((weight > 0)[sure], kept[sure])
        p = np.exp((row.astype(np.float64) - row.max()) / filters.get("temperature", 1.0))
        np.testing.assert_allclose(weight[kept & sure], p[kept & sure], rtol=2e-4, atol=1e-30)
    return weights


@pytest.mark.parametrize("bits_per_pass", [1, 4])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_the_sort_route_keeps(filters, bits_per_pass):
    assert_kept(random_logits(3, 1000, scale=2.0), filters, bits_per_pass)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 8),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
    coarse=st.booleans(),
)
def test_filters_combine(seed, scale, temperature, top_k, top_p, min_p, coarse):
    logits = random_logits(2, 64, seed, scale)
    if coarse:  # many ties
        logits = np.round(logits)
    # The transcription sees the parameters as the device does.
    top_p, min_p, temperature = (float(np.float32(x)) for x in (top_p, min_p, temperature))
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert_kept(logits, filters)


def test_ties_at_the_border_are_all_kept():
    logits = jnp.asarray([[1.0, 3.0, 1.0, 1.0, -2.0], [0.0, -0.0, 5.0, -1.0, -1.0]])
    kept = weights_of(logits, make_state(2, temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [[True, True, True, True, False], [True, True, True, False, False]]
    kept = weights_of(logits[:1], make_state(1, temperature=1.0, top_p=0.75)) > 0
    assert kept.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 8.0])
def test_filters_that_are_off_drop_nothing(scale):
    logits = jnp.asarray(random_logits(1, LLAMA_3_VOCAB, scale=scale))
    off = weights_of(logits, make_state(1, temperature=1.0))
    assert (off > 0).all()
    np.testing.assert_allclose(off, np.exp(logits - logits.max()), rtol=1e-5)
    for filters in ({"top_k": LLAMA_3_VOCAB}, {"top_k": 2**31 - 1}):
        state = make_state(1, temperature=1.0, **filters)
        np.testing.assert_array_equal(weights_of(logits, state), off)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_top_p_is_accurate_over_a_large_flat_vocabulary(top_p):
    logits = random_logits(1, LLAMA_3_VOCAB, scale=0.1)
    kept = weights_of(jnp.asarray(logits), make_state(1, temperature=1.0, top_p=top_p))[0] > 0
    mass = scipy.special.softmax(logits[0].astype(np.float64))[np.asarray(kept)].sum()
    assert top_p - 1e-4 < mass < top_p + 1e-4


def test_a_row_is_filtered_by_its_own_parameters():
    logits = random_logits(len(FILTERS), 300)
    columns = {
        name: jnp.asarray([f.get(name, default) for f in FILTERS])
        for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    }
    together = weights_of(jnp.asarray(logits), replace(make_state(len(FILTERS)), **columns))
    for row, filters in enumerate(FILTERS):
        alone = assert_kept(logits[row : row + 1], filters)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-6)


@pytest.mark.oracle
def test_transformers_processes_logits_alike():
    rows, vocab_size = 4, 200
    logits = random_logits(rows, vocab_size)
    tokens = np.random.default_rng(3).integers(0, vocab_size, (rows, 9))
    theirs = oracle.run(
        """
        from transformers.generation import logits_process as processors

        processed = {
            "repetition": processors.RepetitionPenaltyLogitsProcessor(1.3),
            "bad_words": processors.NoBadWordsLogitsProcessor(
                [[7], tokens[0, -2:].tolist() + [11], tokens[1, -1:].tolist() + [12]]
            ),
            "bias": processors.SequenceBiasLogitsProcessor([[[5], 2.5], [[6], -3.0]]),
            "top_k": processors.TopKLogitsWarper(13),
            "top_p": processors.TopPLogitsWarper(0.8),
            "min_p": processors.MinPLogitsWarper(0.05),
            "temperature": processors.TemperatureLogitsWarper(0.6),
        }
        chain = ["temperature", "top_k", "top_p"]
        ids, scores = torch.tensor(tokens), torch.tensor(logits)
        for name, processor in processed.items():
            out[name] = processor(ids, scores.clone()).numpy()
        for name in chain:
            scores = processed[name](ids, scores)
        out["chain"] = scores.softmax(-1).numpy()
        """,
        logits=logits,
        tokens=tokens,
    )
    neutral = Penalties.neutral(rows, vocab_size, bad_words=(3, 3))
    for token in tokens.T:
        neutral = neutral.update(jnp.asarray(token, jnp.int32))
    words = [[7], [*tokens[0, -2:], 11], [tokens[1, -1], 12]]
    bias = np.zeros((rows, vocab_size), np.float32)
    bias[:, 5], bias[:, 6] = 2.5, -3.0
    for name, changes in {
        "repetition": {"repetition": jnp.full(rows, 1.3)},
        "bad_words": {"bad_words": jnp.asarray([pack_bad_words(words, 3, 3)] * rows)},
        "bias": {"bias": jnp.asarray(bias)},
    }.items():
        penalties = replace(neutral, **changes)
        state = SamplingState.neutral(rows)
        ours = adjust_logits(jnp.asarray(logits), state, jnp.full(rows, 9), penalties)
        np.testing.assert_allclose(ours, theirs[name], rtol=1e-6, err_msg=name)
    for name, filters in {
        "top_k": {"top_k": 13},
        "top_p": {"top_p": 0.8},
        "min_p": {"min_p": 0.05},
    }.items():
        ours = weights_of(jnp.asarray(logits), make_state(rows, temperature=1.0, **filters))
        np.testing.assert_array_equal(ours > 0, np.isfinite(theirs[name]), err_msg=name)
    chain = make_state(rows, temperature=0.6, top_k=13, top_p=0.8)
    ours = np.asarray(weights_of(jnp.asarray(logits), chain))
    np.testing.assert_allclose(
        ours / ours.sum(-1, keepdims=True), theirs["chain"], rtol=1e-5, atol=1e-9
    )


# --- the draw ------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["keys", "positions"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9, "temperature": 1.3}], ids=str)
def test_draws_have_the_right_distribution(along, filters):
    rows = 100_000
    logits = random_logits(1, 20, seed=4, scale=1.5)
    kept, _ = numpy_filter(logits[0], **filters)
    scaled = logits[0].astype(np.float64) / filters.get("temperature", 1.0)
    expected = rows * scipy.special.softmax(np.where(kept, scaled, -np.inf))
    one = along == "positions"
    state = make_state(
        rows,
        key=np.broadcast_to(request_key(7, 0), (rows, 2)) if one else keys(rows),
        **({"temperature": 1.0} | filters),
    )
    positions = jnp.arange(rows) if one else jnp.full(rows, 31)
    logits = jnp.broadcast_to(jnp.asarray(logits), (rows, 20))
    tokens = np.asarray(draw(logits, state, positions, variant="sample").token)
    observed = np.bincount(tokens, minlength=20)
    assert observed[~kept].sum() == 0
    assert scipy.stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3
    # Neighbours are independent too.
    pairs = np.histogram2d(tokens[:-1:2], tokens[1::2], bins=np.arange(21))[0]
    pairs = pairs[kept][:, kept]
    assert scipy.stats.chi2_contingency(pairs[:, pairs.sum(0) > 0]).pvalue > 1e-3


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should_be():
    rows, vocab_size = 300, 32768
    # One token with half of the mass and the rest spread evenly: the noise's far tail decides.
    logits = np.zeros(vocab_size, np.float32)
    logits[5] = np.log(vocab_size - 1)
    tokens = []
    for start in range(0, rows, 50):
        state = make_state(50, temperature=1.0, key=keys(50, start))
        batch = jnp.broadcast_to(jnp.asarray(logits), (50, vocab_size))
        tokens += draw(batch, state, jnp.zeros(50, jnp.int32), variant="sample").token.tolist()
    tokens = np.array(tokens)
    assert scipy.stats.binomtest(int((tokens == 5).sum()), rows, 0.5).pvalue > 1e-3
    assert scipy.stats.kstest(tokens[tokens != 5] / vocab_size, "uniform").pvalue > 1e-3


def test_a_seeded_row_is_the_same_alone_in_a_batch_permuted_and_beside_nan():
    # XLA compiles arrays of up to 4096 elements for a CPU in another way, with other roundings.
    rows, vocab_size = 8, 8192
    logits = random_logits(rows, vocab_size)
    rng = np.random.default_rng(1)
    state = make_state(
        rows,
        key=keys(rows),
        temperature=rng.uniform(0.5, 2, rows),
        top_k=rng.integers(0, 100, rows),
        top_p=rng.uniform(0.5, 1, rows),
        min_p=rng.uniform(0, 0.05, rows),
    )
    positions = jnp.asarray(rng.integers(0, 5000, rows))
    full = partial(draw, variant="sample", num_logprobs=5)
    batch = full(jnp.asarray(logits), state, positions)
    assert len(set(batch.token.tolist())) > 4

    def assert_rows_equal(out, order):
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x[: len(order)], y[np.asarray(order)]),
            out,
            batch,
        )

    def pick(order):
        return jnp.asarray(logits)[order], jax.tree.map(lambda x: x[order], state), positions[order]

    for row in range(rows):
        assert_rows_equal(full(*pick(np.array([row]))), [row])
    order = rng.permutation(rows)
    assert_rows_equal(full(*pick(order)), order)
    padded = np.concatenate([np.arange(rows), np.zeros(8, int)])
    poisoned, padded_state, padded_positions = pick(padded)
    out = full(poisoned.at[rows:].set(jnp.nan), padded_state, padded_positions)
    assert_rows_equal(out, np.arange(rows))
    assert out.finite.tolist() == [True] * rows + [False] * 8


def test_the_draw_depends_on_seed_sample_index_and_position():
    assert request_key(1, 0).dtype == np.uint32
    logits = jnp.zeros((4, 5000))
    seeds = np.stack([request_key(1, 0), request_key(2, 0), request_key(1, 1), request_key(1, 0)])
    state = make_state(4, temperature=1.0, key=seeds)
    tokens = draw(logits, state, jnp.array([3, 3, 3, 4]), variant="sample").token
    assert len(set(tokens.tolist())) == 4
    assert len({tuple(request_key(*path)) for path in [(0,), (0, 0), (-1, 0), (2**80, 0)]}) == 4


# --- variants ------------------------------------------------------------------------------------


def test_neutral_parameters_give_the_same_tokens_in_every_variant():
    rows, vocab_size = 6, 500
    logits = np.round(random_logits(rows, vocab_size))  # ties
    state, positions = SamplingState.neutral(rows), jnp.arange(rows)
    for temperature in (0.0, 1.0):
        state = make_state(rows, temperature=temperature, key=keys(rows))
        sampled = draw(jnp.asarray(logits), state, positions, variant="sample").token
        full = draw(
            jnp.asarray(logits),
            state,
            positions,
            Penalties.neutral(rows, vocab_size),
            variant="full",
        ).token
        np.testing.assert_array_equal(sampled, full)
        if temperature == 0:
            np.testing.assert_array_equal(sampled, logits.argmax(-1))
    greedy = draw(jnp.asarray(logits), state, positions, variant="greedy").token
    np.testing.assert_array_equal(greedy, logits.argmax(-1))


def test_greedy_and_sampled_rows_share_a_batch():
    logits = jnp.asarray(random_logits(4, 300))
    state = make_state(4, temperature=np.array([0.0, 2.0, 0.0, 2.0]), key=keys(4))
    mixed = draw(logits, state, jnp.arange(4), variant="sample").token
    alone = draw(
        logits, make_state(4, temperature=2.0, key=keys(4)), jnp.arange(4), variant="sample"
    )
    expected = np.where([True, False, True, False], jnp.argmax(logits, -1), alone.token)
    np.testing.assert_array_equal(mixed, expected)


def test_penalties_reach_the_greedy_answer():
    logits = jnp.asarray([[3.0, 2.0, 1.0]])
    penalties = replace(Penalties.neutral(1, 3), frequency=jnp.array([0.8]))
    tokens = []
    for position in range(6):
        out = draw(
            logits, SamplingState.neutral(1), jnp.array([position]), penalties, variant="full"
        )
        tokens.append(int(out.token[0]))
        penalties = penalties.update(out.token)
    # 3 and 2.2 against 2, then 1.4 against 2, 1.4 against 1.2, 0.6 against 1.2, and 1 is left.
    assert tokens == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_unsound_row_is_told(bad):
    logits = jnp.zeros((2, 50)).at[1, 20].set(bad)
    for variant in ("greedy", "sample"):
        assert draw(
            logits, make_state(2, temperature=1.0), jnp.zeros(2, jnp.int32), variant=variant
        ).finite.tolist() == [True, False]


def test_no_variant_branches_on_data():
    rows = 2
    for variant in ("greedy", "sample", "full"):
        penalties = Penalties.neutral(rows, 64) if variant == "full" else None
        function = partial(sample, variant=variant, num_logprobs=20)
        args = (jnp.zeros((rows, 64)), SamplingState.neutral(rows), jnp.zeros(rows, jnp.int32))
        program = str(jax.make_jaxpr(function)(*args, penalties))
        assert "cond[" not in program
        assert "while[" not in program
        assert "sort[" not in program


def test_variant_and_penalties_must_agree():
    args = (jnp.zeros((1, 4)), SamplingState.neutral(1), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="'full' without penalties"):
        sample(*args, variant="full")
    with pytest.raises(ValueError, match="'sample' with penalties"):
        sample(*args, Penalties.neutral(1, 4), variant="sample")


@pytest.mark.parametrize(
    ("params", "variant"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "min_tokens": 3, "logprobs": 5}, "greedy"),
        ({}, "sample"),
        ({"top_k": 3}, "sample"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "full"),
        ({"presence_penalty": -1}, "full"),
        ({"frequency_penalty": 0.5}, "full"),
        ({"logit_bias": {3: 1}}, "full"),
        ({"bad_words": ["x"]}, "full"),
        ({"logit_bias": {}, "bad_words": []}, "sample"),
    ],
)
def test_the_cheapest_variant_is_chosen(params, variant):
    assert variant_for(SamplingParams(**params)) == variant


# --- log probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 16, 17, 20])
def test_logprobs_are_those_of_the_raw_logits(n):
    logits = random_logits(7, 400)
    logits[3] = np.round(logits[3])  # ties
    tokens = np.random.default_rng(2).integers(0, 400, 7)
    out = jax.jit(token_logprobs, static_argnums=2)(jnp.asarray(logits), jnp.asarray(tokens), n)
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    chosen = np.take_along_axis(logits, tokens[:, None], -1)
    np.testing.assert_allclose(out.logprob, expected[np.arange(7), tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.rank, (logits > chosen).sum(-1) + 1)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :n]
    np.testing.assert_array_equal(out.top_ids, ids)
    np.testing.assert_allclose(
        out.top_logprobs, np.take_along_axis(expected, ids, -1), rtol=1e-5, atol=1e-5
    )


def test_logprobs_ignore_what_shapes_the_draw():
    logits = random_logits(2, 50)
    penalties = replace(Penalties.neutral(2, 50), bias=jnp.zeros((2, 50)).at[:, 7].set(100.0))
    state = make_state(2, temperature=0.3, top_k=4)
    out = draw(jnp.asarray(logits), state, jnp.arange(2), penalties, variant="full", num_logprobs=3)
    assert out.token.tolist() == [7, 7]
    expected = scipy.special.log_softmax(logits, axis=-1)
    np.testing.assert_allclose(out.logprobs.logprob, expected[:, 7], rtol=1e-5)
    np.testing.assert_array_equal(out.logprobs.rank, (logits > logits[:, 7:8]).sum(-1) + 1)


def test_more_logprobs_than_tokens_give_them_all():
    out = token_logprobs(jnp.asarray([[1.0, 3.0, 2.0]]), jnp.array([0]), 20)
    assert out.top_ids.tolist() == [[1, 2, 0]]


def test_llama_3_vocabulary():
    logits = random_logits(2, LLAMA_3_VOCAB)
    state = make_state(2, temperature=np.array([0.0, 0.8]), top_k=40, top_p=0.95, key=keys(2))
    out = draw(jnp.asarray(logits), state, jnp.array([9, 9]), variant="sample", num_logprobs=20)
    assert int(out.token[0]) == logits[0].argmax()
    kept, _ = numpy_filter(logits[1], temperature=0.8, top_k=40, top_p=0.95)
    assert kept[int(out.token[1])]
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(out.logprobs.top_ids, best)
    expected = scipy.special.log_softmax(logits.astype(np.float64), -1)[np.arange(2), out.token]
    np.testing.assert_allclose(out.logprobs.logprob, expected, rtol=1e-5)
