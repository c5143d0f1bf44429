"""pack-quantized: int4 or int8 codes in 32-bit words along K, as compressed-tensors writes them.

`weight_packed` I32 `[N, ceil(K*b/32)]` holds codes biased by `2^(b-1)` in the bit stream of
`qllama_convert.bits`; `weight_scale` `[N, NG]`; `weight_shape` `[N, K]`; for asymmetric weights
`weight_zero_point`, biased too and packed along **N**, I32 `[ceil(N*b/32), NG]` (before 0.9.4:
plain I8 like the scales); `weight_g_idx` I32 `[K]` for `actorder: "group"`.

Source: compressed-tensors, `compressors/pack_quantized`.
"""

import numpy as np

from qllama.quantization.qtensor import QTensor
from qllama_convert import bits
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import (
    check_columns_divide,
    read_g_idx,
    read_scales,
    read_static_input,
    refuse_nonzero,
    write_static_input,
)
from qllama_convert.formats.naive_quantized import read_plain_zeros, write_scales
from qllama_convert.module_tensors import ModuleTensors

_ZERO_POINT = "weight_zero_point"


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear."""
    (n, k), scheme = shape, spec.scheme
    check_columns_divide(tensors, shape, scheme)
    _check_stored_shape(tensors, shape)
    words = tensors.read("weight_packed", dtypes=("I32",), shape=(n, -(-k * scheme.bits // 32)))
    scales = read_scales(tensors, "weight_scale", shape, scheme)
    zeros = _read_zeros(tensors, shape, spec)
    input_scale, input_zero = read_static_input(tensors, scheme, "input_scale", "input_zero_point")
    return QTensor(
        codes=bits.codes_from_words(words, scheme.bits, k),
        scales=scales,
        zeros=zeros,
        g_idx=_read_g_idx(tensors, shape, spec),
        input_scale=input_scale,
        input_zero=input_zero,
        scheme=scheme,
        shape=shape,
    )


def write(weight: QTensor) -> dict[str, np.ndarray]:
    """The tensors of one Linear, as compressed-tensors 0.9.4 and later lay them out.

    Raises:
        ValueError: the weight is no int4 or int8, or a zero point is outside the code range.
    """
    scheme, (n, k) = weight.scheme, weight.shape
    if scheme.weight_dtype not in ("int4", "int8"):
        raise ValueError(f"pack-quantized holds int4 and int8, not {scheme.weight_dtype}")
    arrays = {
        "weight_packed": bits.words_from_codes(np.asarray(weight.codes), scheme.bits, k),
        "weight_scale": write_scales(weight),
        "weight_shape": np.array([n, k], np.int64),
    }
    if weight.zeros is not None:
        half = 2 ** (scheme.bits - 1)
        zeros = np.asarray(weight.zeros)
        if zeros.max(initial=0) >= half:
            raise ValueError(
                f"a zero point of {half} (GPTQ: {2 * half}) lies outside the {scheme.bits}-bit "
                "codes and cannot be stored; requantize"
            )
        unsigned = (zeros + half).astype(np.uint8)
        packed = bits.pack_words(np.ascontiguousarray(unsigned.T), scheme.bits)
        arrays[_ZERO_POINT] = np.ascontiguousarray(packed.T)
    if weight.g_idx is not None:
        arrays["weight_g_idx"] = np.asarray(weight.g_idx)
    return arrays | write_static_input(weight)


def _check_stored_shape(tensors: ModuleTensors, shape: tuple[int, int]) -> None:
    if "weight_shape" not in tensors:
        return
    stored = tensors.read("weight_shape", dtypes=("I64", "I32"), shape=(2,))
    if tuple(stored.tolist()) != shape:
        raise tensors.error(
            f"tensor weight_shape is {stored.tolist()}, but the model's config makes this Linear "
            f"{list(shape)}",
            "weight_shape",
        )


def _read_zeros(
    tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec
) -> np.ndarray | None:
    if _ZERO_POINT not in tensors or tensors.info(_ZERO_POINT).dtype == "I8":
        return read_plain_zeros(tensors, shape, spec)
    scheme = spec.scheme
    rows, columns = scheme.scale_shape(shape)
    packed = tensors.read(
        _ZERO_POINT, dtypes=("I32",), shape=(-(-rows * scheme.bits // 32), columns)
    )
    unsigned = bits.unpack_words(packed.T, scheme.bits, rows).T
    zeros = unsigned.astype(np.int16) - np.int16(2 ** (scheme.bits - 1))
    if scheme.symmetric:
        refuse_nonzero(tensors, _ZERO_POINT, zeros)
        return None
    return np.ascontiguousarray(zeros)


def _read_g_idx(
    tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec
) -> np.ndarray | None:
    suffix = "weight_g_idx"
    if suffix in tensors:
        stored = tensors.read(suffix, dtypes=("I32",), shape=shape[1:])
        if (stored == -1).any():  # never initialised: the columns were not reordered
            return None
    return read_g_idx(tensors, suffix, shape, spec)
