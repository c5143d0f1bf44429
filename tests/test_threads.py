"""What threads do beside their caller."""

import threading
from collections.abc import Iterator

import pytest

from qllama.threads import look_ahead, one_behind


def test_an_item_is_made_while_the_one_before_is_in_use() -> None:
    begun = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i, event in enumerate(begun):
            event.set()
            yield i

    for i in look_ahead(items()):
        assert all(event.wait(10) for event in begun[: i + 2])
        assert not any(event.is_set() for event in begun[i + 2 :])


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    ahead = look_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no more"):
        next(ahead)


def test_a_call_is_left_behind_and_the_last_is_waited_for() -> None:
    gate, done = threading.Event(), []

    def call(name: str) -> None:
        assert gate.wait(10)
        done.append(name)

    with one_behind() as behind:
        behind(call, "first")
        assert done == []
        gate.set()
        behind(call, "second")
        assert "first" in done
    assert done == ["first", "second"]


@pytest.mark.parametrize("calls_more", [True, False])
def test_what_a_call_raises_reaches_the_caller(calls_more: bool) -> None:
    def fail() -> None:
        raise OSError("disk full")

    def leave_behind() -> None:
        with one_behind() as behind:
            behind(fail)
            if calls_more:
                behind(print)
                pytest.fail("the call before had failed")

    with pytest.raises(OSError, match="disk full"):
        leave_behind()
