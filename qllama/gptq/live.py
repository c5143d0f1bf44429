"""What a waiting person sees of a run: a row for every Linear, or a line for every layer."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qllama.device import peak_memory
from qllama.gptq.report import LinearReport
from qllama.progress import hidden, on_terminal

_COLUMNS = (
    ("layer", 5), ("module", 16), ("tokens", 8), ("loss/token", 10), ("% of RTN", 8),
    ("damping", 7), ("rung", 6), ("SQNR", 7), ("seconds", 7),
)  # fmt: skip


class Display:
    """Shows nothing. What the others have in common: how far the run is."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.begin(0)

    def begin(self, done: int) -> None:
        """Work on the first of the layers begins that are not `done`."""
        self.done = self._before = done
        self._started = time.monotonic()

    def linear(self, report: LinearReport) -> None:
        """A Linear is quantized."""

    def unit(self, name: str, reports: Sequence[LinearReport]) -> None:
        """All of a layer is quantized and written down."""
        self.done += 1

    def phase(self, text: str) -> None:
        """Something else begins."""

    def status(self) -> str:
        made, left = self.done - self._before, self.total - self.done
        seconds = (time.monotonic() - self._started) / max(made, 1) * left  # layers are alike
        return (
            f"{self.done} of {self.total} layers"
            + (f", {_duration(seconds)} left" if made and left else "")
            + f", {peak_memory() / 1e9:.1f} GB at most"
        )


class Lines(Display):
    """A line for each layer, for a file or a pipe."""

    def unit(self, name: str, reports: Sequence[LinearReport]) -> None:
        super().unit(name, reports)
        measured = [report.figures for report in reports if report.figures.tokens]
        loss = sum(figures.loss for figures in measured)
        rtn = sum(figures.rtn_loss for figures in measured)
        ratio = f"{100 * loss / rtn:.1f}% of RTN's loss, " if rtn > 0 else ""
        seconds = sum(report.seconds for report in reports)
        _write(f"{name}: {ratio}solved in {seconds:.1f} s; {self.status()}")
        for report in reports:
            for note in report.figures.notes:
                _write(f"  {report.path}: {note}")

    def phase(self, text: str) -> None:
        _write(text)


class Table(Display):
    """A table that grows, above a line that says how far the run is."""

    def __init__(self, total: int, console: Any, status: Any) -> None:
        super().__init__(total)
        self._console, self._status = console, status
        self._print("  ".join(f"{name:>{width}}" for name, width in _COLUMNS), style="bold")

    def linear(self, report: LinearReport) -> None:
        self._print("  ".join(
            f"{cell:>{width}}" for cell, (_, width) in zip(_cells(report), _COLUMNS, strict=True)
        ))  # fmt: skip
        for note in report.figures.notes:
            self._print(f"       {note}", style="yellow")

    def unit(self, name: str, reports: Sequence[LinearReport]) -> None:
        super().unit(name, reports)
        self._status.update(f"[dim]{self.status()}[/dim]")

    def phase(self, text: str) -> None:
        self._status.update(f"[dim]{text}[/dim]")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def show(total: int) -> Iterator[Display]:
    """The display that fits stderr, for a run of `total` layers."""
    if hidden():
        yield Display(total)
    elif not on_terminal():
        yield Lines(total)
    else:
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("") as status:
            yield Table(total, console, status)


def _cells(report: LinearReport) -> list[str]:
    figures = report.figures
    measured = figures.tokens > 0
    return [
        "" if report.layer is None else str(report.layer),
        report.module.rpartition(".")[2],
        str(figures.tokens) if measured else "-",
        f"{figures.loss:.4g}" if measured else "-",
        f"{100 * figures.loss_ratio:.1f}",
        f"{figures.dampening_frac:g}",
        figures.rung,
        f"{figures.sqnr_db:.1f} dB",
        f"{report.seconds:.2f}",
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
