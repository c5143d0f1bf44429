"""The `quantization_config` of a checkpoint that is written, in the words of each quantizer.

The counterpart of `qllama_convert.quantization_config`, which reads them. Source: what
compressed-tensors 0.20, AutoGPTQ and AutoFP8 write.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qllama.quantization.scheme import ActivationScheme, QuantScheme
from qllama_convert.kv_cache_scheme import KVCacheScheme

# The release of compressed-tensors whose layout is followed. Readers show it, and no more.
_VERSION = "0.20.0"


def refuse_overlap(schemes: Mapping[str, QuantScheme], ignored: Collection[str]) -> None:
    """Raise `ValueError` where nothing is quantized, or a Linear is and is not."""
    if not schemes:
        raise ValueError("no Linear is quantized; write no quantization_config at all")
    both = sorted(schemes.keys() & set(ignored))
    if both:
        raise ValueError(f"{', '.join(both[:5])} cannot be quantized and ignored at once")


def compressed_tensors_config(
    schemes: Mapping[str, QuantScheme],
    ignore: Iterable[str],
    *,
    kv_cache: KVCacheScheme | None = None,
) -> dict[str, Any]:
    """The config of compressed-tensors, which vLLM and transformers read.

    One scheme is given to the class of all Linears; several name their modules, because readers
    differ in how they choose between patterns.

    Args:
        schemes: module path -> scheme of every quantized Linear.
        ignore: module paths of every Linear that is not quantized.
        kv_cache: how the key-value cache is quantized; its scales are tensors of their own.

    Raises:
        ValueError: no Linear is quantized, one is also ignored, or a scheme that this library
            has no words for.
    """
    ignored = sorted(set(ignore))
    refuse_overlap(schemes, ignored)
    groups: dict[QuantScheme, list[str]] = {}
    for path, scheme in schemes.items():
        groups.setdefault(scheme, []).append(path)
    formats = {compressed_tensors_format(scheme) for scheme in groups}
    return {
        "config_groups": {
            f"group_{i}": {
                "format": compressed_tensors_format(scheme),
                "input_activations": _activation_args(scheme.activations),
                "output_activations": None,
                "targets": ["Linear"] if len(groups) == 1 else sorted(paths),
                "weights": _weight_args(scheme),
            }
            for i, (scheme, paths) in enumerate(groups.items())
        },
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None if kv_cache is None else kv_cache_args(kv_cache),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def compressed_tensors_format(scheme: QuantScheme) -> str:
    """The layout in which compressed-tensors keeps Linears of this scheme.

    Raises:
        ValueError: a scheme that is read but not written.
    """
    if scheme.weight_dtype == "float4_e2m1fn":
        raise ValueError(f"{scheme.describe()} weights are read, not written")
    if scheme.weight_dtype == "float8_e4m3fn":
        return "naive-quantized" if scheme.activations is None else "float-quantized"
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def gptq_config(
    scheme: QuantScheme, *, desc_act: bool = False, damp_percent: float | None = None
) -> dict[str, Any]:
    """The config of GPTQ; it goes into `quantize_config.json` too, where older readers look.

    Symmetric weights are version 1 of the format, asymmetric ones version 2, as
    `qllama_convert.formats.gptq.write` stores them.

    Args:
        scheme: of every Linear but `lm_head`, which is not quantized.
        desc_act: columns belong to groups by `g_idx`.
        damp_percent: the dampening that was used; None: not known.

    Raises:
        ValueError: another scheme than weight-only int4 or int8, per group or channel.
    """
    if (
        scheme.weight_dtype not in ("int4", "int8")
        or scheme.strategy not in ("group", "channel")
        or scheme.activations is not None
    ):
        raise ValueError(
            f"GPTQ holds weight-only int4 and int8 per group or channel, not {scheme.describe()}"
        )
    config = {
        "bits": scheme.bits,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "desc_act": desc_act,
        "group_size": scheme.group_size or -1,
        "lm_head": False,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": scheme.symmetric,
        "true_sequential": True,
    }
    return config if damp_percent is None else config | {"damp_percent": damp_percent}


def fp8_config(
    scheme: QuantScheme, ignore: Iterable[str], *, kv_cache: KVCacheScheme | None = None
) -> dict[str, Any]:
    """The config of `quant_method` "fp8": AutoFP8's per tensor, the fine-grained one per block.

    Args:
        scheme: of every Linear that is not ignored.
        ignore: module paths of every Linear that is not quantized.
        kv_cache: how the key-value cache is quantized.

    Raises:
        ValueError: a scheme that this method cannot say.
    """
    static = scheme.activations is not None and not scheme.activations.dynamic
    expected = ActivationScheme(
        dtype="float8_e4m3fn",
        strategy="group" if scheme.block_size else "tensor" if static else "token",
        dynamic=not static,
        group_size=scheme.block_size[1] if scheme.block_size else None,
    )
    if (
        scheme.weight_dtype != "float8_e4m3fn"
        or scheme.strategy not in ("tensor", "block")
        or scheme.activations != expected
    ):
        raise ValueError(
            "quant_method fp8 holds FP8 per tensor, with FP8 inputs per tensor (static) or token, "
            f"or per block with inputs per group of its columns, not {scheme.describe()}"
        )
    if kv_cache is not None and kv_cache.strategy != "tensor":
        raise ValueError("quant_method fp8 has one scale for a layer's cache, not one per head")
    config: dict[str, Any] = {
        "activation_scheme": "static" if static else "dynamic",
        "ignored_layers": sorted(set(ignore)),
        "quant_method": "fp8",
    }
    if scheme.block_size:
        config["weight_block_size"] = list(scheme.block_size)
    if kv_cache is not None:
        config["kv_cache_scheme"] = "static"
    return config


def _weight_args(scheme: QuantScheme) -> dict[str, Any]:
    return _args(
        bits=scheme.bits,
        dtype=scheme.weight_dtype,
        strategy=scheme.strategy,
        symmetric=scheme.symmetric,
        dynamic=False,
        group_size=scheme.group_size,
        block_size=scheme.block_size,
    )


def _activation_args(activations: ActivationScheme | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    if activations.upper_bound is not None:
        raise ValueError("compressed-tensors has no upper bound for activations; drop it first")
    if activations.strategy == "group" and activations.dtype != "float8_e4m3fn":
        raise ValueError(f"{activations.dtype} activations per group are not run by any reader")
    return _args(
        bits=8,
        dtype=activations.dtype,
        strategy=activations.strategy,
        symmetric=activations.symmetric,
        dynamic=activations.dynamic,
        group_size=activations.group_size,
    )


def kv_cache_args(kv_cache: KVCacheScheme) -> dict[str, Any]:
    """How the cache is quantized, in the words of compressed-tensors."""
    return _args(
        bits=8, dtype="float8_e4m3fn", strategy=kv_cache.strategy, symmetric=True, dynamic=False
    )


def _args(
    *,
    bits: int,
    dtype: str,
    strategy: str,
    symmetric: bool,
    dynamic: bool,
    group_size: int | None = None,
    block_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """An args object. Null keys are left out: readers refuse those that they do not know."""
    args: dict[str, Any] = {
        "dynamic": dynamic,
        "num_bits": bits,
        "strategy": strategy,
        "symmetric": symmetric,
        "type": "int" if dtype.startswith("int") else "float",
    }
    if group_size is not None:
        args["group_size"] = group_size
    if block_size is not None:
        args["block_structure"] = list(block_size)
    return args
