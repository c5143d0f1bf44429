"""Quantization reports of models that do not exist."""

from dataclasses import replace
from typing import Any

import numpy as np

from qllama.gptq.linear import GPTQReport
from qllama.gptq.report import (
    CalibrationReport,
    LinearReport,
    ModuleSize,
    QuantizationReport,
    ScaleHistogram,
    Seconds,
)


def linear(layer: int, module: str, loss: float = 1.0, **others: Any) -> LinearReport:
    """A Linear; `others` are fields of its figures, and `algorithm`."""
    figures = GPTQReport(
        shape=(64, 128),
        tokens=4096,
        dropped_tokens=0,
        dead_columns=0,
        diag_ratio=10.0,
        dampening_frac=0.01,
        damping=0.1,
        rung="fp32",
        loss=loss,
        rtn_loss=4.0,
        output_energy=1000.0,
        clipped=0.01,
        notes=(),
    )
    figures = replace(figures, **{k: v for k, v in others.items() if hasattr(figures, k)})
    return LinearReport(
        path=f"model.layers.{layer}.{module}",
        layer=layer,
        scheme="W4A16",
        algorithm=others.get("algorithm", "gptq"),
        figures=figures,
        seconds=0.5,
        scales=ScaleHistogram.of(np.array([0.001, 0.002, 0.002])),
    )


def report(*linears: LinearReport, **others: Any) -> QuantizationReport:
    """A report of these Linears; `others` are its other fields."""
    made = QuantizationReport(
        model="Owner/Llama & <Co>",
        output="out",
        scheme="W4A16",
        format="compressed-tensors",
        recipe={"ignore": ["lm_head"], "default": {"scheme": {"bits": 4}, "none": None}},
        calibration=CalibrationReport(source="a.txt", sequences=8, tokens=4096, digest="f00d"),
        versions={"qllama": "1.2.3"},
        device="TPU <1>",
        seconds=Seconds(forward=60.0, hessian=30.0, factor=5.0, solve=15.0, io=10.0),
        peak_host_bytes=2_000_000_000,
        peak_device_bytes=None,
        sizes=(
            ModuleSize(
                module="mlp.up_proj",
                scheme="W4A16",
                count=3,
                bytes_before=262_000_000,
                bytes_after=100_000_000,
            ),
            ModuleSize(
                module="lm_head",
                scheme="bf16",
                count=1,
                bytes_before=8_000_000,
                bytes_after=8_000_000,
            ),
        ),
        linears=linears,
    )
    return replace(made, **others)
