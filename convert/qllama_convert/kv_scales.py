"""The calibrated scales of a quantized KV cache, under all the names they have had."""

from collections.abc import Mapping
from reprlib import repr as shown
from typing import NamedTuple

import numpy as np

from qllama.config import LlamaConfig
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few
from qllama_convert.formats.companions import narrowed
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import attention_paths
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


def ignore_kv_scales(checkpoint: Checkpoint, path: str) -> bool:
    """Account for the tensors that `read_kv_scales` would read, without reading them.

    Returns:
        Whether there are scales.
    """
    scales = [spelling for pair in _SPELLINGS for spelling in pair]
    found = False
    for module, suffix in (*scales, *_NOT_NEEDED):
        tensors = ModuleTensors(checkpoint, f"{path}{module}")
        found |= (module, suffix) in scales and suffix in tensors
        tensors.ignore(suffix)
    return found


def normal_kv_scales(
    given: Mapping[str, tuple[np.ndarray, np.ndarray]], llama: LlamaConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scales to be written, by the path of the attention, each as `read_kv_scales` gives them.

    Raises:
        ValueError: some layers have none, a count that is neither 1 nor that of the KV heads, or
            a value that is not finite and above zero.
    """
    paths = attention_paths(llama)
    if given and given.keys() != set(paths):
        odd = first_few(given.keys() ^ set(paths))
        raise ValueError(f"kv_scales must be given for every attention or for none, see {odd}")
    arrays = [np.asarray(array, np.float32) for path in paths for array in given.get(path, ())]
    sizes = {array.size for array in arrays}
    if len(sizes) > 1 or sizes - {1, llama.num_key_value_heads}:
        raise ValueError(
            f"kv_scales must hold 1 value each, or {llama.num_key_value_heads} each (one per KV "
            f"head), got {sorted(sizes)}"
        )
    if not all(_usable(array) for array in arrays):
        raise ValueError("kv_scales must be finite and above zero, and no subnormal numbers")
    columns = iter(array.reshape(-1, 1) for array in arrays)
    return {path: (next(columns), next(columns)) for path in paths if given}


def kv_cache_scheme(
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> KVCacheScheme | None:
    """The scheme that these scales belong to; None: there are none."""
    if not scales:
        return None
    k, _ = next(iter(scales.values()))
    return KVCacheScheme(strategy="tensor" if k.size == 1 else "attn_head")


def write_kv_scales(
    path: str, k: np.ndarray, v: np.ndarray, *, to: str, dtype: str
) -> dict[str, np.ndarray]:
    """The tensors of one layer's scales by their full names; the inverse of `read_kv_scales`.

    Args:
        path: of the attention.
        k: scales of the keys, float32 `[1, 1]`, or `[num_kv_heads, 1]`.
        v: scales of the values, alike.
        to: "fp8" keeps them as F32 `[]`; all else as `[1]` or `[num_kv_heads, 1, 1]`, in `dtype`
            where that is exact.
        dtype: of the model.
    """
    tensors = {}
    for name, scales in (("k_scale", k), ("v_scale", v)):
        if to == "fp8":
            tensors[f"{path}.{name}"] = scales.reshape(())
        else:
            shape = (1,) if scales.size == 1 else (scales.size, 1, 1)
            tensors[f"{path}.{name}"] = narrowed(scales, dtype).reshape(shape)
    return tensors


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
    if not _usable(scales):
        raise tensors.error(
            f"tensor {suffix} is {shown(scales.ravel().tolist())}; scales must be finite and above "
            "zero, and no subnormal numbers",
            suffix,
        )
    return scales


def _usable(scales: np.ndarray) -> bool:
    # Inputs are divided by them: a subnormal number counts as zero on most devices.
    return bool(((scales >= np.finfo(np.float32).tiny) & (scales < np.inf)).all())
