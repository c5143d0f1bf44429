"""The engine: rows, shapes and programs; what a broken sequence does to its neighbours."""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qllama.config import LlamaConfig
from qllama.engine.buckets import bucket
from qllama.engine.engine import Engine
from qllama.engine.programs import Features
from qllama.engine.request import Burst, Request
from qllama.engine.runner import Flight, Reading, Runner
from qllama.engine.sampling_params import SamplingParams
from qllama.model.init import init_llama
from qllama.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def make_runner() -> Runner:
    model = init_llama(CONFIG, jax.random.key(0))
    model.embed_tokens[...] = model.embed_tokens[...] * 50  # so that logits have structure
    return Runner(model, cache_dtype=jnp.float32, steps=4)


def make_engine(runner: Runner, **limits: int) -> Engine:
    defaults = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_cache_tokens": 4096,
    }
    return Engine(runner, **(defaults | limits))


def request(length: int, seed: int = 0, params: SamplingParams = GREEDY) -> Request:
    prompt = np.random.default_rng([seed, length]).integers(1, 97, length).astype(np.int32)
    return Request(prompt=prompt, params=params, seed=(seed, 0), max_tokens=params.max_tokens or 1)


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for _ in engine.run(requests):
        pass
    return [request.output for request in requests]


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1000, 1024)]
)
def test_bucket(size: int, expected: int) -> None:
    assert bucket(size) == expected
    assert bucket(size, smallest=16) == max(expected, 16)
    assert bucket(size, largest=20) == min(expected, 20)


def test_output_does_not_depend_on_rows_chunks_or_capacity() -> None:
    runner = make_runner()
    lengths = [3, 40, 17, 90, 5, 33, 64, 1]
    alone = [run(make_engine(runner), [request(n)])[0] for n in lengths]
    for limits in (
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 8, "max_num_batched_tokens": 128},
        {"max_num_batched_tokens": 16},
        {"max_cache_tokens": 256},  # room for one long row
    ):
        assert run(make_engine(runner, **limits), [request(n) for n in lengths]) == alone


def test_rows_fit_into_the_cache_that_there_is_room_for() -> None:
    runner = make_runner()
    engine = make_engine(runner, max_num_seqs=8, max_cache_tokens=300)
    run(engine, [request(n) for n in (100, 5, 6)])  # 120 tokens each at most: two rows of 128
    assert runner.cache is not None
    assert runner.cache.rows * runner.cache.capacity <= 300
    assert runner.cache.rows == 2


def test_a_second_run_compiles_nothing() -> None:
    runner = make_runner()
    engine = make_engine(runner)
    lengths = [3, 40, 17, 90, 5]
    run(engine, [request(n) for n in lengths])
    known = set(runner.compiled)
    run(engine, [request(n, seed=1) for n in lengths])
    assert set(runner.compiled) == known


def test_a_sequence_that_is_not_finite_ends_and_harms_nobody() -> None:
    runner = make_runner()
    engine = make_engine(runner)
    healthy = run(engine, [request(n) for n in (9, 20)])
    poison = 13
    leaves = list(runner.leaves)
    table = next(i for i, leaf in enumerate(leaves) if leaf.shape == (97, 32))
    leaves[table] = leaves[table].at[poison].set(jnp.nan)
    runner.leaves = leaves
    first, second = request(9), request(20)
    if poison in [*first.prompt, *second.prompt, *healthy[0], *healthy[1]]:
        pytest.fail("choose another token to poison")
    sick = request(7)
    sick.prompt[3] = poison
    for _ in engine.run([first, sick, second]):
        pass
    assert sick.finish_reason == "error"
    assert sick.output == []
    assert [first.output, second.output] == healthy
    later = [request(9), request(20), request(9)]  # one of them in the sick row
    assert run(engine, later) == [healthy[0], healthy[1], healthy[0]]


def test_features_are_the_least_that_serves_all() -> None:
    def of(**options: object) -> Features:
        return Features.of([request(3), request(3, params=SamplingParams(**options))])  # type: ignore[arg-type]

    assert of(temperature=0).variant == "greedy"
    assert of(temperature=0.5).variant == "sample"
    assert of(temperature=0, presence_penalty=1).variant == "full"
    assert of(logprobs=3).num_logprobs == 3
    assert of(prompt_logprobs=0).num_prompt_logprobs == 0
    assert of(stop_token_ids=list(range(9))).num_stop_ids == 16


def decode_text(runner: Runner) -> str:
    """The optimized program of the last decode that `runner` compiled."""
    run(make_engine(runner), [request(5), request(6)])
    (key,) = [key for key in runner.compiled if key[0] == "decode"]
    return runner.compiled[key].as_text()


def test_decode_copies_no_cache_and_asks_the_host_nothing() -> None:
    runner = make_runner()
    text = decode_text(runner)
    assert runner.cache is not None
    shape = ",".join(map(str, runner.cache.layers[0].keys.shape))
    copies = [line for line in text.splitlines() if f"f32[{shape}]" in line and " copy(" in line]
    assert copies == []
    assert " conditional(" not in text
    loops = [line for line in text.splitlines() if " while(" in line]
    assert all("known_trip_count" in line for line in loops)


def test_a_stop_string_frees_the_row_at_once() -> None:
    engine = make_engine(make_runner(), max_num_seqs=1)
    stopped, after = request(5), request(6)
    expected = run(make_engine(make_runner()), [request(6)])[0]
    stopped.on_burst = lambda burst: 1
    assert run(engine, [stopped, after]) == [stopped.output, expected]
    assert len(stopped.output) == 1
    assert stopped.finish_reason == "stop"


