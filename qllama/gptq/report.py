"""What a quantization run did, and what it cost: plain values, written as JSON and read again."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from qllama.gptq.linear import GPTQReport
from qllama.quantization.qtensor import Array

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"

_FORMAT_VERSION = 1
_DERIVED = ("loss_ratio", "relative_error", "sqnr_db")  # written for other readers


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleHistogram:
    """How many scales of a weight lie in each power of two: `2^(first+i) <= scale < 2^(first+i+1)`.

    A scale of zero, which a group of zeros may have, is not counted.
    """

    first: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, scales: Array) -> Self:
        """Of the scales of one weight, any float dtype and shape."""
        values = np.asarray(scales).astype(np.float64).ravel()
        exponents = np.floor(np.log2(values[values > 0])).astype(int)
        if not exponents.size:
            return cls(first=0, counts=())
        first = int(exponents.min())
        return cls(first=first, counts=tuple(np.bincount(exponents - first).tolist()))


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearReport:
    """What became of one Linear. Without calibration data `figures.tokens` is 0, and losses are
    squared errors of the weight."""

    path: str  # such as "model.layers.0.self_attn.q_proj"
    layer: int | None  # None for lm_head
    scheme: str  # `QuantScheme.describe()`
    algorithm: Literal["gptq", "rtn"]  # as asked; `figures.rung` says where it ended
    figures: GPTQReport
    input_scale: float | None = None  # of static activations
    seconds: float  # of choosing scales and codes; Linears solved together share by rows
    scales: ScaleHistogram

    @property
    def module(self) -> str:
        """The path within its layer, such as "self_attn.q_proj"."""
        prefix = f"model.layers.{self.layer}."
        return self.path.removeprefix(prefix) if self.layer is not None else self.path


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSize:
    """All modules of one type, such as "mlp.down_proj" of every layer."""

    module: str
    scheme: str  # "bf16" and the like where it is not quantized; several are joined by commas
    count: int  # tensors
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationReport:
    """The texts that were used."""

    source: str
    sequences: int
    tokens: int
    digest: str  # sha256 of their token ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Where the time went. Work that overlaps is counted once, where it is waited for."""

    forward: float = 0.0  # running the layers, with what was quantized before
    hessian: float = 0.0  # summing second moments and largest inputs
    factor: float = 0.0  # Cholesky factors
    solve: float = 0.0  # scales, codes, losses
    io: float = 0.0  # waiting for weights and journal; the output is written after this is settled

    def __add__(self, other: "Seconds") -> "Seconds":
        names = [f.name for f in dataclasses.fields(self)]
        return Seconds(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """A whole run. After an interruption it covers all parts of it, but for peak memory."""

    model: str  # as the user named it
    output: str
    scheme: str  # as asked: the preset's name, or the recipe's
    format: str
    recipe: Mapping[str, Any]  # the options in force, as plain values
    calibration: CalibrationReport | None  # None: the scheme needs none
    versions: Mapping[str, str]  # of qllama, jax, jaxlib, python
    device: str
    seconds: Seconds
    peak_host_bytes: int
    peak_device_bytes: int | None  # of the fullest; None where it does not tell, such as a CPU
    sizes: tuple[ModuleSize, ...]  # of all tensors
    linears: tuple[LinearReport, ...]
    notes: tuple[str, ...] = field(default=())  # about the run as a whole, in sentences

    @property
    def bytes_before(self) -> int:
        """Of all tensors, as they were."""
        return sum(size.bytes_before for size in self.sizes)

    @property
    def bytes_after(self) -> int:
        """Of all tensors, as they are in the output."""
        return sum(size.bytes_after for size in self.sizes)

    def to_json(self) -> str:
        """JSON text. An infinite figure is written as null."""
        value = dataclasses.asdict(self) | {"version": _FORMAT_VERSION}
        for linear, written in zip(self.linears, value["linears"], strict=True):
            derived = {name: getattr(linear.figures, name) for name in _DERIVED}
            written["figures"] |= {
                name: number if math.isfinite(number) else None for name, number in derived.items()
            }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no such report, or one of another version.
        """
        try:
            value = json.loads(text)
            version = value.pop("version")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no quantization report ({error!r})") from error
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"the quantization report has version {version!r}, this qllama reads "
                f"{_FORMAT_VERSION}; make the report anew"
            )
        try:
            calibration = value.pop("calibration")
            return cls(
                calibration=None if calibration is None else CalibrationReport(**calibration),
                seconds=Seconds(**value.pop("seconds")),
                sizes=tuple(ModuleSize(**size) for size in value.pop("sizes")),
                linears=tuple(linear_from_json(linear) for linear in value.pop("linears")),
                notes=tuple(value.pop("notes")),
                **value,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the quantization report is damaged: {error}") from error


def linear_from_json(value: dict[str, Any]) -> LinearReport:
    """A `LinearReport` from what `dataclasses.asdict` made of it, through JSON."""
    value = dict(value)
    figures = {k: v for k, v in value.pop("figures").items() if k not in _DERIVED}
    figures["shape"] = tuple(figures["shape"])
    figures["notes"] = tuple(figures["notes"])
    scales = value.pop("scales")
    return LinearReport(
        figures=GPTQReport(**figures),
        scales=ScaleHistogram(first=scales["first"], counts=tuple(scales["counts"])),
        **value,
    )
