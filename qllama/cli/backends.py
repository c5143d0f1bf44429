"""Which implementation runs which scheme: asked of the layers themselves, not guessed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllama.llm import LLM


@dataclass(frozen=True)
class Running:
    """How the Linears of one scheme run."""

    scheme: str  # "W4A16", or "unquantized"
    how: str
    linears: int


def running(llm: "LLM") -> list[Running]:
    """How every Linear of a loaded model runs, grouped by scheme."""
    counts: Counter[tuple[str, str]] = Counter()
    for path, layer in _linears(llm):
        spec = llm.quantization.linear(path) if llm.quantization else None
        scheme = "unquantized" if spec is None else spec.scheme.describe()
        counts[scheme, describe(layer, quantized=spec is not None)] += 1
    return [Running(scheme, how, count) for (scheme, how), count in counts.items()]


def describe(layer: Any, *, quantized: bool) -> str:
    """How a `Dense` or `QuantDense` computes, and on what.

    Args:
        layer: what `qllama.model.dense.make_dense` chose.
        quantized: whether its weight is quantized in the checkpoint.
    """
    import jax
    from qllama_kernels.dispatch import has_kernel

    from qllama.model.dense import DequantizedDense, QuantDense
    from qllama.parallel.layers import RowParallel

    platform = jax.default_backend()
    if isinstance(layer, RowParallel):
        layer = layer.dense
    if isinstance(layer, QuantDense):
        backend = layer.backend
        if backend == "auto":
            weight = layer.weight.get_value()
            kernel = has_kernel(
                weight.scheme.weight_dtype,
                weight.group_size,
                weight.shape,
                quantized_input=weight.scheme.activations is not None,
                layout=weight.layout,
            )
            backend = "pallas (xla where that is faster)" if kernel else "xla"
        return f"{backend} on {platform}, from the quantized weights"
    how = f"xla on {platform}, {layer.weight[...].dtype.name} weights"
    if quantized:
        how += " dequantized at load"
    if isinstance(layer, DequantizedDense):
        how += f", inputs rounded to {layer.activations.dtype}"
    return how


def _linears(llm: "LLM") -> Iterator[tuple[str, Any]]:
    """Checkpoint path and layer of every Linear; merged ones share a layer."""
    for i, decoder in enumerate(llm.model.layers):
        attention, mlp = decoder.self_attn, decoder.mlp
        for module, merged, names in (
            ("self_attn", attention.qkv_proj, ("q_proj", "k_proj", "v_proj")),
            ("mlp", mlp.gate_up_proj, ("gate_proj", "up_proj")),
        ):
            parts = list(merged.parts)
            parts = parts * len(names) if len(parts) == 1 else parts
            for name, part in zip(names, parts, strict=True):
                yield f"model.layers.{i}.{module}.{name}", part
        yield f"model.layers.{i}.self_attn.o_proj", attention.o_proj
        yield f"model.layers.{i}.mlp.down_proj", mlp.down_proj
    if llm.model.lm_head is not None:
        yield "lm_head", llm.model.lm_head
