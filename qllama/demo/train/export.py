"""The trained model as a folder: bfloat16 weights, tokenizer, generation defaults."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qllama_convert.names import EMBED_TOKENS, GATE_UP, QKV, layer_path
from qllama_convert.writer import write_checkpoint

from qllama.demo.train.facts import TRAINING_FILE, TrainingFacts
from qllama.demo.train.tokenizer import tokenizer_files
from qllama.model.dense import Dense, MergedDense
from qllama.model.llama import Llama

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Found by reading: hotter, the sentences lose their thread; cooler, they repeat themselves.
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
_SHARD_BYTES = 12_000_000  # so that the files can be moved where large ones cannot


def hf_config(
    architecture: Mapping[str, Any], tokenizer: "Tokenizer", length: int
) -> dict[str, Any]:
    """The `config.json` of an unquantized model for positions below `length`."""
    return {
        **architecture,
        **_token_ids(tokenizer),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": length,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def export(
    folder: Path,
    model: Llama,
    config: Mapping[str, Any],
    tokenizer: "Tokenizer",
    facts: TrainingFacts,
) -> Path:
    """Write the float checkpoint, in place of one that may be there, and return its path.

    Args:
        folder: see `write_checkpoint`.
        model: its parameters are rounded to bfloat16.
        config: as `hf_config` gives it.
        tokenizer: written as the files of `tokenizer_files`.
        facts: written beside them.
    """
    generation = {**_token_ids(tokenizer), **_SAMPLING}
    files = {
        **tokenizer_files(tokenizer, config["max_position_embeddings"]),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        TRAINING_FILE: facts.to_json(),
    }
    return write_checkpoint(
        folder,
        config=config,
        tensors=dict(_stored_tensors(model)),
        files={name: text.encode() for name, text in files.items()},
        max_shard_bytes=_SHARD_BYTES,
        overwrite=True,
    )


def _token_ids(tokenizer: "Tokenizer") -> dict[str, Any]:
    ids = tokenizer.token_to_id
    return {
        "bos_token_id": ids("<|begin_of_text|>"),
        "eos_token_id": [ids("<|end_of_text|>"), ids("<|eot_id|>")],
        "pad_token_id": ids("<|finetune_right_pad_id|>"),
    }


def _stored_tensors(model: Llama) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{EMBED_TOKENS}.weight", _bfloat16(model.embed_tokens)
    yield "model.norm.weight", _bfloat16(model.norm.weight)
    for i, layer in enumerate(model.layers):
        path, attention, mlp = layer_path(i), layer.self_attn, layer.mlp
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", _bfloat16(getattr(layer, name).weight)
        yield from _split(path, QKV, attention.qkv_proj)
        yield f"{path}.self_attn.o_proj.weight", _bfloat16(attention.o_proj.weight)
        yield from _split(path, GATE_UP, mlp.gate_up_proj)
        yield f"{path}.mlp.down_proj.weight", _bfloat16(mlp.down_proj.weight)


def _bfloat16(weight: nnx.Variable[jax.Array]) -> np.ndarray:
    return np.asarray(weight[...], jnp.bfloat16)


def _split(
    path: str, names: Sequence[str], merged: MergedDense
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of Linears whose rows are stacked in one."""
    (stacked,) = merged.parts
    assert isinstance(stacked, Dense)
    rows = np.split(_bfloat16(stacked.weight), np.cumsum(merged.sizes)[:-1])
    for name, weight in zip(names, rows, strict=True):
        yield f"{path}.{name}.weight", weight
