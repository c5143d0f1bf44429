"""The report of a run: what is written is read again, and nothing else is."""

import json

import numpy as np
import pytest

from qllama.gptq.linear import GPTQReport
from qllama.gptq.report import (
    CalibrationReport,
    LinearReport,
    ModuleSize,
    QuantizationReport,
    ScaleHistogram,
    Seconds,
)


def a_report(*, loss: float = 0.25) -> QuantizationReport:
    figures = GPTQReport(
        shape=(8, 4),
        tokens=100,
        dropped_tokens=1,
        dead_columns=2,
        diag_ratio=3.5,
        dampening_frac=0.01,
        damping=0.125,
        rung="fp32",
        loss=loss,
        rtn_loss=0.5,
        output_energy=100.0,
        clipped=0.0,
        notes=("1 calibration tokens were not finite and were left out",),
    )
    linear = LinearReport(
        path="model.layers.3.mlp.down_proj",
        layer=3,
        scheme="W4A16",
        algorithm="gptq",
        figures=figures,
        seconds=0.5,
        scales=ScaleHistogram.of(np.float32([[0.25, 0.3], [1.0, 0.0]])),
    )
    return QuantizationReport(
        model="a",
        output="b",
        scheme="W4A16",
        format="compressed-tensors",
        recipe={"observer": "hdiag"},
        calibration=CalibrationReport(source="text.txt", sequences=2, tokens=100, digest="0"),
        versions={"jax": "0"},
        device="cpu",
        seconds=Seconds(forward=1.0) + Seconds(forward=1.0, io=0.5),
        peak_host_bytes=1,
        peak_device_bytes=None,
        sizes=(
            ModuleSize(
                module="mlp.down_proj", scheme="W4A16", count=1, bytes_before=4, bytes_after=1
            ),
            ModuleSize(module="model.norm", scheme="bf16", count=1, bytes_before=2, bytes_after=2),
        ),
        linears=(linear,),
        notes=("a note",),
    )


def test_report_survives_json() -> None:
    report = a_report()
    assert QuantizationReport.from_json(report.to_json()) == report
    written = json.loads(report.to_json())
    assert written["seconds"] == {"forward": 2.0, "hessian": 0.0, "solve": 0.0, "io": 0.5}
    assert written["linears"][0]["figures"]["loss_ratio"] == 0.5
    assert (report.bytes_before, report.bytes_after) == (6, 3)
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
