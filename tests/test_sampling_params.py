"""SamplingParams: vLLM's defaults, ranges and normalisations."""

import dataclasses
import logging

import numpy as np
import pytest

from qllama.engine.sampling_params import SamplingParams, bad_word_ids

NAN, INF = float("nan"), float("inf")


def test_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "bad_words": [],
    }


@pytest.mark.parametrize(
    ("name", "value", "normal"),
    [
        ("temperature", 0, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 1e-6, 0.01),
        ("top_p", 1, 1.0),
        ("top_k", -1, 0),
        ("top_k", np.int64(5), 5),
        ("min_p", 1, 1.0),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", 2, 2.0),
        ("repetition_penalty", 0.5, 0.5),
        ("seed", -1, None),
        ("seed", 2**80, 2**80),
        ("seed", -7, -7),
        ("stop", "a", ["a"]),
        ("stop", ("a", "b"), ["a", "b"]),
        ("stop_token_ids", [3, 3, np.int32(4)], [3, 4]),
        ("stop_token_ids", np.array([5]), [5]),
        ("max_tokens", None, None),
        ("max_tokens", 1, 1),
        ("logprobs", 0, 0),
        ("logprobs", 20, 20),
        ("prompt_logprobs", 20, 20),
        ("logit_bias", {"12": 500, 3: -INF, np.int64(4): 1}, {12: 100.0, 3: -100.0, 4: 1.0}),
        ("bad_words", "x", ["x"]),
        ("bad_words", ["x", "y", "x"], ["x", "y"]),
    ],
)
def test_values_are_normalised(name, value, normal):
    got = getattr(SamplingParams(**{name: value}), name)
    assert got == normal
    assert type(got) is type(normal)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n", value) for value in (0, -1, 16385, 1.0, True, None, "1")],
        *[("temperature", value) for value in (-0.1, NAN, INF, None, "1", True)],
        *[("top_p", value) for value in (0, -1, 1.1, NAN, None)],
        *[("top_k", value) for value in (-2, 1.5, 3.0, True, None)],
        *[("min_p", value) for value in (-0.1, 1.1, NAN)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, NAN, True)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, INF)],
        *[("repetition_penalty", value) for value in (0, -1, NAN, INF)],
        *[("seed", value) for value in (1.5, "1", True)],
        *[("stop", value) for value in ("", ["a", ""], [1], 3, b"x")],
        *[("stop_token_ids", value) for value in ([1.5], ["1"], 3, [-1], [True], [2**31])],
        *[("max_tokens", value) for value in (0, -1, 1.5, True)],
        *[("min_tokens", value) for value in (-1, 17, None, 0.5)],
        *[("logprobs", value) for value in (-1, 21, True, 1.0)],
        *[("prompt_logprobs", value) for value in (-1, 21, True)],
        *[
            ("logit_bias", value)
            for value in ([1], {"x": 1}, {-1: 1}, {1: NAN}, {1: "2"}, {"²": 1})
        ],
        *[("bad_words", value) for value in ("", [""], [3])],
        *[("ignore_eos", value) for value in (None, 1)],
        *[("skip_special_tokens", value) for value in (None, "yes")],
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_a_refusal_says_value_and_range():
    with pytest.raises(ValueError, match=r"top_p must be .*above 0 and at most 1, got 1\.5"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match="logprobs must be at least 0 and at most 20, got 21"):
        SamplingParams(logprobs=21)
    with pytest.raises(ValueError, match=r"max_tokens must be an integer, got 1\.0 \(float\)"):
        SamplingParams(max_tokens=1.0)


def test_greedy_switches_the_filters_off_and_has_one_completion():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    with pytest.raises(ValueError, match="n must be 1 with temperature=0, got 2"):
        SamplingParams(temperature=0, n=2)


def test_a_tiny_temperature_is_raised_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="qllama"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "temperature=0.001" in caplog.text


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_params_do_not_change_and_a_changed_copy_is_checked():
    params = SamplingParams(stop="x", logit_bias={"1": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    copy = dataclasses.replace(params, max_tokens=5)
    assert (copy.stop, copy.logit_bias, copy.max_tokens) == (["x"], {1: 2.0}, 5)
    with pytest.raises(ValueError, match="max_tokens"):
        dataclasses.replace(params, max_tokens=0)


def test_what_the_caller_keeps_is_not_shared():
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 1.0
    assert params == SamplingParams(stop=["a"], logit_bias={1: 1.0})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 50}, {"temperature": 0}),
        # Llama-3.1-8B-Instruct's file.
        (
            {
                "bos_token_id": 128000,
                "do_sample": True,
                "eos_token_id": [128001, 128008, 128009],
                "temperature": 0.6,
                "top_p": 0.9,
                "transformers_version": "4.42.3",
            },
            {"temperature": 0.6, "top_p": 0.9},
        ),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, {"top_k": 20, "min_p": 0.1}),
        ({"do_sample": True, "temperature": None}, {}),
        (
            {"repetition_penalty": 1.1, "max_new_tokens": 99},
            {"temperature": 0, "repetition_penalty": 1.1, "max_tokens": 99},
        ),
    ],
)
def test_generation_config(config, expected):
    assert SamplingParams.from_generation_config(config) == SamplingParams(**expected)
    given = SamplingParams(**({"max_tokens": None} | expected))
    assert SamplingParams.from_generation_config(config, max_tokens=None) == given


def test_a_bad_generation_config_is_refused():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})


def test_token_ids_beyond_the_vocabulary():
    SamplingParams(logit_bias={99: 1}, stop_token_ids=[99]).check_vocabulary(100)
    SamplingParams().check_vocabulary(100)
    for values in ({"logit_bias": {100: 1}}, {"stop_token_ids": [100]}):
        name = next(iter(values))
        with pytest.raises(ValueError, match=rf"{name} has token ids \[100\]"):
            SamplingParams(**values).check_vocabulary(100)


def test_bad_words_are_tokenized_with_and_without_a_space():
    vocabulary = {"dark": [1], " dark": [2], "a b": [3, 4], " a b": [5, 4], "42": [6], " 42": [6]}
    words = ["dark", " a b", "42"]
    expected = [[1], [2], [3, 4], [5, 4], [6]]
    assert bad_word_ids(words, vocabulary.__getitem__) == expected
    with pytest.raises(ValueError, match="no token"):
        bad_word_ids(["x"], lambda text: [])
