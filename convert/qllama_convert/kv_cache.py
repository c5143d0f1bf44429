"""How a checkpoint quantizes the KV cache: the scheme of its config, the scales of a layer."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from qllama_convert.checkpoint import Checkpoint
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.quantization_args import parse_args
from qllama_convert.section import Section


@dataclass(frozen=True, kw_only=True)
class KVCacheScheme:
    """Keys (after the rotary embedding) and values are float8_e4m3fn with calibrated scales."""

    strategy: Literal["tensor", "attn_head"] = "tensor"  # one scale a layer, or one a KV head


class KVScales(NamedTuple):
    """Multipliers of the cached codes of one layer: float32 `[]`, or `[num_kv_heads]`."""

    k: np.ndarray
    v: np.ndarray


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


def parse_kv_cache_scheme(config: Section) -> KVCacheScheme | None:
    """The scheme under `kv_cache_scheme`: an args object, or AutoFP8's word "static".

    Raises:
        CheckpointError: it is malformed, or another quantization than static, symmetric FP8.
    """
    key = "kv_cache_scheme"
    if config.value(key) == "static":
        return KVCacheScheme()
    section = config.section(key)
    if section is None:
        return None
    args = parse_args(section)
    if args.type != "float" or args.num_bits != 8:
        raise config.error(key, f"is {args.num_bits}-bit {args.type}; only 8-bit float is run")
    if not args.symmetric or args.dynamic:
        raise config.error(key, "must be symmetric and not dynamic; nothing else is run")
    if args.strategy not in ("tensor", "attn_head"):
        raise section.wrong("strategy", "tensor or attn_head; no other caches are run")
    return KVCacheScheme(strategy="tensor" if args.strategy == "tensor" else "attn_head")


def read_kv_scales(
    checkpoint: Checkpoint, path: str, scheme: KVCacheScheme | None, num_kv_heads: int
) -> KVScales | None:
    """The scales of one layer, under whichever names they are stored.

    Args:
        checkpoint: an open checkpoint.
        path: of the attention, such as "model.layers.0.self_attn".
        scheme: what the config declares. Without one, scales that are there are still returned.
        num_kv_heads: how many scales strategy "attn_head" has.

    Returns:
        None without a scheme and scales. With a scheme and no scales: 1.0 and a warning, as vLLM.

    Raises:
        CheckpointError: one of a pair is missing, a wrong count, or a value that is not finite
            and above zero.
    """
    modules = {
        part: ModuleTensors(checkpoint, f"{path}{part}") for part in ("", ".k_proj", ".v_proj")
    }
    for module, suffix in _NOT_NEEDED:
        modules[module].ignore(suffix)
    for pair in _SPELLINGS:
        if any(suffix in modules[module] for module, suffix in pair):
            k, v = (_read_scale(modules[m], s, scheme, num_kv_heads) for m, s in pair)
            return KVScales(k, v)
    if scheme is None:
        return None
    checkpoint.warn("kv_cache_scheme is set, but layers have no k_scale and v_scale: 1.0 is used")
    one = np.ones(() if scheme.strategy == "tensor" else (num_kv_heads,), np.float32)
    return KVScales(one, one)


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
