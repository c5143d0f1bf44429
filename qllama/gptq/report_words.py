"""The words and numbers of a report page, as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from qllama.gptq.report import LinearReport, QuantizationReport


def warnings_of(linears: Sequence[LinearReport]) -> list[str]:
    """What stands out among the Linears, and their own notes, each once."""
    solved = [linear for linear in linears if linear.algorithm == "gptq"]
    found: dict[str, list[str]] = {}
    for linear in solved:
        f = linear.figures
        problems = {
            "the error is more than 90 % of rounding to nearest": f.loss_ratio > 0.9,
            "the error is more than 5 % of the output": f.relative_error > 0.05,
            "a few channels are 10,000 times the median": f.diag_ratio > 1e4,
        }
        for problem, present in problems.items():
            if present:
                found.setdefault(problem, []).append(linear.path)
    for linear in linears:
        for note in linear.figures.notes:
            found.setdefault(note, []).append(linear.path)
    return [f"{problem}: {_some(paths)}" for problem, paths in found.items()]


def _some(paths: Sequence[str]) -> str:
    short = [path.removeprefix("model.layers.") for path in paths]
    more = f" and {len(short) - 3} more" if len(short) > 3 else ""
    return ", ".join(short[:3]) + more


def by_module(linears: Sequence[LinearReport]) -> dict[str, list[LinearReport]]:
    """The Linears of every kind, by layer."""
    groups: dict[str, list[LinearReport]] = {}
    for linear in linears:
        groups.setdefault(linear.module, []).append(linear)
    return groups


def place_of(linear: LinearReport) -> str:
    return linear.path if linear.layer is None else f"layer {linear.layer}"


def model_name(report: QuantizationReport) -> str:
    return last_part(report.model) or report.model


def last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def power_of_two(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plain_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_text, value)) or "none"
    return "none" if value is None else str(value)


def size_text(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
