"""What a waiting person sees: on a terminal's stderr, and nowhere else."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_hidden = ContextVar("_hidden", default=False)


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def hidden() -> bool:
    """Whether nothing is to be shown, see `no_progress`."""
    return _hidden.get()


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """Show neither spinner nor bar while the block runs: they wipe the line that text is on."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Show a spinner and `what` while the block runs."""
    if _hidden.get() or not on_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"[dim]{what}[/dim]"):
        yield


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, show: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar. The block is given `advance(steps=1, note="")`."""
    if not show or _hidden.get() or not on_terminal():
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total, note="")
        yield lambda steps=1, note="": bars.update(task, advance=steps, note=note)
