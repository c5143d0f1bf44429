"""mxfp4-pack-quantized: float4_e2m1 codes with a power of two per 32 columns.

`weight_packed` U8 `[N, K/2]`, element 2j in the low nibble; `weight_scale` U8 `[N, K/32]`, an
exponent e that stands for `2^(e-127)`, 255 for NaN.

Source: OCP Microscaling Formats v1.0; compressed-tensors, `compressors/mxfp4`.
"""

from qllama.quantization.qtensor import QTensor
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import check_columns_divide, read_scales
from qllama_convert.module_tensors import ModuleTensors


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear, its scales as float32."""
    n, k = shape
    check_columns_divide(tensors, shape, spec.scheme)
    codes = tensors.read("weight_packed", dtypes=("U8",), shape=(n, k // 2))
    scales = read_scales(tensors, "weight_scale", shape, spec.scheme, ("U8", "F8_E8M0"))
    return QTensor(codes=codes, scales=scales, scheme=spec.scheme, shape=shape)
