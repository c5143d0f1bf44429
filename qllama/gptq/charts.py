"""Small charts as inline SVG, in the colours of a style sheet: lines, bars, one stacked bar."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 300, 115  # of a panel, in SVG units; a phone shows one such panel per row
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 20  # margins, where the labels are


def line_chart(
    values: Sequence[float],
    labels: Sequence[str],
    *,
    low: float,
    high: float,
    unit: str,
    reference: float | None = None,
) -> str:
    """Values one after the other, with a dashed line at `reference`.

    Args:
        values: those that are not finite are left out.
        labels: of each value; the first and the last are written below the axis.
        low: of the axis, `high` its other end; both may be equal.
        unit: written after the numbers, such as " dB".
        reference: None: no such line.
    """
    xs = _positions(len(values))
    points = [
        (x, _height(value, low, high), value, label)
        for x, value, label in zip(xs, values, labels, strict=True)
        if math.isfinite(value)
    ]
    parts = _axis(low, high, unit, labels)
    if reference is not None:
        y = _height(reference, low, high)
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" {_ys(y, y)}/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    parts.append(f'<polyline class="line" points="{path}"/>')
    for x, y, value, label in points:
        title = f"<title>{escape(label)}: {_number(value)}{escape(unit)}</title>"
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2">{title}</circle>')
    return _svg(parts, HEIGHT)


def bar_chart(counts: Sequence[int], edges: Sequence[str]) -> str:
    """A histogram: each count lies between two of `edges`, of which there is one more.

    The first and the last edge are written below the axis.
    """
    high = max(counts, default=0)
    width = (WIDTH - _LEFT - _RIGHT) / max(len(counts), 1)
    parts = _axis(0, high, "", edges)
    for i, count in enumerate(counts):
        y = _height(count, 0, high)
        title = f"<title>{escape(edges[i])} to {escape(edges[i + 1])}: {count:,}</title>"
        parts.append(
            f'<rect class="bar" x="{_LEFT + i * width:.1f}" y="{y:.1f}" width="{width * 0.9:.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}">{title}</rect>'
        )
    return _svg(parts, HEIGHT)


def stacked_bar(shares: Sequence[tuple[str, float]]) -> str:
    """One bar over the whole width, of parts that have a name and a size above zero."""
    total = sum(size for _, size in shares) or 1.0
    parts, x = [], 0.0
    for i, (name, size) in enumerate(shares):
        width = WIDTH * size / total
        title = f"<title>{escape(name)}: {size / total:.0%}</title>"
        parts.append(
            f'<rect class="part{i}" x="{x:.2f}" y="0" width="{max(width - 1, 0):.2f}" height="14">'
            f"{title}</rect>"
        )
        x += width
    return _svg(parts, 14, stretch=True)


def _positions(count: int) -> list[float]:
    step = (WIDTH - _LEFT - _RIGHT) / max(count - 1, 1)
    return [_LEFT + i * step for i in range(count)]


def _height(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * min(max(share, 0.0), 1.0)


def _axis(low: float, high: float, unit: str, labels: Sequence[str]) -> list[str]:
    """Three grid lines with their numbers, and what stands at both ends of the other axis."""
    parts = []
    for value in dict.fromkeys((low, (low + high) / 2, high)):
        y = _height(value, low, high)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" {_ys(y, y)}/>')
        text = _number(value) + ("" if len(unit) > 2 else unit)
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    ends = [("start", _LEFT, labels[:1]), ("end", WIDTH - _RIGHT, labels[1:][-1:])]
    for anchor, x, label in ends:
        for text in label:
            parts.append(
                f'<text x="{x}" y="{HEIGHT - 4}" text-anchor="{anchor}">{escape(text)}</text>'
            )
    return parts


def _ys(y1: float, y2: float) -> str:
    return f'y1="{y1:.1f}" y2="{y2:.1f}"'


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def _svg(parts: Sequence[str], height: int, *, stretch: bool = False) -> str:
    scaling = ' preserveAspectRatio="none"' if stretch else ""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img"{scaling}>{"".join(parts)}</svg>'
