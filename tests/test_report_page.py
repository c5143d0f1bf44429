"""The report as a page: what a browser would read in it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from sample_reports import linear, report

from qllama.gptq.charts import bar_chart, line_chart, stacked_bar
from qllama.gptq.report import ScaleHistogram, Seconds
from qllama.gptq.report_page import report_page

VOID = {"meta"}  # which have no end tag
COMPARISON = {
    "kl_mean": 0.12345,
    "kl_p99": 1.5,
    "top1_agreement": 0.785,
    "perplexity_a": 10.0,
    "perplexity_b": 11.0,
    "protocol": "4088 predictions",
}


class Page(HTMLParser):
    """Texts, and tags with their attributes; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if attributes.get("class") == name]


@pytest.fixture(scope="module")
def full() -> Page:
    linears = [
        linear(i, module, loss=1.0 + i)
        for i in range(3)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return Page(report_page(report(*linears), COMPARISON))


def test_the_page_needs_nothing_but_itself(full: Page) -> None:
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in full.tags}
    assert all({"src", "href", "onload"}.isdisjoint(attributes) for _, attributes in full.tags)
    viewport = [a for tag, a in full.tags if tag == "meta" and a.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_the_summary(full: Page) -> None:
    def tile(name: str) -> tuple[str, str]:
        at = full.texts.index(name)
        return full.texts[at + 1], full.texts[at + 2]

    assert full.texts.count("Llama & <Co>") == 1
    assert tile("KL divergence") == ("0.1235", "nats a token; 99 % below 1.500")
    assert tile("Perplexity") == ("11.000", "the original has 10.000, +10.00%")
    assert tile("Same likeliest token")[0] == "78.5%"
    assert tile("Size") == ("108 MB", "of 270 MB, 2.50 times smaller")
    ratio = (0.25 * 0.5 * 0.75) ** (1 / 3)
    assert tile("Error")[0] == f"{ratio:.0%}"
    # Losses 1, 2, 3 of an energy of 1000.
    assert tile("Signal to noise") == ("27.0 dB", "median; the lowest is 25.2 dB")
    assert tile("Time")[0] == "2 min 0 s"
    assert tile("Peak memory") == ("2 GB", "of the process")


def test_every_linear_is_a_point_and_a_row(full: Page) -> None:
    titles = [text for text in full.texts if text.startswith("layer 2: ")]
    assert titles == ["layer 2: 75%", "layer 2: 75%", "layer 2: 25.2 dB", "layer 2: 25.2 dB"]
    assert len(full.of_class("dot")) == 2 * 6
    for i in range(3):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            assert full.texts.count(f"{i}.{module}") == 2  # the worst, and all
    assert len(full.of_class("reference")) == 2


def test_scales_are_counted(full: Page) -> None:
    # 0.001 lies between 2^-10 and 2^-9, 0.002 between 2^-9 and 2^-8; three layers.
    assert full.texts.count("2⁻¹⁰ to 2⁻⁹: 3") == 2
    assert full.texts.count("2⁻⁹ to 2⁻⁸: 6") == 2


def test_sizes(full: Page) -> None:
    at = full.texts.index("mlp.up_proj")
    assert full.texts[at : at + 4] == ["mlp.up_proj", "W4A16", "262 MB", "100 MB"]


def test_what_stands_out_is_told() -> None:
    linears = [
        linear(0, "mlp.up_proj", loss=3.9),
        linear(1, "mlp.up_proj", loss=3.9),
        linear(0, "mlp.down_proj", output_energy=10.0),
        linear(2, "mlp.down_proj", diag_ratio=2e4, notes=("kept round-to-nearest: <why>",)),
    ]
    texts = Page(report_page(report(*linears, notes=("a <note>",)))).texts
    assert "a <note>" in texts
    assert (
        "the error is more than 90 % of rounding to nearest: 0.mlp.up_proj, 1.mlp.up_proj" in texts
    )
    assert "the error is more than 5 % of the output: 0.mlp.down_proj" in texts
    assert "a few channels are 10,000 times the median: 2.mlp.down_proj" in texts
    assert "kept round-to-nearest: <why>: 2.mlp.down_proj" in texts


def test_a_run_without_calibration() -> None:
    rounded = [linear(i, "mlp.up_proj", algorithm="rtn", rung="rtn", loss=4.0) for i in range(2)]
    page = Page(report_page(report(*rounded, calibration=None)))
    assert "Error against rounding to nearest" not in page.texts
    assert "Worth knowing" not in page.texts
    assert "Signal to quantization noise" in page.texts
    assert "KL divergence" not in page.texts


def test_figures_that_are_not_numbers() -> None:
    exact = linear(0, "mlp.up_proj", loss=0.0, rtn_loss=0.0)
    page = Page(
        report_page(report(exact, replace(exact, scales=ScaleHistogram(first=0, counts=()))))
    )
    assert "exact" in page.texts
    empty = Page(report_page(report(seconds=Seconds())))
    assert "All 0 Linears" in empty.texts


# -- charts ----------------------------------------------------------------------------------------


def points(chart: str) -> Iterator[tuple[float, float]]:
    for tag, attributes in Page(chart).tags:
        if tag == "circle":
            yield float(attributes["cx"] or "nan"), float(attributes["cy"] or "nan")


def test_lines_are_to_scale() -> None:
    chart = line_chart(
        [0.0, 50.0, math.nan, 100.0], ["a", "b", "c", "d"], low=0, high=100, unit="%", reference=25
    )
    (xa, ya), (xb, yb), (xd, yd) = points(chart)
    assert xd - xa == pytest.approx(3 * (xb - xa), abs=0.2)
    assert ya - yd == pytest.approx(2 * (ya - yb), abs=0.2)
    (line,) = Page(chart).of_class("reference")
    assert float(line["y1"] or "nan") == pytest.approx(ya + (yd - ya) / 4, abs=0.1)
    assert "nan" not in chart


def test_bars_are_to_scale() -> None:
    bars = Page(bar_chart([1, 0, 4], ["p", "q", "r", "s"])).of_class("bar")
    heights = [float(bar["height"] or "nan") for bar in bars]
    assert heights == pytest.approx([heights[2] / 4, 0, heights[2]], abs=0.1)
    assert "r to s: 4" in Page(bar_chart([1, 0, 4], ["p", "q", "r", "s"])).texts


def test_stacked_bar_is_to_scale() -> None:
    page = Page(stacked_bar([("one", 1.0), ("none", 0.0), ("three", 3.0)]))
    widths = [float(attributes["width"] or "nan") for tag, attributes in page.tags if tag == "rect"]
    assert widths[1] == 0
    assert widths[2] + 1 == pytest.approx(3 * (widths[0] + 1), abs=0.1)
