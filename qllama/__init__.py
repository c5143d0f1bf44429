"""Quantized Llama 3 in JAX: run, make and check INT4, INT8 and FP8 checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllama_convert.convert import convert
    from qllama_convert.inspection import inspect
    from qllama_convert.verify import verify

    from qllama.engine.sampling_params import SamplingParams
    from qllama.errors import CheckpointError
    from qllama.evaluate.compare import compare
    from qllama.evaluate.perplexity import perplexity
    from qllama.gptq.pipeline import quantize
    from qllama.llm import LLM, generate

__all__ = [
    "LLM",
    "CheckpointError",
    "SamplingParams",
    "compare",
    "convert",
    "generate",
    "inspect",
    "perplexity",
    "quantize",
    "verify",
]

# Resolved when first used, so that `import qllama` costs next to nothing.
_HOMES = {
    "LLM": "qllama.llm",
    "CheckpointError": "qllama.errors",
    "SamplingParams": "qllama.engine.sampling_params",
    "compare": "qllama.evaluate.compare",
    "convert": "qllama_convert.convert",
    "generate": "qllama.llm",
    "inspect": "qllama_convert.inspection",
    "perplexity": "qllama.evaluate.perplexity",
    "quantize": "qllama.gptq.pipeline",
    "verify": "qllama_convert.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qllama' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
