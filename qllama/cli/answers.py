"""Text that is written while it is generated."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllama.llm import LLM
    from qllama.outputs import RequestOutput


def chat_prompt(llm: "LLM", messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A conversation as a prompt for `LLM.stream`, rendered by the chat template.

    Raises:
        ValueError: there is no tokenizer or chat template, or it refuses the messages.
    """
    from qllama.tokenizer import encode_chat

    if llm.tokenizer is None:
        raise ValueError("the checkpoint folder has no tokenizer, which a conversation needs")
    ids = encode_chat(llm.tokenizer, messages)
    return {"prompt": llm.tokenizer.decode(ids), "prompt_token_ids": ids}


def write_stream(
    pieces: "Iterator[RequestOutput]",
    *,
    echo: str = "",
    stopped: Callable[[], bool] = lambda: False,
) -> "tuple[str, RequestOutput]":
    """Write text to stdout as it comes, and a line break after it.

    Args:
        pieces: of a single completion, from `LLM.stream`.
        echo: written before the first piece.
        stopped: asked after each piece whether the user has had enough.

    Returns:
        The whole text without `echo`, and the last piece.
    """
    from qllama.progress import no_progress

    texts: list[str] = []
    piece = next(pieces)
    with no_progress(), contextlib.ExitStack() as writing:
        writing.callback(_end_line, texts)
        sys.stdout.write(echo)
        while True:
            texts.append(piece.outputs[0].text)
            sys.stdout.write(texts[-1])
            sys.stdout.flush()
            if piece.finished or stopped():
                return "".join(texts), piece
            piece = next(pieces)


def check_finite(output: "RequestOutput") -> None:
    """Raise `ValueError` if the text ended because the model computed NaN."""
    if any(completion.finish_reason == "error" for completion in output.outputs):
        raise ValueError(
            "the model computed NaN, and the text ended there; --dtype float32 has more range, and "
            "if that does not help the checkpoint is broken"
        )


def _end_line(texts: list[str]) -> None:
    if not "".join(texts).endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
