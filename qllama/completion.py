"""From the token ids that requests receive to the outputs a user is given."""

from collections.abc import Sequence
from typing import Any

from qllama.engine.detokenizer import Detokenizer
from qllama.engine.request import Burst, Request, TopLogprobs
from qllama.engine.stop import StopChecker
from qllama.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)


class Completion:
    """The text of one request as it grows, and where a stop string ends it."""

    def __init__(self, index: int, request: Request, tokenizer: Any | None) -> None:
        self.index = index
        self.request = request
        self.tokenizer = tokenizer
        self.text = ""
        self.logprobs: list[PositionLogprobs] = []
        self.cumulative_logprob = 0.0
        self.stop_string: str | None = None
        params = request.params
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                request.prompt.tolist(),
                skip_special_tokens=params.skip_special_tokens,
            )
        self._stop = StopChecker(
            params.stop or (),
            include=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._reported = (0, 0, 0.0)  # characters, tokens and log probability already in `news`
        self._flushed = False
        request.on_burst = self.receive

    def receive(self, burst: Burst) -> int | None:
        """Take what a dispatch produced; see `Request.on_burst`."""
        kept = None
        if self._detokenizer is not None:
            if self._stop.active:
                texts = [self._detokenizer.step([token]) for token in burst.tokens]
            else:
                texts = [self._detokenizer.step(burst.tokens)]
            checked = self._stop.step(texts)
            self.text += checked.text
            if checked.stop is not None:
                self.stop_string = checked.stop
                kept = checked.num_tokens
        for token, at in zip(burst.tokens[:kept], burst.logprobs[:kept], strict=False):
            self.logprobs.append(_position(token, at, self.tokenizer))
            self.cumulative_logprob += at.logprob
        return kept

    def whole(self) -> CompletionOutput:
        """Everything so far."""
        return self._output((0, 0, 0.0))

    def news(self) -> CompletionOutput:
        """What has come since the last call."""
        reported = self._reported
        output = self._output(reported)
        self._reported = (len(self.text), len(self.request.output), self.cumulative_logprob)
        return output

    def _output(self, since: tuple[int, int, float]) -> CompletionOutput:
        request = self.request
        if request.finish_reason is not None and not self._flushed:
            self._flushed = True
            if self._detokenizer is not None and self.stop_string is None:
                self.text += self._stop.flush() + self._detokenizer.flush()
        characters, tokens, logprob = since
        asked = request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text[characters:],
            token_ids=request.output[tokens:],
            cumulative_logprob=self.cumulative_logprob - logprob if asked else None,
            logprobs=self.logprobs[tokens:] if asked else None,
            finish_reason=request.finish_reason,
            stop_reason=self.stop_string or request.stop_reason,
        )


class Job:
    """One prompt and its n completions."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        requests: Sequence[Request],
        tokenizer: Any | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.requests = requests
        self.tokenizer = tokenizer
        self._completions = {
            id(request): Completion(index, request, tokenizer)
            for index, request in enumerate(requests)
        }

    def output(self) -> RequestOutput:
        """All of it."""
        return self._output([completion.whole() for completion in self._completions.values()])

    def news(self, request: Request) -> RequestOutput:
        """What the completion of one of its requests got since it was asked last."""
        return self._output([self._completions[id(request)].news()])

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        first = self.requests[0]
        prompt = first.prompt.tolist()
        prompt_logprobs: list[PositionLogprobs | None] | None = None
        if first.params.prompt_logprobs is not None:
            known = zip(prompt[1:], first.prompt_logprobs, strict=False)
            prompt_logprobs = [None, *(_position(*pair, self.tokenizer) for pair in known)]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=prompt,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=all(request.finish_reason is not None for request in self.requests),
            metrics=self._metrics(),
        )

    def _metrics(self) -> RequestMetrics:
        def over_all(choose: Any, name: str) -> float | None:
            times = [getattr(request, name) for request in self.requests]
            return choose((time for time in times if time is not None), default=None)

        finished = all(request.finished is not None for request in self.requests)
        return RequestMetrics(
            arrival_time=self.requests[0].submitted,
            first_scheduled_time=over_all(min, "scheduled"),
            first_token_time=over_all(min, "first_token"),
            last_token_time=over_all(max, "last_token"),
            finished_time=over_all(max, "finished") if finished else None,
            num_prompt_tokens=len(self.requests[0].prompt),
            num_generation_tokens=sum(len(request.output) for request in self.requests),
        )


def _position(token: int, at: TopLogprobs, tokenizer: Any | None) -> PositionLogprobs:
    """The engine's record of one position, the token there first, with decoded tokens."""

    def logprob(token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, None if tokenizer is None else tokenizer.decode([token]))

    position = {token: logprob(token, at.logprob, at.rank)}
    for rank, (top, value) in enumerate(zip(at.top_ids, at.top_logprobs, strict=True), start=1):
        position.setdefault(top, logprob(top, value, rank))
    return position
