"""The schemes of compressed-tensors: what a group of Linears is quantized to, and its format.

Source: compressed-tensors `quantization/quant_scheme.py`, `compressors/format.py`.
"""

import re
from typing import Any, Literal

from qllama.errors import CheckpointError
from qllama.quantization.scheme import ActivationScheme, QuantScheme, WeightDtype
from qllama_convert.formats import LinearSpec
from qllama_convert.quantization_args import QuantizationArgs, parse_args
from qllama_convert.section import Section

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
"""The formats that are read."""

_REFUSED_FORMATS = (
    "mxfp8-quantized", "mxfp6-pack-quantized", "sparse-bitmask", "sparse-24-bitmask", "marlin-24",
)  # fmt: skip
_UNSTATED_FORMATS = ("mixed-precision", "fakequant", "dense")  # of the whole file: says no format
_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_WEIGHT_DTYPES: dict[tuple[str, int], WeightDtype] = {
    ("int", 4): "int4",
    ("int", 8): "int8",
    ("float", 8): "float8_e4m3fn",
    ("float", 4): "float4_e2m1fn",
}
_ELEMENTWISE = ("int-quantized", "float-quantized", "naive-quantized")
_FP4_FORMATS = {16: "nvfp4-pack-quantized", 32: "mxfp4-pack-quantized"}

_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 128}
_INT8_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_FP8 = {"num_bits": 8, "type": "float"}
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
          "scale_dtype": "torch.uint8"}  # fmt: skip
_INT8_CHANNEL = {"num_bits": 8, "strategy": "channel"}
_W8A8 = {"weights": _INT8_CHANNEL, "input_activations": _INT8_TOKEN}
PRESETS: dict[str, dict[str, Any]] = {
    "UNQUANTIZED": {},
    "W4A16": {"weights": _INT4},
    "W4A16_ASYM": {"weights": _INT4 | {"symmetric": False}},
    "W8A16": {"weights": _INT4 | {"num_bits": 8}},
    "W4A8": {"weights": _INT4, "input_activations": _INT8_TOKEN},
    "W4AFP8": {"weights": _INT4, "input_activations": _INT8_TOKEN | {"type": "float"}},
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "FP8": {"weights": _FP8, "input_activations": _FP8},
    "FP8_DYNAMIC": {
        "weights": _FP8 | {"strategy": "channel"},
        "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
    },
    "FP8_BLOCK": {
        "weights": _FP8 | {"strategy": "block", "block_structure": [128, 128]},
        "input_activations": _FP8 | {"strategy": "group", "group_size": 128, "dynamic": True},
    },
    "NVFP4A16": {"weights": _NVFP4},
    "NVFP4": {"weights": _NVFP4, "input_activations": _NVFP4 | {"dynamic": "local"}},
    "MXFP4A16": {"weights": _MXFP4},
    "MXFP4": {"weights": _MXFP4, "input_activations": _MXFP4 | {"dynamic": True}},
}
"""Schemes that `config_groups` may name instead of spelling them out."""


def parse_scheme(scheme: Section, config: Section) -> LinearSpec | None:
    """Parse one scheme of `config`, the whole quantization config; None: it quantizes nothing.

    Raises:
        CheckpointError: the scheme is malformed, or is not run or read.
    """
    scheme.refuse_unknown(_KEYS)
    if scheme.section("output_activations") is not None:
        raise scheme.error("output_activations", "is set; quantized outputs are not supported")
    stated = _group_format(scheme)
    inputs = _args(scheme, "input_activations")
    weights = _args(scheme, "weights")
    if weights is None:
        if inputs is not None:
            raise scheme.error("weights", "is missing; activations alone are not quantized")
        return None
    format_name = stated or file_format(config) or _infer_format(weights, inputs)
    _refuse_format(scheme, format_name)
    weight_dtype = _check_weights(scheme, weights, format_name)
    return LinearSpec(
        format=format_name,
        scheme=QuantScheme(
            weight_dtype=weight_dtype,
            strategy=_weight_strategy(scheme, weights),
            group_size=weights.group_size,
            block_size=weights.block_structure,
            symmetric=weights.symmetric,
            activations=_activations(scheme, inputs, weights) if inputs else None,
        ),
        act_order=weights.actorder == "group",
        zero_point_optional=_before_packed_zero_points(config),
    )


def _args(scheme: Section, key: str) -> QuantizationArgs | None:
    section = scheme.section(key)
    return None if section is None else parse_args(section)


def _group_format(scheme: Section) -> str | None:
    name = scheme.string("format")
    if name in _UNSTATED_FORMATS:
        raise scheme.error("format", f"is {name}, which is no format of a single group")
    if name is not None and name not in (*FORMATS, *_REFUSED_FORMATS):
        raise scheme.wrong("format", f"one of {', '.join(FORMATS)}")
    return name


