"""The trained model as a folder: W4A16 compressed-tensors, tokenizer, generation defaults, card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qllama_convert.export_config import compressed_tensors_config
from qllama_convert.formats import pack_quantized
from qllama_convert.names import EMBED_TOKENS, LM_HEAD, layer_path, linear_shapes
from qllama_convert.writer import write_checkpoint

from qllama.config import LlamaConfig
from qllama.demo.train.card import TrainingFacts, model_card
from qllama.demo.train.tokenizer import tokenizer_files
from qllama.model.dense import Dense, MergedDense
from qllama.model.llama import Llama
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import W4A16

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Found by reading: hotter, the sentences lose their thread; cooler, they repeat themselves.
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


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
    """Write the checkpoint folder, in place of one that may be there, and return its path.

    Args:
        folder: see `write_checkpoint`.
        model: float; its Linears are rounded to W4A16, the rest to bfloat16.
        config: as `hf_config` gives it.
        tokenizer: written as the files of `tokenizer_files`.
        facts: for the card.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    generation = {**_token_ids(tokenizer), **_SAMPLING}
    files = {
        **tokenizer_files(tokenizer, config["max_position_embeddings"]),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "README.md": model_card(config, parameters, facts),
    }
    schemes = dict.fromkeys(linear_shapes(LlamaConfig.from_hf(config)), W4A16)
    del schemes[LM_HEAD]
    return write_checkpoint(
        folder,
        config={**config, "quantization_config": compressed_tensors_config(schemes, [LM_HEAD])},
        tensors=dict(_stored_tensors(model)),
        files={name: text.encode() for name, text in files.items()},
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
        linears = {
            **_split(f"{path}.self_attn", ("q_proj", "k_proj", "v_proj"), attention.qkv_proj),
            f"{path}.self_attn.o_proj": _bfloat16(attention.o_proj.weight),
            **_split(f"{path}.mlp", ("gate_proj", "up_proj"), mlp.gate_up_proj),
            f"{path}.mlp.down_proj": _bfloat16(mlp.down_proj.weight),
        }
        for linear, weight in linears.items():
            arrays = pack_quantized.write(quantize_rtn(weight, W4A16))
            yield from ((f"{linear}.{suffix}", array) for suffix, array in arrays.items())


def _bfloat16(weight: nnx.Variable[jax.Array]) -> np.ndarray:
    return np.asarray(weight[...], jnp.bfloat16)


def _split(path: str, names: Sequence[str], merged: MergedDense) -> dict[str, np.ndarray]:
    """The weights of Linears whose rows are stacked in one, by module path."""
    (stacked,) = merged.parts
    assert isinstance(stacked, Dense)
    rows = np.split(_bfloat16(stacked.weight), np.cumsum(merged.sizes)[:-1])
    return {f"{path}.{name}": weight for name, weight in zip(names, rows, strict=True)}
