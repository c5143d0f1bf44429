"""From the token ids a request receives to the text a user is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qllama.engine.detokenizer import Detokenizer
from qllama.engine.request import Burst, PositionLogprobs, Request
from qllama.engine.stop import StopChecker
from qllama.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


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
        self.completions = {
            id(request): Completion(index, request, tokenizer)
            for index, request in enumerate(requests)
        }

    def output(self) -> RequestOutput:
        """All of it."""
        return self._output([c.whole() for c in self.completions.values()])

    def news(self, request: Request) -> RequestOutput:
        """What the completion of `request` has got since it was asked last."""
        return self._output([self.completions[id(request)].news()])

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput: ...