def test_the_device_has_its_next_work_before_its_tokens_are_fetched() -> None:
    runner = make_runner()
    engine = make_engine(runner)
    calls: list[str] = []

    def decode() -> Flight:
        calls.append("decode")
        return Runner.decode(runner)

    def fetch(flight: Flight) -> Iterator[tuple[int, Request, Burst]]:
        calls.append("fetch")
        return Runner.fetch(runner, flight)

    count = 2 + 2 * runner.steps
    with mock.patch.multiple(runner, decode=decode, fetch=fetch):
        params = SamplingParams(temperature=0, max_tokens=count)
        [output] = run(engine, [request(5, params=params)])
    assert len(output) == count
    # One token is the prompt's; nothing is started that could only be thrown away.
    assert calls == ["decode", "decode", "fetch", "decode", "fetch", "fetch"]


def test_decoding_is_compiled_for_no_room_in_which_nothing_is_decoded() -> None:
    """Prompts are read in turn here, and the second needs more room than the first."""
    runner = make_runner()
    rooms: set[int] = set()

    def decode() -> Flight:
        assert runner.cache is not None
        rooms.add(runner.cache.capacity)
        return Runner.decode(runner)

    with mock.patch.object(runner, "decode", decode):
        run(make_engine(runner), [request(5), request(120)])
    assert rooms == {256}
    begun = [name for name, *_ in (*runner.compiled, *runner.compiling)]
    assert begun.count("decode") == 1


@pytest.mark.parametrize("length", [120, 127, 128])
def test_a_second_text_of_the_same_length_compiles_nothing(length: int) -> None:
    """Though decoding needs more room than the prompt, where the cache doubles."""
    runner = make_runner()
    engine = make_engine(runner, max_num_batched_tokens=128)
    run(engine, [request(length)])
    compiled = set(runner.compiled)
    run(engine, [request(length, seed=1)])
    assert set(runner.compiled) == compiled


def test_the_head_gets_two_rows_of_one_prompt() -> None:
    """XLA's library product of a single row would first widen the whole head to float32."""
    shapes: list[tuple[int, ...]] = []

    def logits(model: Llama, hidden: jax.Array) -> jax.Array:
        shapes.append(hidden.shape)
        return original(model, hidden)

    original = Llama.logits
    params = SamplingParams(temperature=0, max_tokens=1)
    for prompts in (1, 2):
        with mock.patch.object(Llama, "logits", logits):
            run(make_engine(make_runner()), [request(5, params=params) for _ in range(prompts)])
    assert shapes == [(2, 32), (2, 32)]


def test_a_chunk_of_prompts_is_followed_by_the_next_before_it_is_fetched() -> None:
    runner = make_runner()
    calls: list[str] = []

    def prefill(rows: list[int], start: int, size: int) -> Reading:
        calls.append(f"read {start}: {rows}")
        return Runner.prefill(runner, rows, start, size)

    def fetch_first(reading: Reading) -> Iterator[tuple[int, Request, Burst]]:
        calls.append(f"fetch {reading.start}")
        return Runner.fetch_first(runner, reading)

    requests = [request(n, params=SamplingParams(temperature=0, max_tokens=1)) for n in (50, 20)]
    with mock.patch.multiple(runner, prefill=prefill, fetch_first=fetch_first):
        found = run(make_engine(runner, max_num_batched_tokens=32), requests)
    assert calls == ["read 0: [0]", "read 32: [0]", "fetch 0", "fetch 32", "read 0: [0]", "fetch 0"]
    apart = [
        run(make_engine(runner), [request(n, params=r.params)])[0]
        for n, r in zip((50, 20), requests, strict=True)
    ]
    assert found == apart


def test_what_a_row_does_after_its_end_is_of_no_one() -> None:
    runner = make_runner()
    lengths = [3, 40, 17, 90, 5, 33]
    full = run(make_engine(runner), [request(n) for n in lengths])
    stops = [text[2 * i] for i, text in enumerate(full)]  # in the first, second, ... dispatch
    expected = [text[: text.index(stop) + 1] for text, stop in zip(full, stops, strict=True)]
    params = [replace(GREEDY, stop_token_ids=[stop]) for stop in stops]
    for rows in (1, 2, 8):
        requests = [request(n, params=p) for n, p in zip(lengths, params, strict=True)]
        assert run(make_engine(runner, max_num_seqs=rows), requests) == expected
        assert {r.finish_reason for r in requests} == {"stop"}


def test_on_compile_is_told_the_programs() -> None:
    import contextlib

    names: list[str] = []

    @contextlib.contextmanager
    def remember(name: str):  # type: ignore[no-untyped-def]
        names.append(name)
        yield

    model = init_llama(CONFIG, jax.random.key(0))
    runner = Runner(model, cache_dtype=jnp.float32, steps=4, on_compile=remember)
    run(make_engine(runner), [request(5)])
    assert names == ["set_rows", "prefill", "decode"]


@pytest.mark.parametrize(("max_tokens", "compiled"), [(1, {"prefill"}), (2, {"prefill", "decode"})])
def test_decoding_is_compiled_beside_prefill_if_it_comes(max_tokens, compiled) -> None:
    runner = make_runner()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    next(iter(make_engine(runner).run([request(5, params=params)])))  # its first token
    begun = {name for name, *_ in (*runner.compiled, *runner.compiling)}
    assert begun - {"set_rows"} == compiled
