"""One sequence to be generated, as the engine sees it: token ids in, token ids out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from qllama.engine.sampling_params import SamplingParams

# "error": the logits were not finite, so there was nothing to choose from.
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TopLogprobs:
    """Log probabilities at one position: of the token there, and of the most likely ones."""

    logprob: float  # of the token there
    rank: int  # of the token there, 1 = most likely
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Burst:
    """What one dispatch produced for one request."""

    tokens: list[int]
    logprobs: list[TopLogprobs]  # empty unless asked for
    finite: bool = True  # False: the logits held NaN, and the tokens mean nothing


@dataclass(eq=False)
class Request:
    """A prompt, how to go on from it, and how far that has come.

    `on_burst` is called with every burst, in order. It returns None to go on, or how many of the
    burst's tokens are kept because a stop string, which the engine cannot see, ended the text.
    """

    prompt: np.ndarray  # int32 [T], T >= 1
    params: SamplingParams
    seed: tuple[int, ...]  # all its randomness: see `sampler.request_key`
    eos_ids: tuple[int, ...] = ()
    max_tokens: int = 16  # already limited by the model's length
    bad_words: tuple[tuple[int, ...], ...] = ()  # params.bad_words, tokenized
    on_burst: Callable[[Burst], int | None] = lambda burst: None

    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)  # from the second token
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token that is not an end token
    submitted: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of cache it may come to need."""
        return len(self.prompt) + self.max_tokens

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end it."""
        eos = () if self.params.ignore_eos else self.eos_ids
        return tuple(dict.fromkeys((*eos, *(self.params.stop_token_ids or ()))))

    def receive(self, burst: Burst) -> None:
        """Append what a dispatch produced and notice the end."""
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        if not burst.finite:
            self.finish("error")
            return
        for i, token in enumerate(burst.tokens):
            long_enough = len(self.output) + i + 1 >= self.params.min_tokens
            if long_enough and token in self.stop_ids:
                burst = Burst(burst.tokens[: i + 1], burst.logprobs[: i + 1])
                is_eos = token in self.eos_ids and not self.params.ignore_eos
                self.stop_reason = None if is_eos else token
                self.finish("stop")
                break
        kept = self.on_burst(burst)
        self.output += burst.tokens[:kept]
        if kept is not None:
            self.stop_reason = None
            self.finish("stop")
        elif self.finish_reason is None and len(self.output) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.monotonic()
