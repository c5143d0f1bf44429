"""How one Linear is quantized: a frozen description, and the presets people ask for by name.

The vocabulary (strategy, group_size, symmetric, dynamic) is that of compressed-tensors.
"""

from dataclasses import dataclass, replace
from typing import Literal

WeightDtype = Literal["int4", "int8", "float8_e4m3fn", "float4_e2m1fn"]
ActivationDtype = Literal["int8", "float8_e4m3fn"]

BITS: dict[str, int] = {"int4": 4, "int8": 8, "float8_e4m3fn": 8, "float4_e2m1fn": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationScheme:
    """How the input of a Linear is quantized before the product."""

    dtype: ActivationDtype
    strategy: Literal["tensor", "token", "group"]  # what one scale covers
    dynamic: bool = True  # False: the scale was calibrated and is stored with the weight
    group_size: int | None = None  # columns per scale, for strategy "group"
    symmetric: bool = True  # False: int8 codes carry a zero point
    upper_bound: float | None = None  # fbgemm_fp8: a token's absmax is capped here

    def __post_init__(self) -> None:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with group_size={self.group_size}: "
                "group_size belongs to strategy 'group' and only to it"
            )
        if self.dynamic and self.strategy == "tensor":
            raise ValueError(
                "a dynamic scale per tensor makes a row depend on its batch; use strategy 'token'"
            )
        if not self.dynamic and self.strategy != "tensor":
            raise ValueError(f"static activations have one scale, not one per {self.strategy}")
        if not self.symmetric and self.dtype != "int8":
            raise ValueError(f"{self.dtype} activations have no zero point; use symmetric=True")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantScheme:
    """How the weight `[N, K]` of one Linear is quantized, and its input.

    One scale covers the whole weight ("tensor"), one row ("channel"), `group_size` columns of
    one row ("group") or a `block_size` rectangle ("block").
    """

    weight_dtype: WeightDtype
    strategy: Literal["tensor", "channel", "group", "block"]
    group_size: int | None = None  # columns per scale, for strategy "group"
    block_size: tuple[int, int] | None = None  # (rows, columns), for strategy "block"
    symmetric: bool = True  # False: integer codes carry a zero point per scale
    activations: ActivationScheme | None = None  # None: the input stays in the compute dtype

    def __post_init__(self) -> None:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with group_size={self.group_size}: "
                "group_size belongs to strategy 'group' and only to it"
            )
        if (self.strategy == "block") != (self.block_size is not None):
            raise ValueError(
                f"strategy={self.strategy!r} with block_size={self.block_size}: "
                "block_size belongs to strategy 'block' and only to it"
            )
        if self.group_size is not None and self.group_size <= 0:
            raise ValueError(f"group_size={self.group_size} must be positive")
        if not self.symmetric and not self.weight_dtype.startswith("int"):
            raise ValueError(f"{self.weight_dtype} weights have no zero point; use symmetric=True")

    @property
    def bits(self) -> int:
        """Bits per weight code, scales not counted."""
        return BITS[self.weight_dtype]

    def scale_block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the weight `[N, K]` that share one scale."""
        n, k = shape
        match self.strategy:
            case "tensor":
                return n, k
            case "channel":
                return 1, k
            case "group":
                assert self.group_size is not None
                return 1, self.group_size
            case "block":
                assert self.block_size is not None
                return self.block_size

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales (and zeros) of a weight `[N, K]`; the last block may be short."""
        rows, columns = self.scale_block(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def describe(self) -> str:
        """A short name: the preset's where there is one, such as "W4A16", else one in its style."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        kind = {"int4": "W4", "int8": "W8", "float8_e4m3fn": "FP8", "float4_e2m1fn": "FP4"}
        covers = {
            "group": f"g{self.group_size}",
            "block": "x".join(map(str, self.block_size or ())),
        }
        text = f"{kind[self.weight_dtype]} {covers.get(self.strategy, self.strategy)}"
        text += "" if self.symmetric else " asymmetric"
        if self.activations is None:
            return text + ", A16"
        acts = self.activations
        when = "dynamic" if acts.dynamic else "static"
        return f"{text}, {acts.dtype} {when} per {acts.strategy}"


_INT8_PER_TOKEN = ActivationScheme(dtype="int8", strategy="token")
_FP8_PER_TOKEN = ActivationScheme(dtype="float8_e4m3fn", strategy="token")
_FP8_STATIC = ActivationScheme(dtype="float8_e4m3fn", strategy="tensor", dynamic=False)
_FP8_PER_GROUP = ActivationScheme(dtype="float8_e4m3fn", strategy="group", group_size=128)

W4A16 = QuantScheme(weight_dtype="int4", strategy="group", group_size=128)

PRESETS: dict[str, QuantScheme] = {
    "W4A16": W4A16,
    "W4A16_ASYM": replace(W4A16, symmetric=False),
    "W8A16": QuantScheme(weight_dtype="int8", strategy="group", group_size=128),
    "W8A8": QuantScheme(weight_dtype="int8", strategy="channel", activations=_INT8_PER_TOKEN),
    "FP8": QuantScheme(weight_dtype="float8_e4m3fn", strategy="tensor", activations=_FP8_STATIC),
    "FP8_DYNAMIC": QuantScheme(
        weight_dtype="float8_e4m3fn", strategy="channel", activations=_FP8_PER_TOKEN
    ),
    "FP8_BLOCK": QuantScheme(
        weight_dtype="float8_e4m3fn",
        strategy="block",
        block_size=(128, 128),
        activations=_FP8_PER_GROUP,
    ),
}
