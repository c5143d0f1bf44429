"""int-quantized, float-quantized and naive-quantized: one code per element, nothing packed.

The three names of compressed-tensors share one layout: `weight` I8 or F8_E4M3 `[N, K]`, and
`weight_scale` `[1]` (tensor), `[N, 1]` (channel), `[N, NG]` (group) or one per block; for static
activations `input_scale` and `input_zero_point` `[1]`; for asymmetric integers `weight_zero_point`
I8 like the scales. Codes narrower than a byte (W4A8) lie one per I8 element.

Source: compressed-tensors, `compressors/naive_quantized`.
"""

import numpy as np

from qllama.quantization.qtensor import QTensor
from qllama_convert import bits
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import (
    accept_zero,
    check_columns_divide,
    read_scales,
    read_static_input,
    refuse_nan,
    write_static_input,
)
from qllama_convert.module_tensors import FLOATS, ModuleTensors

_ZERO_POINT = "weight_zero_point"


def read(
    tensors: ModuleTensors,
    shape: tuple[int, int],
    spec: LinearSpec,
    *,
    scale: str = "weight_scale",
    scale_dtypes: tuple[str, ...] = FLOATS,
    input_scale: str = "input_scale",
) -> QTensor:
    """The weight `[N, K]` of one Linear. Other formats with this layout name their own scales."""
    scheme = spec.scheme
    check_columns_divide(tensors, shape, scheme)
    if scheme.weight_dtype == "float8_e4m3fn":
        codes = tensors.read("weight", dtypes=("F8_E4M3",), shape=shape)
        refuse_nan(tensors, "weight", codes)
    else:
        codes = tensors.read("weight", dtypes=("I8",), shape=shape)
        if scheme.bits == 4:
            _check_range(tensors, "weight", codes, scheme.bits)
            codes = bits.pack_signed(codes)
    static_scale, static_zero = read_static_input(tensors, scheme, input_scale, "input_zero_point")
    return QTensor(
        codes=codes,
        scales=read_scales(tensors, scale, shape, scheme, scale_dtypes),
        zeros=read_plain_zeros(tensors, shape, spec),
        input_scale=static_scale,
        input_zero=static_zero,
        scheme=scheme,
        shape=shape,
    )


def write(weight: QTensor) -> dict[str, np.ndarray]:
    """The tensors of one Linear.

    Raises:
        ValueError: the weight is no integer and no float8_e4m3fn, its columns are reordered, or
            a zero point does not fit the codes.
    """
    scheme = weight.scheme
    if scheme.weight_dtype == "float4_e2m1fn" or weight.g_idx is not None:
        what = "reordered columns" if weight.g_idx is not None else scheme.weight_dtype
        raise ValueError(f"int-, float- and naive-quantized cannot hold {what}")
    codes = np.asarray(weight.codes)
    if scheme.bits == 4:
        codes = bits.unpack_signed(codes, weight.shape[1])
    arrays = {"weight": codes, "weight_scale": write_scales(weight)}
    if weight.zeros is not None:
        zeros = np.asarray(weight.zeros)
        if zeros.max(initial=0) >= 2 ** (scheme.bits - 1):
            raise ValueError(f"a zero point of {zeros.max()} is no {scheme.weight_dtype} code")
        arrays[_ZERO_POINT] = zeros.astype(np.int8)
    return arrays | write_static_input(weight)


def write_scales(weight: QTensor) -> np.ndarray:
    """The scales as compressed-tensors shapes them: `[1]` per tensor, else the 2-D grid."""
    scales = np.asarray(weight.scales)
    return scales.reshape(1) if weight.scheme.strategy == "tensor" else scales


def read_plain_zeros(
    tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec
) -> np.ndarray | None:
    """Zero points stored one per I8 element, as int16 like the scales; None if symmetric."""
    scheme = spec.scheme
    if scheme.symmetric:
        accept_zero(tensors, _ZERO_POINT)
        return None
    if _ZERO_POINT not in tensors and spec.zero_point_optional:
        return np.zeros(scheme.scale_shape(shape), np.int16)
    stored = read_scales(tensors, _ZERO_POINT, shape, scheme, ("I8",))
    _check_range(tensors, _ZERO_POINT, stored, scheme.bits)
    return stored.astype(np.int16)


def _check_range(tensors: ModuleTensors, suffix: str, values: np.ndarray, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    outside = (values < low) | (values > high)
    if outside.any():
        first = tuple(int(i) for i in np.argwhere(outside)[0])
        raise tensors.error(
            f"tensor {suffix} has {int(outside.sum())} values outside [{low}, {high}] of "
            f"{bits}-bit codes, the first at {list(first)}: {values[first]}",
            suffix,
        )
