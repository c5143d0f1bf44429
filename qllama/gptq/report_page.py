"""A quantization report as a page for people: one HTML file that needs no network and no script."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from statistics import geometric_mean, median
from typing import Any

from qllama.gptq.charts import bar_chart, line_chart, stacked_bar
from qllama.gptq.report import LinearReport, QuantizationReport
from qllama.gptq.report_words import (
    by_module,
    duration_text,
    last_part,
    model_name,
    place_of,
    plain_text,
    power_of_two,
    size_text,
    warnings_of,
)

_WORST = 8  # Linears that are listed before one asks for all
_PHASES = {
    "forward": "running the layers",
    "hessian": "second moments and observers",
    "factor": "factors of the second moments",
    "solve": "scales and codes",
    "io": "waiting for files",
}


def report_page(report: QuantizationReport, comparison: Mapping[str, Any] | None = None) -> str:
    """The report as HTML.

    Args:
        report: of a run of `qllama.quantize`.
        comparison: the fields of the `ComparisonResult` of the original and what was made of it,
            if they have been compared.
    """
    title = f"{model_name(report)}: {report.scheme}"
    sections = [
        _head(report),
        _tiles(_comparison_tiles(comparison) + _summary_tiles(report)),
        _notes([*report.notes, *warnings_of(report.linears)]),
        _errors(report.linears),
        _signal(report.linears),
        _worst(report.linears),
        _histograms(report.linears),
        _sizes(report),
        _cost(report),
        _facts(report, comparison),
        _everything(report.linears),
    ]
    style = resources.files("qllama.gptq").joinpath("report_page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


# -- the sections ----------------------------------------------------------------------------------


def _head(report: QuantizationReport) -> str:
    data = report.calibration
    source = "without calibration data"
    if data is not None:
        source = (
            f"with {data.tokens:,} tokens of {last_part(data.source)}, {data.sequences:,} sequences"
        )
    return (
        f"<h1>{escape(model_name(report))}</h1>\n<p>Quantized to <b>{escape(report.scheme)}</b> "
        f"({escape(report.format)}) {escape(source)}, on {escape(report.device)}.</p>"
    )


def _summary_tiles(report: QuantizationReport) -> list[tuple[str, str, str]]:
    before, after = report.bytes_before, report.bytes_after
    tiles = [
        (
            "Size",
            size_text(after),
            f"of {size_text(before)}, {before / max(after, 1):.2f} times smaller",
        )
    ]
    solved = [r.figures.loss_ratio for r in report.linears if r.algorithm == "gptq"]
    solved = [ratio for ratio in solved if ratio > 0]
    if solved:
        mean = geometric_mean(solved)
        tiles.append(("Error", f"{mean:.0%}", "of rounding to nearest, geometric mean"))
    decibels = [r.figures.sqnr_db for r in report.linears if math.isfinite(r.figures.sqnr_db)]
    if decibels:
        lowest = f"median; the lowest is {min(decibels):.1f} dB"
        tiles.append(("Signal to noise", f"{median(decibels):.1f} dB", lowest))
    tiles.append(("Time", duration_text(report.seconds.total), f"{len(report.linears)} Linears"))
    if report.peak_device_bytes is not None:
        host = f"of the device; host {size_text(report.peak_host_bytes)}"
        tiles.append(("Peak memory", size_text(report.peak_device_bytes), host))
    else:
        tiles.append(("Peak memory", size_text(report.peak_host_bytes), "of the process"))
    return tiles


def _comparison_tiles(comparison: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    if comparison is None:
        return []
    a, b = comparison["perplexity_a"], comparison["perplexity_b"]
    return [
        (
            "KL divergence",
            f"{comparison['kl_mean']:.4f}",
            f"nats a token; 99 % below {comparison['kl_p99']:.3f}",
        ),
        ("Perplexity", f"{b:.3f}", f"the original has {a:.3f}, {b / a - 1:+.2%}"),
        ("Same likeliest token", f"{comparison['top1_agreement']:.1%}", "of all predictions"),
    ]


def _tiles(tiles: Iterable[tuple[str, str, str]]) -> str:
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Worth knowing</h2>\n<ul class="notes">{items}</ul>'


def _errors(linears: Sequence[LinearReport]) -> str:
    solved = [linear for linear in linears if linear.algorithm == "gptq"]
    if not solved:
        return ""
    high = max(100.0, *(100 * linear.figures.loss_ratio for linear in solved))
    panels = [
        _panel(
            module,
            line_chart(
                [100 * r.figures.loss_ratio for r in members],
                [place_of(r) for r in members],
                low=0,
                high=high,
                unit="%",
                reference=100,
            ),
        )
        for module, members in by_module(solved).items()
    ]
    return _section(
        "Error against rounding to nearest",
        "The mean squared error of each Linear's output on the calibration tokens, in percent of "
        "what rounding to nearest (the dashed line) gives. Lower is better.",
        panels,
    )


def _signal(linears: Sequence[LinearReport]) -> str:
    found = [r.figures.sqnr_db for r in linears if math.isfinite(r.figures.sqnr_db)]
    if not found:
        return ""
    low, high = 10 * math.floor(min(found) / 10), 10 * math.ceil(max(found) / 10)
    panels = [
        _panel(
            module,
            line_chart(
                [r.figures.sqnr_db for r in members],
                [place_of(r) for r in members],
                low=low,
                high=high,
                unit=" dB",
            ),
        )
        for module, members in by_module(linears).items()
    ]
    return _section(
        "Signal to quantization noise",
        "The energy of each Linear's output over that of its error, in decibels. Higher is "
        "better: 20 dB are an error of 1 %, 30 dB of 0.1 %.",
        panels,
    )


def _worst(linears: Sequence[LinearReport]) -> str:
    ranked = sorted(linears, key=lambda linear: -linear.figures.relative_error)[:_WORST]
    return (
        "<h2>Where most was lost</h2>\n<p class='quiet'>The Linears with the largest error "
        "relative to their output.</p>\n" + _table(ranked)
    )


def _histograms(linears: Sequence[LinearReport]) -> str:
    found = [linear.scales for linear in linears if linear.scales.counts]
    if not found:
        return ""
    first = min(scales.first for scales in found)
    last = max(scales.first + len(scales.counts) for scales in found)
    edges = [power_of_two(i) for i in range(first, last + 1)]
    panels = []
    for module, members in by_module(linears).items():
        counts = [0] * (last - first)
        for scales in (linear.scales for linear in members):
            for i, count in enumerate(scales.counts, start=scales.first - first):
                counts[i] += count
        panels.append(_panel(module, bar_chart(counts, edges)))
    return _section(
        "Scales",
        "How many scales there are between one power of two and the next, in all layers together. "
        "A few far from the rest belong to outliers.",
        panels,
    )


def _sizes(report: QuantizationReport) -> str:
    head = '<th>modules</th><th>stored as</th><th class="n">before</th><th class="n">after</th>'
    rows = "".join(
        f'<tr><td>{escape(size.module)}</td><td class="scheme">{escape(size.scheme)}</td>'
        f'<td class="n">{size_text(size.bytes_before)}</td>'
        f'<td class="n">{size_text(size.bytes_after)}</td></tr>'
        for size in sorted(report.sizes, key=lambda size: -size.bytes_after)
    )
    return f'<h2>Sizes</h2>\n<div class="table"><table><tr>{head}</tr>{rows}</table></div>'


def _cost(report: QuantizationReport) -> str:
    phases = [(what, getattr(report.seconds, name)) for name, what in _PHASES.items()]
    legend = "".join(
        f'<li><svg viewBox="0 0 1 1"><rect class="part{i}" width="1" height="1"/></svg>'
        f"{escape(what)}: {duration_text(seconds)}</li>"
        for i, (what, seconds) in enumerate(phases)
    )
    memory = f"host {size_text(report.peak_host_bytes)}"
    if report.peak_device_bytes is not None:
        memory += f", device {size_text(report.peak_device_bytes)}"
    return (
        f"<h2>Time and memory</h2>\n<div class='panel stack'>{stacked_bar(phases)}"
        f'<ul class="legend">{legend}</ul></div>\n'
        f"<p class='quiet'>Peak memory: {memory}.</p>"
    )


def _facts(report: QuantizationReport, comparison: Mapping[str, Any] | None) -> str:
    rows = [("Model", report.model), ("Output", report.output), ("Device", report.device)]
    if report.calibration is not None:
        rows.append(("Calibration", f"{report.calibration.source}"))
        rows.append(("Digest of its tokens", report.calibration.digest))
    rows += [(f"Recipe: {key}", plain_text(value)) for key, value in report.recipe.items()]
    if comparison is not None:
        rows.append(("Compared on", comparison["protocol"]))
    rows.append(("Versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())))
    cells = "".join(
        f'<tr><th>{escape(name)}</th><td class="code">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<h2>How it was made</h2>\n<div class="table"><table>{cells}</table></div>'


def _everything(linears: Sequence[LinearReport]) -> str:
    return f"<details><summary>All {len(linears)} Linears</summary>{_table(linears)}</details>"


# -- their parts -----------------------------------------------------------------------------------


def _section(title: str, text: str, panels: Sequence[str]) -> str:
    if not panels:
        return ""
    return (
        f"<h2>{escape(title)}</h2>\n<p class='quiet'>{escape(text)}</p>\n"
        f'<div class="panels">{"".join(panels)}</div>'
    )


def _panel(title: str, chart: str) -> str:
    return f'<figure class="panel"><h3>{escape(title)}</h3>{chart}</figure>'


def _table(linears: Sequence[LinearReport]) -> str:
    titles = ("error", "of RTN's", "SQNR", "damping", "rung", "clipped", "s")
    numbers_head = "".join(f'<th class="n">{title}</th>' for title in titles)
    head = f"<th>Linear</th>{numbers_head}<th>scheme</th>"
    rows = []
    for linear in linears:
        f = linear.figures
        numbers = (
            f"{100 * f.relative_error:.2g}%",
            f"{f.loss_ratio:.0%}" if linear.algorithm == "gptq" else "",
            f"{f.sqnr_db:.1f} dB" if math.isfinite(f.sqnr_db) else "exact",
            f"{f.dampening_frac:g}" if linear.algorithm == "gptq" else "",
            f.rung,
            f"{f.clipped:.2%}",
            f"{linear.seconds:.2f}",
        )
        path = linear.path.removeprefix("model.layers.")
        cells = "".join(f'<td class="n">{escape(number)}</td>' for number in numbers)
        scheme = f'<td class="scheme">{escape(linear.scheme)}</td>'
        rows.append(f"<tr><td>{escape(path)}</td>{cells}{scheme}</tr>")
    return f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
