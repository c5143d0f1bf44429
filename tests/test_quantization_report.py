"""The report of a run: what is written is read again, and nothing else is."""

import json
import re

import numpy as np
import pytest
import sample_reports

from qllama.cli.quantize import summary
from qllama.gptq.report import QuantizationReport, ScaleHistogram, Seconds


def a_report(*, loss: float = 2.0) -> QuantizationReport:
    linear = sample_reports.linear(3, "mlp.down_proj", loss, notes=("1 token was left out",))
    seconds = Seconds(forward=1.0) + Seconds(forward=1.0, io=0.5)
    return sample_reports.report(linear, seconds=seconds, notes=("a note",))


def test_report_survives_json() -> None:
    report = a_report()
    assert QuantizationReport.from_json(report.to_json()) == report
    written = json.loads(report.to_json())
    nothing = dict.fromkeys(("hessian", "factor", "solve"), 0.0)
    assert written["seconds"] == {"forward": 2.0, **nothing, "io": 0.5}
    assert written["linears"][0]["figures"]["loss_ratio"] == 0.5
    assert (report.bytes_before, report.bytes_after) == (270_000_000, 108_000_000)
    assert report.linears[0].module == "mlp.down_proj"


def test_a_weight_without_loss_has_no_number_of_decibels() -> None:
    text = a_report(loss=0.0).to_json()
    assert json.loads(text)["linears"][0]["figures"]["sqnr_db"] is None
    assert QuantizationReport.from_json(text) == a_report(loss=0.0)


def test_histogram_counts_powers_of_two() -> None:
    histogram = ScaleHistogram.of(np.float32([[0.25, 0.3, 0.49, 0.5], [1.0, 1.99, 0.0, 2.0]]))
    assert histogram == ScaleHistogram(first=-2, counts=(3, 1, 2, 1))
    assert ScaleHistogram.of(np.zeros((2, 1), np.float16)).counts == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no quantization report"),
        ("[]", "no quantization report"),
        ("{}", "no quantization report"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "damaged"),
    ],
)
def test_other_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        QuantizationReport.from_json(text)


def test_unknown_and_missing_fields_are_refused() -> None:
    value = json.loads(a_report().to_json())
    for damaged in (value | {"other": 1}, {k: v for k, v in value.items() if k != "device"}):
        with pytest.raises(ValueError, match="damaged"):
            QuantizationReport.from_json(json.dumps(damaged))


def test_the_command_says_where_all_of_the_time_went() -> None:
    report = sample_reports.report(sample_reports.linear(0, "mlp.up_proj"))
    (line,) = [line for line in summary(report, dry_run=False).splitlines() if "forward" in line]
    total, *parts = map(int, re.findall(r"\d+", line))
    assert (total, sum(parts)) == (120, 120)
