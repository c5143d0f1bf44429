"""`SamplingParams`: how one request wants its tokens chosen, with vLLM's names and meanings."""

import logging
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, Self

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.01  # below it, logits / temperature gets too coarse in float32
MAX_LOGPROBS = 20  # vLLM's default `max_logprobs`
MAX_N = 16384
MAX_LOGIT_BIAS = 100.0
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Values are checked and normalised once, here; `dataclasses.replace` makes a changed copy.

    Args:
        n: number of independent completions of the prompt, 1 to 16384.
        presence_penalty: subtracted once from the logit of a token in the output, -2 to 2.
        frequency_penalty: subtracted for each time a token is in the output, -2 to 2.
        repetition_penalty: 1e-6 to 1e6. The logit of a token in prompt or output is divided by it
            where positive, multiplied where negative.
        temperature: divides the logits; at least 0. 0 is greedy and switches `top_p`, `top_k` and
            `min_p` off; what is above 0 and below 0.01 is raised to 0.01 with a warning.
        top_p: keep the most likely tokens that together have this probability; above 0, at most 1.
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one, 0 to 1.
        seed: makes the result reproducible, whatever else is in the batch. None or -1: not.
        stop: a string or strings that end the text and are left out of it; [] after checking if
            there are none, like the other lists.
        stop_token_ids: tokens that end the text, in addition to the model's end tokens.
        ignore_eos: go on after the model's end tokens.
        max_tokens: of each completion, at least 1. None: until the model's length is used up.
        min_tokens: no end token, and no stop string, before that many tokens.
        logprobs: 0 to 20: log probabilities of that many most likely tokens and the chosen one.
        prompt_logprobs: the same for each token of the prompt.
        detokenize: produce text; without it stop strings cannot be found.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logit_bias: token id to a number added to its logit, clamped to ±100. Ids may be digits in
            a string, as JSON has them.
        bad_words: texts that must not come up: the last token of each is barred where it would
            complete the text.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names the parameter.

    Source: vLLM `vllm/sampling_params.py`.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    bad_words: str | list[str] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": _integer("n", self.n, 1, MAX_N),
            "presence_penalty": _real("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "repetition_penalty": _real("repetition_penalty", self.repetition_penalty, 1e-6, 1e6),
            "temperature": _temperature(self.temperature),
            "top_p": _real("top_p", self.top_p, above=0.0, high=1.0),
            "top_k": max(0, _integer("top_k", self.top_k, -1)),
            "min_p": _real("min_p", self.min_p, 0.0, 1.0),
            "seed": _seed(self.seed),
            "stop": _strings("stop", self.stop),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "max_tokens": _optional("max_tokens", self.max_tokens, 1),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0),
            "logprobs": _optional("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            "prompt_logprobs": _optional("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            "logit_bias": _logit_bias(self.logit_bias),
            "bad_words": _strings("bad_words", self.bad_words),
        }
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            checked[name] = _boolean(name, getattr(self, name))
        if checked["max_tokens"] is not None and checked["min_tokens"] > checked["max_tokens"]:
            raise ValueError(
                f"min_tokens must be at most max_tokens={checked['max_tokens']}, "
                f"got {checked['min_tokens']}"
            )
        if checked["stop"] and not checked["detokenize"]:
            raise ValueError("stop strings are looked for in the text: stop needs detokenize=True")
        if checked["temperature"] == 0.0:
            if checked["n"] > 1:
                raise ValueError(
                    f"n must be 1 with temperature=0, got {checked['n']}: greedy completions of "
                    "one prompt are all the same"
                )
            checked.update(top_p=1.0, top_k=0, min_p=0.0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], *, max_tokens: int | None = 16
    ) -> Self:
        """The defaults that a checkpoint's `generation_config.json` asks for.

        Args:
            config: the parsed file. Without `do_sample: true` the result is greedy, as in
                transformers. End tokens in it are the model's business, not a request's.
            max_tokens: what to use where the file has no `max_new_tokens`.

        Raises:
            ValueError: a value in the file is out of range.
        """
        names = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
        values: dict[str, Any] = {"max_tokens": max_tokens}
        if config.get("do_sample"):
            names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
        else:
            values["temperature"] = 0.0
        values |= {ours: config[hf] for hf, ours in names.items() if config.get(hf) is not None}
        return cls(**values)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `ValueError` where `logit_bias` or `stop_token_ids` has no such token."""
        for name in ("logit_bias", "stop_token_ids"):
            beyond = [token for token in getattr(self, name) or () if token >= vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} has token ids {beyond[:5]}, but the vocabulary has {vocab_size} tokens"
                )


def bad_word_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The token sequences to bar for `words`, each as it begins a text and as it follows a space.

    Args:
        words: texts; leading spaces do not count.
        encode: text to token ids, without special tokens.

    Raises:
        ValueError: a word that is no token at all.
    """
    sequences: list[list[int]] = []
    for word in words:
        forms = [list(encode(prefix + word.lstrip())) for prefix in ("", " ")]
        if not forms[0]:
            raise ValueError(f"bad_words has {word!r}, which the tokenizer turns into no token")
        sequences += filter(None, forms)
    return [ids for i, ids in enumerate(sequences) if ids not in sequences[:i]]


