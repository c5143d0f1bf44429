"""native: codes and scales as a `QTensor` has them, for qllama alone; `quant_method` "qllama".

`codes` U8 (two 4-bit codes a byte), I8 or F8_E4M3, `scales`, and where the scheme has them `zeros`
I16, `g_idx` I32, `input_scale` F32 `[]`, `input_zero` I8 `[]`. Every scheme can be kept, and
nothing is unpacked at load. The config lists schemes field by field, with the Linears of each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np

from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import ActivationDtype, ActivationScheme, QuantScheme, WeightDtype
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import refuse_nan
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.section import Section

_CODES = {"int4": "U8", "float4_e2m1fn": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
_FIELDS = ("codes", "scales", "zeros", "g_idx", "input_scale", "input_zero")


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears: those that the config names, each once.

    Raises:
        CheckpointError: a value of the wrong type, a Linear that is not there or named twice.
    """
    config.refuse_unknown(("quant_method", "config_groups", "kv_cache_scheme"))
    groups = config.section_or_empty("config_groups")
    specs: dict[str, LinearSpec] = {}
    for name in groups:
        group = groups.section_or_empty(name)
        group.refuse_unknown(("scheme", "targets"))
        spec = LinearSpec(format="native", scheme=_scheme(group.section_or_empty("scheme")))
        for path in group.strings("targets"):
            if path not in linears or path in specs:
                what = "is named twice" if path in specs else "is no Linear of this model"
                raise group.error("targets", f"{path} {what}")
            specs[path] = spec
    return specs


def section(schemes: Mapping[str, QuantScheme]) -> dict[str, Any]:
    """The `quantization_config` that `parse` reads, without a scheme for the cache."""
    groups: dict[QuantScheme, list[str]] = {}
    for path, scheme in schemes.items():
        groups.setdefault(scheme, []).append(path)
    return {
        "config_groups": {
            f"group_{i}": {"scheme": dataclasses.asdict(scheme), "targets": paths}
            for i, (scheme, paths) in enumerate(groups.items())
        },
        "quant_method": "qllama",
    }


def view(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear; its codes, scales and zeros are views, not read yet."""
    (n, k), scheme = shape, spec.scheme
    grid = scheme.scale_shape(shape)
    columns = -(-k // 2) if scheme.bits == 4 else k
    codes = tensors.view("codes", dtypes=(_CODES[scheme.weight_dtype],), shape=(n, columns))

    def optional(suffix: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return tensors.read(suffix, dtypes=(dtype,), shape=shape) if suffix in tensors else None

    return QTensor(
        codes=codes,
        scales=tensors.view("scales", dtypes=FLOATS, shape=grid),
        zeros=tensors.view("zeros", dtypes=("I16",), shape=grid) if "zeros" in tensors else None,
        g_idx=optional("g_idx", "I32", (k,)),
        input_scale=optional("input_scale", "F32", ()),
        input_zero=optional("input_zero", "I8", ()),
        scheme=scheme,
        shape=shape,
    )


def check(tensors: ModuleTensors, weight: QTensor) -> None:
    """Raise `CheckpointError` for codes that no quantizer means, in a weight or a part of one."""
    if weight.scheme.weight_dtype == "float8_e4m3fn":
        refuse_nan(tensors, "codes", weight.codes)


def write(weight: QTensor) -> dict[str, np.ndarray]:
    """The tensors of one Linear."""
    arrays = {name: getattr(weight, name) for name in _FIELDS}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def _scheme(section: Section) -> QuantScheme:
    section.refuse_unknown([field.name for field in dataclasses.fields(QuantScheme)])
    inputs = section.section("activations")
    try:
        return QuantScheme(
            weight_dtype=cast(WeightDtype, _choice(section, "weight_dtype", get_args(WeightDtype))),
            strategy=cast(
                Any, _choice(section, "strategy", ("tensor", "channel", "group", "block"))
            ),
            group_size=section.integer("group_size"),
            block_size=section.pair("block_size"),
            symmetric=section.boolean("symmetric", True),
            activations=None if inputs is None else _activations(inputs),
        )
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{section.place()}: {error}") from error


def _activations(section: Section) -> ActivationScheme:
    section.refuse_unknown([field.name for field in dataclasses.fields(ActivationScheme)])
    group_size = section.integer("group_size")
    if group_size is not None and group_size < 1:
        raise section.wrong("group_size", "positive")
    bounded = "upper_bound" in section
    return ActivationScheme(
        dtype=cast(ActivationDtype, _choice(section, "dtype", get_args(ActivationDtype))),
        strategy=cast(Any, _choice(section, "strategy", ("tensor", "token", "group"))),
        dynamic=section.boolean("dynamic", True),
        group_size=group_size,
        symmetric=section.boolean("symmetric", True),
        upper_bound=section.positive_number("upper_bound") if bounded else None,
    )


def _choice(section: Section, key: str, choices: tuple[str, ...]) -> str:
    value = section.string(key)
    if value not in choices:
        raise section.wrong(key, f"one of {', '.join(choices)}")
    return value
