"""nvfp4-pack-quantized: float4_e2m1 codes, a float8 scale per 16 columns, one global divisor.

`weight_packed` U8 `[N, K/2]`, element 2j in the low nibble; `weight_scale` F8_E4M3 `[N, K/16]`;
`weight_global_scale` F32 `[1]`. The weight is `e2m1 * (weight_scale / weight_global_scale)`.

Source: compressed-tensors, `compressors/nvfp4`.
"""

import numpy as np

from qllama.quantization.qtensor import QTensor
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import check_columns_divide, read_scalar
from qllama_convert.module_tensors import ModuleTensors


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear; the two scales become one, in float32."""
    n, k = shape
    check_columns_divide(tensors, shape, spec.scheme)
    codes = tensors.read("weight_packed", dtypes=("U8",), shape=(n, k // 2))
    local = tensors.read("weight_scale", dtypes=("F8_E4M3",), shape=spec.scheme.scale_shape(shape))
    divisor = read_scalar(tensors, "weight_global_scale", ("F32",))
    if not (np.isfinite(divisor) and divisor > 0):
        raise tensors.error(
            f"tensor weight_global_scale is {divisor}; it must be finite and above zero",
            "weight_global_scale",
        )
    with np.errstate(over="ignore"):  # an infinite scale is refused with all others
        scales = local.astype(np.float32) / divisor
    return QTensor(codes=codes, scales=scales, scheme=spec.scheme, shape=shape)