def file_format(config: Section) -> str | None:
    """The global format, None where it leaves the choice to the groups."""
    name = config.string("format")
    if name is None or name in _UNSTATED_FORMATS:
        return None
    if name not in (*FORMATS, *_REFUSED_FORMATS):
        raise config.wrong("format", f"one of {', '.join(FORMATS)}")
    _refuse_format(config, name)
    return name


def _refuse_format(section: Section, name: str) -> None:
    if name in _REFUSED_FORMATS:
        raise section.error(
            "format", f"{name} is not supported; supported are {', '.join(FORMATS)}"
        )


def _infer_format(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> str:
    """The format compressed-tensors itself would choose for these args."""
    if weights.type == "int":
        return "int-quantized" if inputs else "pack-quantized"
    if weights.num_bits == 4:
        return _FP4_FORMATS.get(weights.group_size or 0, "naive-quantized")
    if weights.num_bits == 6:
        return "mxfp6-pack-quantized"
    if weights.group_size == 32 and weights.scale_dtype == "torch.uint8":
        return "mxfp8-quantized"
    return "float-quantized" if inputs else "naive-quantized"


def _check_weights(scheme: Section, weights: QuantizationArgs, format_name: str) -> WeightDtype:
    """The type of the codes, after refusing what no reader here can hold."""

    def error(key: str, message: str) -> CheckpointError:
        return scheme.error(f"weights.{key}", message)

    dtype = _WEIGHT_DTYPES.get((weights.type, weights.num_bits))
    if dtype is None:
        raise error("num_bits", f"{weights.num_bits} is not supported; use 4 or 8")
    if weights.dynamic:
        raise error("dynamic", "must be false; weights are quantized once")
    if weights.type == "float" and not weights.symmetric:
        raise error("symmetric", "must be true for float weights; they have no zero point")
    if format_name in _ELEMENTWISE:
        fits = dtype != "float4_e2m1fn"
    elif format_name == "pack-quantized":
        fits = weights.type == "int"
    else:
        fits = dtype == "float4_e2m1fn" and _FP4_FORMATS.get(weights.group_size or 0) == format_name
    if not fits:
        size = f", group_size {weights.group_size}" if weights.group_size else ""
        raise error("type", f"{dtype}{size} cannot be stored as {format_name}")
    return dtype


def _weight_strategy(
    scheme: Section, weights: QuantizationArgs
) -> Literal["tensor", "channel", "group", "block"]:
    match weights.strategy:
        case "tensor" | "channel" | "group" | "block" as strategy:
            return strategy
        case "tensor_group" if (weights.type, weights.num_bits) == ("float", 4):
            return "group"
    raise scheme.error("weights.strategy", f"{weights.strategy} is not supported for weights")


def _activations(
    scheme: Section, inputs: QuantizationArgs, weights: QuantizationArgs
) -> ActivationScheme:
    def error(key: str, message: str) -> CheckpointError:
        return scheme.error(f"input_activations.{key}", message)

    if weights.type == "float" and weights.num_bits == 4:
        raise error("num_bits", "FP4 weights run with unquantized activations only")
    if inputs.num_bits != 8:
        raise error("num_bits", f"{inputs.num_bits}-bit activations are not supported; use 8")
    if inputs.actorder is not None:
        raise error("actorder", "belongs to weights")
    if inputs.type == "float" and not inputs.symmetric:
        raise error("symmetric", "must be true for float activations")
    if inputs.type == "int" and weights.type == "float":
        raise error("type", "int activations with float weights are not supported")
    dtype: Literal["int8", "float8_e4m3fn"] = "int8" if inputs.type == "int" else "float8_e4m3fn"
    if inputs.strategy == "tensor" and not inputs.dynamic:
        return ActivationScheme(
            dtype=dtype, strategy="tensor", dynamic=False, symmetric=inputs.symmetric
        )
    if inputs.strategy in ("tensor", "token"):  # a dynamic tensor scale runs per token, as in vLLM
        return ActivationScheme(dtype=dtype, strategy="token", symmetric=inputs.symmetric)
    if inputs.strategy == "group" and inputs.dynamic and inputs.type == "float":
        block = weights.block_structure
        return ActivationScheme(
            dtype=dtype, strategy="group", group_size=block[0] if block else inputs.group_size
        )
    how = "dynamic" if inputs.dynamic else "static"
    raise error("strategy", f"{inputs.strategy} ({how}, {dtype}) is not supported for activations")


def _before_packed_zero_points(config: Section) -> bool:
    """Whether the file is older than compressed-tensors 0.9.4, or does not say."""
    version = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", config.string("version") or "0.0.0")
    return version is not None and tuple(map(int, version.groups())) < (0, 9, 4)
