"""The calibrated scales of a quantized KV cache, under all the names they have had."""

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
    checkpoint: Checkpoint,
    quantization: Quantization | None,
    path: str,
    num_kv_heads: int,
    *,
    undeclared: bool = False,
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Multipliers of the cached float8 codes of one layer.

    Args:
        checkpoint: an open checkpoint.
        quantization: of this checkpoint; its `kv_cache` says whether the cache is quantized.
        path: of the attention, such as "model.layers.0.self_attn".
        num_kv_heads: how many scales strategy "attn_head" has.
        undeclared: quantize the cache even if the config does not say so.

    Returns:
        `(k_scale, v_scale)`, each float32 `[]`, or `[num_kv_heads]` for strategy "attn_head";
        1.0 and a warning where none are stored, as in vLLM. `(None, None)`: the cache is not
        quantized. Stored scales are checked then, too.

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
    wanted = scheme is not None or undeclared
    for pair in _SPELLINGS:
        if any(suffix in modules[module] for module, suffix in pair):
            k, v = (_read_scale(modules[m], s, scheme, num_kv_heads) for m, s in pair)
            return (k, v) if wanted else (None, None)
    if not wanted:
        return None, None
    checkpoint.warn(
        "the KV cache is to be quantized, but layers have no k_scale and v_scale: 1.0 is used"
    )
    per_head = scheme is not None and scheme.strategy == "attn_head"
    one = np.ones((num_kv_heads,) if per_head else (), np.float32)
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
    scales = stored.reshape(num_kv_heads) if per_head else stored.reshape(())
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise tensors.error(
            f"tensor {suffix} is {scales.tolist()}; scales must be finite and above zero", suffix
        )
    return scales