def _temperature(value: Any) -> float:
    temperature = _real("temperature", value, 0.0)
    if 0.0 < temperature < MIN_TEMPERATURE:
        logger.warning(
            "temperature=%s is too small for float32 and raised to %s; 0 is greedy",
            temperature,
            MIN_TEMPERATURE,
        )
        return MIN_TEMPERATURE
    return temperature


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong_type("seed", value, "an integer or None")
    return None if value == -1 else int(value)


def _real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
) -> float:
    """`value` as a finite float in `[low, high]`, or in `(above, high]`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(name, value, "a number")
    try:
        value = float(value)
    except OverflowError:  # an integer beyond every float
        value = math.inf
    inside = low <= value <= high and (above is None or value > above)
    if not (inside and abs(value) <= FLOAT32_MAX):
        bounds = [f"above {above:g}"] if above is not None else []
        bounds += [f"at least {low:g}"] if math.isfinite(low) else []
        bounds += [f"at most {high:g}"] if math.isfinite(high) else []
        raise ValueError(f"{name} must be finite, {' and '.join(bounds)}, got {value:g}")
    return value


def _integer(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong_type(name, value, "an integer")
    integer = int(value)
    if not low <= integer <= high:
        raise ValueError(f"{name} must be at least {low} and at most {high}, got {integer}")
    return integer


def _optional(name: str, value: Any, low: int, high: int = INT32_MAX) -> int | None:
    return None if value is None else _integer(name, value, low, high)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "True or False")
    return value


def _strings(name: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else _items(name, value, "a string or strings")
    for string in strings:
        if not isinstance(string, str):
            raise _wrong_type(name, string, "a string or strings")
        if not string:
            raise ValueError(f"{name} must not contain an empty string")
    return list(dict.fromkeys(strings))


def _token_ids(name: str, value: Any) -> list[int]:
    ids = _items(name, value, "a list of token ids")
    return list(dict.fromkeys(_integer(name, token, 0) for token in ids))


def _items(name: str, value: Any, expected: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong_type(name, value, expected)
    return list(value)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _wrong_type("logit_bias", value, "a dict of token id to number")
    biases = {}
    for token, bias in value.items():
        if isinstance(token, str) and token.isdecimal():
            token = int(token)
        token = _integer("logit_bias key", token, 0)
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or math.isnan(bias):
            raise _wrong_type(f"logit_bias[{token}]", bias, "a number")
        biases[token] = min(max(float(bias), -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)
    return biases


def _wrong_type(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {shown(value)} ({type(value).__name__})")
