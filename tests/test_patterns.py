"""Regular expressions of configs: the answers of `re`, and none that takes for ever."""

import contextlib
import re
import time

import pytest
from qllama_convert.patterns import compile_pattern

from qllama.errors import CheckpointError

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "lm_head",
    "",
    "aab\n",
    "é1_ .",
]


def matches(text: str, path: str) -> bool:
    return compile_pattern(text, "config.json: ignore").match(path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "text",
    [
        "", ".*", "lm_head", "lm", "head", "^lm_head$", r"\Alm_head\Z", r"model\.", "model..ayers",
        r".*self_attn.*proj$", r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj", ".*(q|k|v)_proj",
        r"^(?!.*lm_head).*", "(?=model).*proj", r".*layers\.(0|1[0-5])\..*", "[^m]+", "[a-m_]+d$",
        r".*\.[\w]+_proj\b", r"\D+\d\D*$", r"\W?\S+?", "a{2}b$", "a{0,2}b", "a{3,}", "(a|ab)(b|)$",
        "(aab)?.*x?$", r"(?:\w+\.)*mlp", "^$", "(?P<name>l)m", "[]a]", "a+?b", "()*", "(|a)+b",
        "(^a)*", "($)*", "[^\\W\\d]", "|x", ".{4,}$", ".", "(?!)", ".*.*.*.*_proj",
    ],
)  # fmt: skip
def test_it_matches_what_re_matches(text: str, path: str) -> None:
    assert matches(text, path) == bool(re.match(text, path))


@pytest.mark.parametrize("text", [r"^(([a-z_.0-9])+.)+!", "(.*.*)*!", "(.|..)*[!?]"])
def test_no_expression_takes_for_ever(text: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(CheckpointError):
        assert not matches(text, PATHS[0] * 4)
    assert time.monotonic() - start < 10


def test_an_expression_that_takes_too_long_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"config.json: ignore: .* takes longer than 1 s"):
        matches("(a|a)*[bc]", "a" * 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "no regular expression: missing"),
        ("a**", "multiple repeat"),
        ("a" * 2000, "at most 1000 characters"),
        ("(?:(?:(?:.?){1000}){1000}){1000}!", "at most 100 times"),  # else takes all memory
        ("(?:a|b){4000000000}", "at most 100 times"),
        ("(?:(?:a{9}){0,9}){,9}", "at most 100 times"),
        ("(" * 400 + ")" * 400, "recursion"),
    ],
)
def test_what_is_refused_says_why(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        compile_pattern(text, "config.json: ignore")
    assert str(refusal.value).startswith("config.json: ignore: ")
    assert len(str(refusal.value)) < 200
