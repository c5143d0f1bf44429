"""How a config declares the KV cache quantized."""

from dataclasses import dataclass
from typing import Literal

from qllama_convert.quantization_args import parse_args
from qllama_convert.section import Section


@dataclass(frozen=True, kw_only=True)
class KVCacheScheme:
    """Keys (after the rotary embedding) and values are float8_e4m3fn with calibrated scales."""

    strategy: Literal["tensor", "attn_head"] = "tensor"  # one scale a layer, or one a KV head


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
