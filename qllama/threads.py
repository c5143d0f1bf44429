"""Work that a thread does beside the caller's: one item ahead of it, or one behind."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast


def look_ahead[T](items: Iterator[T]) -> Generator[T]:
    """`items`, each made by a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        ahead = pool.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, items, end)
            yield cast(T, item)
            del item  # before the next one is waited for


@contextlib.contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """Yields `do(function, *arguments)`, which leaves the call to a thread and comes back once the
    call before it is over; the block ends with the last one. What a call raises, the next `do`
    raises, or the end of the block."""
    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:
        under_way: Future[None] | None = None

        def do(function: Callable[..., None], *arguments: object) -> None:
            nonlocal under_way
            if under_way is not None:
                under_way.result()
            under_way = pool.submit(function, *arguments)

        yield do
        if under_way is not None:
            under_way.result()
