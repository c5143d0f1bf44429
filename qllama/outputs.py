"""What a request gives back, with vLLM's names (`vllm/outputs.py`, `vllm/logprobs.py`)."""

from dataclasses import dataclass

from qllama.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position, under the model's raw logits."""

    logprob: float
    rank: int  # 1 is the most likely token
    decoded_token: str | None = None


# Of one position: token id to `Logprob`, the actual token first, then the most likely ones.
PositionLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One completion of a prompt; what `stream` yields holds only what is new."""

    index: int  # 0 to n - 1
    text: str
    token_ids: list[int]  # the stop token included
    cumulative_logprob: float | None = None  # with SamplingParams.logprobs
    logprobs: list[PositionLogprobs] | None = None  # one for each of token_ids
    finish_reason: FinishReason | None = None  # None: goes on
    # The stop string or the id from `stop_token_ids` that ended it; None for the model's own.
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        """Whether the completion has ended."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times in seconds of a monotonic clock, None until they come; counts of tokens."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_generation_tokens: int = 0  # of all completions

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first work on it."""
        return _difference(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return _difference(self.arrival_time, self.first_token_time)


@dataclass
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None  # None: given as token ids
    prompt_token_ids: list[int]
    # One for each prompt token, the first None: nothing predicts it.
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        """Tokens of the prompt that the prefix cache had."""
        return None if self.metrics is None else self.metrics.num_cached_tokens


def _difference(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
