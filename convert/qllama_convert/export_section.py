"""The `quantization_config` of a whole model that is written, or why there can be none."""

from collections.abc import Iterator, Mapping
from typing import Any

from qllama.config import LlamaConfig
from qllama.quantization.scheme import QuantScheme
from qllama_convert.export_config import (
    compressed_tensors_config,
    compressed_tensors_format,
    fp8_config,
    gptq_config,
    kv_cache_args,
    refuse_overlap,
)
from qllama_convert.files import first_few
from qllama_convert.formats import native
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.names import LM_HEAD, linear_shapes, merged_linears

FORMS = ("compressed-tensors", "gptq", "fp8", "bf16", "native")
"""What a model can be exported as."""


def quantization_section(
    to: str,
    schemes: Mapping[str, QuantScheme],
    llama: LlamaConfig,
    *,
    kv_cache: KVCacheScheme | None = None,
    desc_act: bool = False,
    damp_percent: float | None = None,
) -> dict[str, Any] | None:
    """The `quantization_config` of a model, after checking that all its readers will take it.

    Args:
        to: a name in `FORMS`; "bf16" has none.
        schemes: module path -> scheme of every quantized Linear.
        llama: the model.
        kv_cache: how the key-value cache is quantized.
        desc_act: columns of some Linear belong to groups by `g_idx`.
        damp_percent: see `gptq_config`.

    Raises:
        ValueError: the config cannot say it, or columns that are not whole groups.
    """
    if to not in FORMS:
        raise ValueError(f"to={to!r} is no form of a checkpoint; use {', '.join(FORMS)}")
    if to == "bf16":
        if kv_cache is not None:
            raise ValueError("an unquantized checkpoint cannot say that its cache is quantized")
        return None
    if to == "native":
        return _native_section(schemes, kv_cache)
    shapes = linear_shapes(llama)
    _refuse_sizes(to, schemes, shapes)
    refuse_split_schemes(schemes, llama)
    ignore = [path for path in shapes if path not in schemes]
    if to == "compressed-tensors":
        if desc_act:
            raise ValueError(
                "some columns are in activation order (g_idx), which current readers of "
                "compressed-tensors refuse; 'gptq' and 'native' hold it"
            )
        return compressed_tensors_config(schemes, ignore, kv_cache=kv_cache)
    if len(set(schemes.values())) > 1:
        names = ", ".join(sorted({scheme.describe() for scheme in schemes.values()}))
        raise ValueError(f"quant_method {to} has one scheme for all Linears, not {names}")
    refuse_overlap(schemes, ignore)
    scheme = next(iter(schemes.values()))
    if to == "fp8":
        return fp8_config(scheme, ignore, kv_cache=kv_cache)
    if kv_cache is not None:
        raise ValueError("the GPTQ format cannot say that the cache is quantized")
    if ignore != [LM_HEAD]:
        odd = first_few([path for path in ignore if path != LM_HEAD] or [LM_HEAD])
        raise ValueError(
            f"GPTQ's config quantizes every Linear of the decoder layers and no other, see {odd}; "
            "compressed-tensors can choose"
        )
    return gptq_config(scheme, desc_act=desc_act, damp_percent=damp_percent)


def export_format(to: str, scheme: QuantScheme) -> str | None:
    """The layout of Linears of this scheme, as `qllama_convert.linear` names it; None: floats."""
    if to == "compressed-tensors":
        return compressed_tensors_format(scheme)
    return None if to == "bf16" else to


def reader_notes(
    to: str, schemes: Mapping[str, QuantScheme], *, desc_act: bool = False
) -> Iterator[str]:
    """Which well-known readers do not take a checkpoint of this form, though it is right."""
    symmetric = all(scheme.symmetric for scheme in schemes.values())
    grouped = any(scheme.strategy == "group" for scheme in schemes.values())
    if to == "gptq" and desc_act and grouped:
        yield "vLLM from 0.30.0 on refuses GPTQ with desc_act and groups"
    if to == "gptq" and not symmetric:
        yield "vLLM runs symmetric GPTQ only; compressed-tensors holds asymmetric weights for it"
    if to == "gptq":
        yield "transformers reads GPTQ with optimum and gptqmodel, on a GPU"
    if to == "fp8" and any(scheme.strategy == "tensor" for scheme in schemes.values()):
        yield "transformers 5 does not read AutoFP8's names; vLLM does"
    if to == "compressed-tensors" and not symmetric:
        yield (
            "transformers needs CompressedTensorsConfig(dequantize=True) to read packed zero points"
        )
    if to == "native":
        yield "the native form is read by qllama alone"


def refuse_split_schemes(schemes: Mapping[str, QuantScheme], llama: LlamaConfig) -> None:
    """Raise `ValueError` where q, k and v of a layer, or gate and up, have different schemes."""
    for paths in merged_linears(llama):
        found = {path: schemes.get(path) for path in paths}
        if len(set(found.values())) > 1:
            what = ", ".join(
                f"{path} is {'unquantized' if scheme is None else scheme.describe()}"
                for path, scheme in found.items()
            )
            raise ValueError(f"{what}; vLLM runs them as one product, so they need one scheme")


def _native_section(
    schemes: Mapping[str, QuantScheme], kv_cache: KVCacheScheme | None
) -> dict[str, Any] | None:
    if not schemes and kv_cache is None:
        return None
    scheme = None if kv_cache is None else kv_cache_args(kv_cache)
    return native.section(schemes) | {"kv_cache_scheme": scheme}


def _refuse_sizes(
    to: str, schemes: Mapping[str, QuantScheme], shapes: Mapping[str, tuple[int, int]]
) -> None:
    for path, scheme in schemes.items():
        n, k = shapes[path]
        if to == "gptq":
            if n * scheme.bits % 32 or k * scheme.bits % 32:
                raise ValueError(
                    f"{path} is {n} x {k}; the GPTQ format needs multiples of {32 // scheme.bits}"
                )
            continue  # the last group may be short
        columns = scheme.scale_block((n, k))[1]
        if k % columns:
            sizes = [size for size in (256, 128, 64, 32, 16) if k % size == 0]
            raise ValueError(
                f"{path} has K={k}, no multiple of the {columns} columns that share a scale; sizes "
                f"that divide it: {', '.join(map(str, sizes)) or 'none of the usual'}"
            )
