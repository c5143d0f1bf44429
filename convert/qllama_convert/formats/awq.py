"""awq (version gemm): int4 codes in 32-bit words along N, shuffled, the layout of AutoAWQ.

`qweight` I32 `[K, N/8]` and `qzeros` I32 `[NG, N/8]` hold unsigned codes; logical column `l` of
the eight in a word sits in nibble `[0, 4, 1, 5, 2, 6, 3, 7][l]`, counted from the low end.
`scales` is `[NG, N]`. The weight already contains AWQ's smoothing.

Source: AutoAWQ `modules/linear/gemm.py`, `utils/packing_utils.py`; vLLM `auto_awq.py`.
"""

from collections.abc import Mapping

import numpy as np

from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama_convert import bits
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import check_columns_divide
from qllama_convert.formats.gptq import grouped_scheme, is_packed
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import LM_HEAD
from qllama_convert.section import Section

_NIBBLE_OF_LANE = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears: all but `modules_to_not_convert`, or where that is absent, all that
    have packed tensors.

    Raises:
        CheckpointError: a value of the wrong type or out of range, or a layout that is not read.
    """
    for key in ("version", "format", "checkpoint_format"):
        if (config.string(key) or "gemm").lower() != "gemm":
            raise config.wrong(key, "gemm; other layouts of AWQ are not supported")
    if not config.boolean("zero_point", True) and not any(
        f"{path}.qzeros" in checkpoint.tensors for path in linears
    ):
        raise config.error("zero_point", "is false, which the gemm layout does not know")
    spec = LinearSpec(format="awq", scheme=grouped_scheme(config, config, False, widths=(4,)))
    excluded = config.strings("modules_to_not_convert")
    specs: dict[str, LinearSpec] = {}
    for path in linears:
        if any(part in path for part in excluded):
            continue
        if path == LM_HEAD and "lm_head" in config:
            quantized = config.boolean("lm_head", False)
        elif excluded and path != LM_HEAD:
            quantized = True
        else:
            quantized = is_packed(checkpoint, path)
        if quantized:
            specs[path] = spec
    if not specs and not excluded:
        raise CheckpointError(f"{config.place()} says AWQ, but no Linear has qweight")
    return specs


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear, asymmetric."""
    (n, k), scheme = shape, spec.scheme
    check_columns_divide(tensors, shape, scheme)
    if n % 8:
        raise tensors.error(f"N={n} is not divisible by 8, the number of codes in a word")
    groups = scheme.scale_shape(shape)[1]
    qweight = tensors.read("qweight", dtypes=("I32",), shape=(k, n // 8))
    qzeros = tensors.read("qzeros", dtypes=("I32",), shape=(groups, n // 8))
    scales = tensors.read("scales", dtypes=FLOATS, shape=(groups, n))
    return QTensor(
        codes=bits.pack_signed(_signed(qweight)),
        scales=np.ascontiguousarray(scales.T),
        zeros=_signed(qzeros).astype(np.int16),
        scheme=scheme,
        shape=shape,
    )


def _signed(words: np.ndarray) -> np.ndarray:
    """int32 `[R, N/8]` of shuffled unsigned codes -> int8 `[N, R]` in [-8, 7]."""
    n = 8 * words.shape[1]
    shuffled = bits.unpack_words(words, 4, n).reshape(*words.shape, 8)
    unsigned = shuffled[..., _NIBBLE_OF_LANE].reshape(-1, n)
    return np.ascontiguousarray(unsigned.T).view(np.int8) - np.int8(8)
