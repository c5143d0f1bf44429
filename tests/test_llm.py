"""The public API: what `LLM` promises, on the embedded model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qllama
from qllama import LLM, CheckpointError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [
    "It is a truth",
    "Emma",
    "She had been a friend and companion such as few possessed: intelligent, well-informed,",
    "Mr. Darcy drew his chair",
    "The",
    "Of all the evenings they had spent together",
    "I am sure",
    "There was no being displeased with such an encourager",
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(seed=0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


# -- the cards' snippets, with the import changed ------------------------------------------------


def test_w4a16_card_snippet(tiny_llama3) -> None:
    """RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16: vLLM deployment."""
    model_id = str(tiny_llama3("ct_w4a16_g128"))
    number_gpus = 1
    max_model_len = 8192
    sampling_params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=16)
    tokenizer = LLM(model_id, max_model_len=64).tokenizer
    messages = [
        {"role": "system", "content": "You are a pirate chatbot"},
        {"role": "user", "content": "Who are you?"},
    ]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    llm = LLM(model=model_id, tensor_parallel_size=number_gpus, max_model_len=max_model_len)
    outputs = llm.generate(prompts, sampling_params)
    generated_text = outputs[0].outputs[0].text
    assert isinstance(generated_text, str)
    assert outputs[0].outputs[0].token_ids
    bos = llm.config.bos_token_id
    assert outputs[0].prompt_token_ids.count(bos) == 1


def test_fp8_card_snippet(tiny_llama3) -> None:
    """neuralmagic/Meta-Llama-3-8B-Instruct-FP8: prompts of token ids of a chat template."""
    llm = LLM(model=str(tiny_llama3("autofp8_static")))
    messages = [{"role": "user", "content": "Who are you? Please respond in pirate speak!"}]
    prompts = llm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, top_p=0.9, max_tokens=16))
    assert outputs[0].outputs[0].finish_reason in ("stop", "length")


def test_w8a8_card_snippet(tiny_llama3) -> None:
    """RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8: `llm.generate` of a rendered chat."""
    llm = LLM(str(tiny_llama3("ct_w8a8_int8")), tensor_parallel_size=1, max_model_len=4096)
    outputs = llm.chat(
        [{"role": "user", "content": "Give me a short introduction to large language model."}],
        SamplingParams(temperature=0.7, top_p=0.8, max_tokens=16),
    )
    assert len(outputs[0].outputs[0].token_ids) <= 16


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_come_as_text_or_token_ids(llm: LLM) -> None:
    by_text, by_dict = (llm.generate(p, GREEDY)[0] for p in ("Emma", {"prompt": "Emma"}))
    ids = by_text.prompt_token_ids
    (by_ids,) = llm.generate({"prompt_token_ids": ids}, GREEDY)
    assert by_text.outputs[0].token_ids == by_dict.outputs[0].token_ids
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.prompt == "Emma"
    assert by_ids.prompt is None
    assert ids == llm.tokenizer.encode("Emma")


def test_bos_comes_exactly_once(llm: LLM) -> None:
    bos, text = llm.config.bos_token_id, llm.tokenizer.bos_token
    for prompt in ("Emma", text + "Emma"):
        ids = llm.generate(prompt, GREEDY)[0].prompt_token_ids
        assert ids.count(bos) == 1
        assert ids[0] == bos
    chat = llm.chat([{"role": "user", "content": "Hello"}], GREEDY)[0]
    assert chat.prompt_token_ids.count(bos) == 1
    raw = llm.generate({"prompt_token_ids": [5, 6]}, GREEDY)[0]
    assert raw.prompt_token_ids == [5, 6]


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "non-empty"),
        ({"prompt_token_ids": [1, 10**6]}, "outside the vocabulary"),
        ({"prompt_token_ids": [-1]}, "outside the vocabulary"),
        ({"prompt_token_ids": [1.5]}, "integers"),
        ({"prompt_token_ids": [[1], [2]]}, "one non-empty sequence"),
        ({"text": "Emma"}, "a prompt must be"),
        (["Emma", 3], "a prompt must be"),
        ({"prompt_token_ids": [1] * 1024}, "max_model_len=1024"),
        ({"prompt_token_ids": [1] * 5000}, "max_model_len=1024"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]


def test_bad_requests(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="logit_bias"):
        llm.generate("a", SamplingParams(logit_bias={10**6: 1.0}))
    with pytest.raises(ValueError, match="messages is empty"):
        llm.chat([])
    with pytest.raises(ValueError, match="message must be"):
        llm.chat([{"content": "no role"}])
    with pytest.raises(ValueError, match="more than max_model_len"):
        llm.logits([1] * 1025)


def test_without_tokenizer_token_ids_still_work(tiny_llama3, tmp_path: Path) -> None:
    source = tiny_llama3("ct_w4a16_g128")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    llm = LLM(tmp_path)
    assert llm.tokenizer is None
    output = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY)[0].outputs[0]
    assert output.text == ""
    assert len(output.token_ids) > 0
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("text", GREEDY)
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"))


def test_the_tokenizers_end_token_counts_where_no_config_names_one(
    tiny_llama3, tmp_path: Path
) -> None:
    source = tiny_llama3("ct_w4a16_g128")
    for file in source.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path)
    assert llm.eos_token_ids == (llm.tokenizer.eos_token_id,)


def test_without_chat_template_chat_says_so(llm: LLM) -> None:
    template, llm.tokenizer.chat_template = llm.tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Hello"}])
    finally:
        llm.tokenizer.chat_template = template


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float8"},
        {"backend": "cuda"},
        {"kv_cache_dtype": "int3"},
        {"activation_semantics": "mlx"},
        {"max_model_len": 0},
        {"max_model_len": 2048},
        {"max_num_seqs": -1},
        {"gpu_memory_utilization": 1.5},
    ],
)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LLM(**arguments)  # type: ignore[arg-type]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(tokenizer="/nowhere/at/all")
    with pytest.raises(ValueError, match="no tokenizer files"):
        LLM(tokenizer=tmp_path)


# -- what is generated ---------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_logits(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY)
    generated = output.outputs[0].token_ids
    ids = output.prompt_token_ids + generated
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.config.vocab_size)
    assert logits.dtype == np.float32
    assert logits[len(output.prompt_token_ids) - 1 : -1].argmax(axis=-1).tolist() == generated


def test_rows_of_a_ragged_batch_equal_single_runs(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].text == other.outputs[0].text


def test_more_requests_than_rows(llm: LLM) -> None:
    small = LLM(max_num_seqs=2, max_num_batched_tokens=16)
    few = SamplingParams(temperature=0, max_tokens=9)
    together = small.generate(PROMPTS[:5], few)
    for prompt, output in zip(PROMPTS[:5], together, strict=True):
        assert output.outputs[0].token_ids == llm.generate(prompt, few)[0].outputs[0].token_ids


def test_a_seeded_sample_is_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=1234, max_tokens=16)
    (alone,) = llm.generate(PROMPTS[3], seeded)
    params = [SamplingParams(temperature=1.2, max_tokens=16) for _ in PROMPTS]
    params[3] = seeded
    batch = llm.generate(PROMPTS, params)
    assert batch[3].outputs[0].token_ids == alone.outputs[0].token_ids
    assert llm.generate(PROMPTS[3], seeded)[0].outputs[0].text == alone.outputs[0].text


def test_unseeded_samples_differ_and_follow_the_seed_of_the_llm(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=16)
    first = llm.generate("Emma", params)[0].outputs[0].token_ids
    second = llm.generate("Emma", params)[0].outputs[0].token_ids
    assert first != second
    texts = [LLM(seed=7).generate("Emma", params)[0].outputs[0].text for _ in range(2)]
    assert texts[0] == texts[1]


def test_n_completions_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=10)
    (output,) = llm.generate("Emma", params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({completion.text for completion in output.outputs}) == 3
    assert output.finished
    assert output.metrics is not None
    assert output.metrics.num_generation_tokens == sum(len(c.token_ids) for c in output.outputs)


def test_stream_joined_is_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, logprobs=1)
    whole = llm.generate("Emma", params)[0].outputs[0]
    parts = [output.outputs[0] for output in llm.stream("Emma", params)]
    assert len(parts) > 2
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == whole.finish_reason
    assert sum(len(part.logprobs or ()) for part in parts) == len(whole.token_ids)
    total = sum(part.cumulative_logprob or 0 for part in parts)
    assert whole.cumulative_logprob == pytest.approx(total)


def test_an_abandoned_stream_leaves_the_llm_usable(llm: LLM) -> None:
    stream = llm.stream("Emma", SamplingParams(temperature=0, max_tokens=50))
    next(stream)
    assert llm.generate("Emma", GREEDY)[0].outputs[0].text
    del stream


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.3, seed=2, max_tokens=8, logprobs=4, prompt_logprobs=2, top_p=0.5
    )
    (output,) = llm.generate(PROMPTS[2], params)
    completion = output.outputs[0]
    ids = output.prompt_token_ids + completion.token_ids
    expected = log_softmax(llm.logits(ids))
    start = len(output.prompt_token_ids)
    assert completion.logprobs is not None
    for place, (token, found) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True), start=start - 1
    ):
        row = expected[place]
        assert found[token].logprob == pytest.approx(row[token], abs=1e-4)
        assert found[token].rank == 1 + int((row > row[token]).sum())
        best = np.argsort(-row)[:4].tolist()
        assert set(best) | {token} == set(found)
        for rank, other in enumerate(best, start=1):
            assert found[other].logprob == pytest.approx(row[other], abs=1e-4)
            assert other == token or found[other].rank == rank
            assert found[other].decoded_token == llm.tokenizer.decode([other])
    assert completion.cumulative_logprob == pytest.approx(
        sum(
            found[t].logprob
            for t, found in zip(completion.token_ids, completion.logprobs, strict=True)
        )
    )
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == start
    for place, found in enumerate(output.prompt_logprobs[1:]):
        assert found is not None
        token = output.prompt_token_ids[place + 1]
        assert found[token].logprob == pytest.approx(expected[place, token], abs=1e-4)


def test_prompt_logprobs_of_a_prompt_in_chunks(llm: LLM) -> None:
    ids = llm.tokenizer.encode(" ".join(PROMPTS))
    small = LLM(max_num_batched_tokens=16)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = small.generate({"prompt_token_ids": ids}, params)
    assert output.prompt_logprobs is not None
    expected = log_softmax(llm.logits(ids))
    found = [at[ids[t + 1]].logprob for t, at in enumerate(output.prompt_logprobs[1:])]
    assert found == pytest.approx(expected[np.arange(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)


def test_stop_strings_cut_text_and_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    whole = llm.generate("Emma", params)[0].outputs[0]
    stop = whole.text[9:14]  # crosses the borders of tokens
    cut = llm.generate("Emma", SamplingParams(temperature=0, max_tokens=40, stop=stop))[0]
    completion = cut.outputs[0]
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == stop
    count = len(completion.token_ids)
    assert completion.token_ids == whole.token_ids[:count]
    assert stop in llm.tokenizer.decode(completion.token_ids)
    assert stop not in llm.tokenizer.decode(completion.token_ids[:-1])
    kept = SamplingParams(
        temperature=0, max_tokens=40, stop=[stop], include_stop_str_in_output=True
    )
    assert llm.generate("Emma", kept)[0].outputs[0].text == completion.text + stop


def test_stop_tokens_end_the_text_and_min_tokens_bars_them(llm: LLM) -> None:
    free = llm.generate("Emma", GREEDY)[0].outputs[0].token_ids
    first, later = free[0], next(t for t in free[3:] if t not in free[:3])
    stopped = llm.generate(
        "Emma", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[later])
    )[0].outputs[0]
    assert stopped.token_ids == free[: free.index(later) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", later)
    barred = llm.generate(
        "Emma",
        SamplingParams(temperature=0, max_tokens=12, min_tokens=5, stop_token_ids=[first]),
    )[0].outputs[0]
    assert first not in barred.token_ids[:5]
    assert len(barred.token_ids) >= 5


def test_the_models_end_token_ends_unless_ignored(llm: LLM) -> None:
    eos = llm.eos_token_ids[0]
    wanted = SamplingParams(temperature=0, max_tokens=6, logit_bias={eos: 100.0})
    ended = llm.generate("Emma", wanted)[0].outputs[0]
    assert ended.token_ids == [eos]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert ended.text == ""
    ignored = SamplingParams(temperature=0, max_tokens=6, logit_bias={eos: 100.0}, ignore_eos=True)
    completion = llm.generate("Emma", ignored)[0].outputs[0]
    assert completion.token_ids == [eos] * 6
    assert completion.finish_reason == "length"


def test_logit_bias_bad_words_and_penalties_reach_the_sampler(llm: LLM) -> None:
    free = llm.generate("Emma", SamplingParams(temperature=0, max_tokens=30))[0].outputs[0]
    banned = free.token_ids[0]
    biased = SamplingParams(temperature=0, max_tokens=30, logit_bias={banned: -100})
    assert banned not in llm.generate("Emma", biased)[0].outputs[0].token_ids
    word = free.text.split()[1]
    without = SamplingParams(temperature=0, max_tokens=30, bad_words=[word])
    assert f" {word} " not in llm.generate("Emma", without)[0].outputs[0].text
    fresh = SamplingParams(temperature=0, max_tokens=30, presence_penalty=2, frequency_penalty=2)
    penalised = llm.generate("Emma", fresh)[0].outputs[0].token_ids
    assert len(set(penalised)) > len(set(free.token_ids))


def test_greedy_rows_do_not_notice_penalised_neighbours(llm: LLM) -> None:
    alone = llm.generate("Emma", GREEDY)[0].outputs[0].token_ids
    penalised = replace(GREEDY, repetition_penalty=1.5, logit_bias={alone[0]: -100})
    batch = llm.generate(["Emma", "Emma"], [GREEDY, penalised])
    assert batch[0].outputs[0].token_ids == alone
    assert alone[0] not in batch[1].outputs[0].token_ids


def test_max_tokens_none_runs_to_the_models_length() -> None:
    llm = LLM(max_model_len=40)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate("It is a truth", params)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
    assert output.outputs[0].finish_reason == "length"


def test_default_sampling_params_are_generation_configs(llm: LLM) -> None:
    default = llm.default_sampling_params
    assert default.temperature > 0
    (output,) = llm.generate("Emma", None)
    assert 0 < len(output.outputs[0].token_ids) <= (default.max_tokens or math.inf)


def test_generate_in_one_call(llm: LLM) -> None:
    expected = llm.generate("Emma", GREEDY)[0].outputs[0].text
    assert qllama.generate(llm, "Emma", GREEDY)[0].outputs[0].text == expected
    assert qllama.generate(None, "Emma", GREEDY)[0].outputs[0].text == expected
    with pytest.raises(ValueError, match="max_model_len"):
        qllama.generate(llm, "Emma", GREEDY, max_model_len=10)


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate("Emma", GREEDY)[0].metrics
    assert metrics is not None
    times = (
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.last_token_time,
        metrics.finished_time,
    )
    assert all(time is not None for time in times)
    assert list(times) == sorted(times)  # type: ignore[type-var]


def test_float8_cache_changes_little_and_bfloat16_is_close(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[2])
    exact = log_softmax(llm.logits(ids))
    for arguments, limit in (
        ({"kv_cache_dtype": "fp8"}, 0.2),
        ({"dtype": "bfloat16"}, 0.05),
    ):
        other = log_softmax(LLM(**arguments).logits(ids))  # type: ignore[arg-type]
        kl = (np.exp(exact) * (exact - other)).sum(axis=-1)
        assert 0 < kl.mean() < limit
