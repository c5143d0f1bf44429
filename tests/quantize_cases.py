"""Small float checkpoints to quantize, and what files an output holds."""

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qllama_convert.names import embedding_shape, linear_shapes, norm_shapes
from qllama_convert.writer import write_checkpoint
from small_checkpoints import CONFIG, VOCABULARY

from qllama.config import LlamaConfig

Tensors = dict[str, np.ndarray]


def float_tensors(config: dict[str, Any], *, seed: int = 0) -> Tensors:
    """bfloat16 weights; some channels of each norm are loud, as in real models."""
    llama = LlamaConfig.from_hf(config)
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": rng.normal(0, 1, embedding_shape(llama))}
    for path, (size,) in norm_shapes(llama).items():
        tensors[f"{path}.weight"] = rng.uniform(0.5, 1.5, size) * (
            1 + 9 * (rng.random(size) < 0.05)
        )
    for path, shape in linear_shapes(llama).items():
        tensors[f"{path}.weight"] = rng.normal(0, shape[1] ** -0.5, shape)
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}


def float_checkpoint(folder: Path, *, layers: int = 2, **config: Any) -> Path:
    """A float Llama of hidden size 128 without a tokenizer, always the same bytes."""
    settings = CONFIG | {"num_hidden_layers": layers} | config
    return write_checkpoint(folder, config=settings, tensors=float_tensors(settings))


def token_ids(count: int = 12, longest: int = 48) -> list[list[int]]:
    """Sequences of several lengths."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(longest // 3, longest, count, endpoint=True)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the report, which says how long things took."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith("quantization_report")
    }
