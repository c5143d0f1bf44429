"""The args object of compressed-tensors: how weights, activations or the cache are quantized.

Source: compressed-tensors `quantization/quant_args.py`; unknown keys are errors there too.
"""

from dataclasses import dataclass
from typing import Literal

from qllama_convert.section import Section

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]

_STRATEGIES: tuple[Strategy, ...] = (
    "tensor", "channel", "group", "block", "token", "tensor_group", "attn_head",
)  # fmt: skip
_GROUPED = ("group", "tensor_group")
_KEYS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic",
    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
)  # fmt: skip
_BITS = {"int": range(1, 9), "float": (4, 6, 8)}


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """One args object, its defaults filled in and its values consistent with each other."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "tensor"
    group_size: int | None = None  # set for "group" and "tensor_group"
    block_structure: tuple[int, int] | None = None  # (rows, columns), set for "block"
    dynamic: bool | Literal["local"] = False
    actorder: Literal["weight", "group"] | None = None
    scale_dtype: str | None = None  # such as "torch.uint8"


def parse_args(section: Section) -> QuantizationArgs:
    """Parse an args object.

    Raises:
        CheckpointError: an unknown key, a wrong type, or values that exclude each other.
    """
    section.refuse_unknown(_KEYS)
    kind = _choice(section, "type", ("int", "float")) or "int"
    num_bits = section.integer("num_bits")
    num_bits = 8 if num_bits is None else num_bits
    if num_bits not in _BITS[kind]:
        raise section.wrong("num_bits", "1 to 8 for int, or 4, 6 or 8 for float")
    group_size = section.integer("group_size")
    if group_size is not None and group_size < 1 and group_size != -1:
        raise section.wrong("group_size", "positive, or -1 for one group per channel")
    strategy = _choice(section, "strategy", _STRATEGIES) or _inferred_strategy(group_size)
    block = _block_structure(section)
    dynamic = _dynamic(section)
    _check_consistency(section, strategy, group_size, block, dynamic)
    return QuantizationArgs(
        num_bits=num_bits,
        type="int" if kind == "int" else "float",
        symmetric=section.boolean("symmetric", True),
        strategy=strategy,
        group_size=group_size if strategy in _GROUPED else None,
        block_structure=block,
        dynamic=dynamic,
        actorder=_actorder(section),
        scale_dtype=section.string("scale_dtype"),
    )


def _choice[T: str](section: Section, key: str, choices: tuple[T, ...]) -> T | None:
    value = section.string(key)
    if value is None:
        return None
    for choice in choices:
        if value.lower() == choice:
            return choice
    raise section.wrong(key, " or ".join(choices))


def _inferred_strategy(group_size: int | None) -> Strategy:
    if group_size is None:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _block_structure(section: Section) -> tuple[int, int] | None:
    key = "block_structure"
    value = section.value(key)
    if isinstance(value, str):  # the spelling of old files: "128x128"
        sizes = value.split("x")
        value = [int(size) if size.isdecimal() and len(size) < 10 else 0 for size in sizes]
        return section.with_value(key, value).pair(key)
    return section.pair(key)


def _dynamic(section: Section) -> bool | Literal["local"]:
    value = section.value("dynamic")
    if isinstance(value, str) and value.lower() == "local":
        return "local"
    if value is not None and not isinstance(value, bool):
        raise section.wrong("dynamic", "true, false or local")
    return bool(value)


def _actorder(section: Section) -> Literal["weight", "group"] | None:
    value = section.value("actorder")
    if value is None or value is False:
        return None
    if value is True:
        return "group"
    names = ("weight", "static", "group", "dynamic")
    return "weight" if _choice(section, "actorder", names) in ("weight", "static") else "group"


def _check_consistency(
    section: Section,
    strategy: Strategy,
    group_size: int | None,
    block: tuple[int, int] | None,
    dynamic: bool | Literal["local"],
) -> None:
    if strategy in _GROUPED:
        if group_size is None or group_size < 1:
            raise section.wrong("group_size", f"positive for strategy {strategy}")
    elif group_size is not None and (group_size > 0 or strategy != "channel"):
        raise section.error("group_size", f"is {group_size}, but strategy is {strategy}")
    if (strategy == "block") != (block is not None):
        raise section.error(
            "block_structure", f"belongs to strategy block and only to it; strategy is {strategy}"
        )
    if strategy == "token" and not dynamic:
        raise section.wrong("dynamic", "true for strategy token")
    if dynamic and strategy not in ("token", "tensor", *_GROUPED):
        raise section.wrong("dynamic", f"false for strategy {strategy}")
    if dynamic == "local" and strategy != "tensor_group":
        raise section.wrong("dynamic", "true or false; local belongs to strategy tensor_group")
