"""The calibrated scales of a quantized KV cache, under all the names they have had."""

from reprlib import repr as shown
from typing import NamedTuple

import numpy as np

from qllama_convert.checkpoint import Checkpoint
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.quantization_config import Quantization


class _Spelling(NamedTuple):
    module: str  # of the tensor, below self_attn
    suffix: str


# In order: compressed-tensors and AutoFP8; AutoFP8 before July 2024; early llm-compressor;
# ModelOpt.
_SPELLINGS = (
    (_Spelling("", "k_scale"), _Spelling("", "v_scale")),
    (_Spelling("", "kv_scale"), _Spelling("", "kv_scale")),
    (_Spelling(".k_proj", "output_scale"), _Spelling(".v_proj", "output_scale")),
    (_Spelling(".k_proj", "k_scale"), _Spelling(".v_proj", "v_scale")),
)
_NOT_NEEDED = (
    _Spelling("", "k_zero_point"),
    _Spelling("", "v_zero_point"),
    _Spelling("", "q_scale"),
    _Spelling("", "q_zero_point"),
    _Spelling(".k_proj", "output_zero_point"),
    _Spelling(".v_proj", "output_zero_point"),
)

SUFFIXES_IN_LINEARS = frozenset(
    spelling.suffix
    for spelling in (*(one for pair in _SPELLINGS for one in pair), *_NOT_NEEDED)
    if spelling.module
)
"""Tensors of the cache that lie under k_proj and v_proj, and are no part of these Linears."""


def read_kv_scales(
    checkpoint: Checkpoint, quantization: Quantization | None, path: str, num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Multipliers of the cached float8 codes of one layer, whether or not the config wants them.

    Args:
        checkpoint: an open checkpoint.
        quantization: of this checkpoint.
        path: of the attention, such as "model.layers.0.self_attn".
        num_kv_heads: how many scales strategy "attn_head" has.

    Returns:
        `(k_scale, v_scale)`, each float32 `[1, 1]`, or `[num_kv_heads, 1]` for "attn_head". Where
        none are stored: `(None, None)`, or 1.0 and a warning if the config declares a quantized
        cache, as in vLLM.

    Raises:
        CheckpointError: one of a pair is missing, a wrong count, or a value that is not finite
            and above zero.
    """
    scheme = quantization.kv_cache if quantization else None
    modules = {
        part: ModuleTensors(checkpoint, f"{path}{part}") for part in ("", ".k_proj", ".v_proj")
    }
    for module, suffix in _NOT_NEEDED:
        modules[module].ignore(suffix)
    for pair in _SPELLINGS:
        if any(suffix in modules[module] for module, suffix in pair):
            k, v = (_read_scale(modules[m], s, scheme, num_kv_heads) for m, s in pair)
            return k, v
    if scheme is None:
        return None, None
    modules[""].warn(
        "kv_cache_scheme is set, but layers have no k_scale and v_scale: 1.0 is used", once=True
    )
    one = np.ones((1 if scheme.strategy == "tensor" else num_kv_heads, 1), np.float32)
    return one, one


def _read_scale(
    tensors: ModuleTensors, suffix: str, scheme: KVCacheScheme | None, num_kv_heads: int
) -> np.ndarray:
    found = tuple(tensors.info(suffix).shape)
    per_head = found == (num_kv_heads, 1, 1)
    single = found in ((), (1,))
    fits = {None: per_head or single, "tensor": single, "attn_head": per_head}
    if not fits[scheme.strategy if scheme else None]:
        raise tensors.wrong_shape(suffix, f"[1], or [{num_kv_heads}, 1, 1] for strategy attn_head")
    stored = tensors.read(suffix, dtypes=FLOATS).astype(np.float32)
    scales = stored.reshape(-1, 1)
    # Inputs are divided by them: a subnormal number counts as zero on most devices.
    if not ((scales >= np.finfo(np.float32).tiny) & (scales < np.inf)).all():
        raise tensors.error(
            f"tensor {suffix} is {shown(scales.ravel().tolist())}; scales must be finite and above "
            "zero, and no subnormal numbers",
            suffix,
        )
    return scales
