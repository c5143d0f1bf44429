"""Several engines as one: the requests of a batch are spread over them, their loops run in threads.

A request's output is its own seed's and prompt's alone, so which engine runs it does not show.
"""

import contextvars
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from qllama.engine.engine import Engine
from qllama.engine.request import Request


def run_together(engines: Sequence[Engine], requests: Sequence[Request]) -> Iterator[Request]:
    """As `Engine.run`, with all of `engines` at once; each request's news come in order.

    An error of one engine stops the others after their present dispatch, and is raised here.
    """
    if len(engines) == 1:
        yield from engines[0].run(requests)
        return
    news: SimpleQueue[Request | Future[None]] = SimpleQueue()
    abandoned = threading.Event()

    def work(engine: Engine, share: list[Request]) -> None:
        for request in engine.run(share):
            news.put(request)
            if abandoned.is_set():
                return

    with ThreadPoolExecutor(len(engines)) as pool:
        try:
            for engine, share in zip(engines, spread(requests, len(engines)), strict=True):
                context = contextvars.copy_context()
                pool.submit(context.run, work, engine, share).add_done_callback(news.put)
            running = len(engines)
            while running:
                match news.get():
                    case Request() as request:
                        yield request
                    case ended:
                        ended.result()
                        running -= 1
        finally:
            abandoned.set()


def spread(requests: Sequence[Request], count: int) -> list[list[Request]]:
    """`requests` as `count` shares in order: each goes where there are the fewest tokens so far."""
    shares: list[list[Request]] = [[] for _ in range(count)]
    tokens = [0] * count
    for request in requests:
        least = tokens.index(min(tokens))
        shares[least].append(request)
        tokens[least] += request.total_tokens
    return shares
