"""One tiny checkpoint of every format, written with the writers: what the fuzz tests spoil."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qllama_convert import bits
from qllama_convert.formats import fp8, gptq, naive_quantized, pack_quantized, plain
from qllama_convert.names import LM_HEAD, embedding_shape, linear_shapes, norm_shapes
from qllama_convert.writer import write_checkpoint

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

Tensors = dict[str, np.ndarray]
Write = Callable[[QTensor], Tensors]

VOCABULARY = 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "use_cache": True,
    "transformers_version": "4.57.1",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Kind:
    """What makes one checkpoint different from the plain one."""

    config: dict[str, Any]
    write: Callable[[str], tuple[QuantScheme, Write] | None] = lambda path: None
    files: Callable[[], dict[str, bytes]] = dict
    kv_scales: bool = False
    max_shard_bytes: int = 1 << 30


def make(kind: str, folder: Path) -> Path:
    """Write the checkpoint of a kind, always the same bytes."""
    made = KINDS[kind]
    config = LlamaConfig.from_hf(CONFIG | made.config)
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(*embedding_shape(config))}
    for path, shape in norm_shapes(config).items():
        tensors[f"{path}.weight"] = (1 + weight(*shape)).astype(ml_dtypes.bfloat16)
    for path, shape in linear_shapes(config).items():
        if path == LM_HEAD and config.tie_word_embeddings:
            continue
        how = None if path == LM_HEAD else made.write(path)
        if how is None:
            stored = plain.write(weight(*shape))
        else:
            scheme, write = how
            static = scheme.activations is not None and not scheme.activations.dynamic
            scale = np.float32(0.02) if static else None
            stored = write(quantize_rtn(weight(*shape), scheme, input_scale=scale))
        if config.attention_bias and "self_attn" in path:
            stored["bias"] = weight(shape[0])
        tensors |= {f"{path}.{suffix}": array for suffix, array in stored.items()}
    if made.kv_scales:
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = np.array([0.03], ml_dtypes.bfloat16)
    write_checkpoint(
        folder,
        config=CONFIG | made.config,
        tensors=tensors,
        files=made.files(),
        max_shard_bytes=made.max_shard_bytes,
    )
    return folder


def _every(preset: str, write: Write) -> Callable[[str], tuple[QuantScheme, Write]]:
    return lambda path: (PRESETS[preset], write)


def _reordered_gptq(weight: QTensor) -> Tensors:
    """With activation order: columns belong to groups in no order at all."""
    groups = np.arange(weight.shape[1], dtype=np.int32) // weight.group_size[1]
    return gptq.write(replace(weight, g_idx=np.random.default_rng(1).permutation(groups)))


def _awq(weight: QTensor) -> Tensors:
    """Column l of eight is in nibble [0, 4, 1, 5, 2, 6, 3, 7][l]; so the nibbles hold `lanes`."""
    lanes = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(codes: np.ndarray) -> np.ndarray:
        unsigned = np.ascontiguousarray((codes + 8).astype(np.uint8).T)
        shuffled = unsigned.reshape(len(unsigned), -1, 8)[..., lanes]
        return bits.pack_words(shuffled.reshape(unsigned.shape), 4)

    return {
        "qweight": words(bits.unpack_signed(np.asarray(weight.codes), weight.shape[1])),
        "qzeros": words(np.asarray(weight.zeros)),
        "scales": np.ascontiguousarray(np.asarray(weight.scales).T.astype(np.float16)),
    }


def _mixed(path: str) -> tuple[QuantScheme, Write]:
    """int4 in the MLP, FP8 in the attention."""
    if ".mlp." in path:
        return PRESETS["W4A16"], pack_quantized.write
    return PRESETS["FP8_DYNAMIC"], naive_quantized.write


def compressed(
    format_name: str, groups: dict[str, dict[str, Any]], **others: Any
) -> dict[str, Any]:
    """A config of compressed-tensors as its exporters write it."""
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": format_name,
            "config_groups": groups,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "version": "0.12.0",
        }
        | others
    }


def _group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **others: Any) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return group | {"output_activations": None} | others


_INT4 = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 128,
    "symmetric": True,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
_INT8 = _INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}

_GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": True,
    "sym": True,
    "static_groups": False,
    "true_sequential": True,
    "damp_percent": 0.1,
    "lm_head": False,
    "checkpoint_format": "gptq",
}


def _tokenizer_files() -> dict[str, bytes]:
    """A byte-free tokenizer of letters, a chat template, and sampling defaults."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", "<|eot|>", " ", *"abcdefghijklmnopqrstuvwxyz.,:\n"]
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("i", "n"), ("o", "u")]
    words += [first + second for first, second in merges]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|eot|>"])
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {"3": {"content": "<|eot|>", "special": True}},
    }
    sampling = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "max_new_tokens": 8,
        "repetition_penalty": 1.1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": "</s>"}',
        "chat_template.jinja": template.encode(),
        "generation_config.json": json.dumps(sampling).encode(),
    }


KINDS = {
    "plain": Kind({}),
    "tied": Kind(
        {"tie_word_embeddings": True, "attention_bias": True, "rope_scaling": LLAMA3_ROPE}
    ),
    "tokenizer": Kind({}, files=_tokenizer_files),
    "gptq": Kind(
        {"quantization_config": _GPTQ},
        _every("W4A16", _reordered_gptq),
        lambda: {"quantize_config.json": json.dumps(_GPTQ).encode()},
    ),
    "gptq_v2": Kind(
        {"quantization_config": _GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}},
        _every("W4A16_ASYM", gptq.write),
    ),
    "awq": Kind(
        {
            "quantization_config": {
                "quant_method": "awq",
                "bits": 4,
                "group_size": 128,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            }
        },
        _every("W4A16_ASYM", _awq),
    ),
    "autofp8": Kind(
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "static",
                "ignored_layers": ["lm_head"],
            }
        },
        _every("FP8", fp8.write),
    ),
    "fp8_block": Kind(
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": None,
            }
        },
        _every("FP8_BLOCK", fp8.write),
    ),
    "packed": Kind(
        compressed("pack-quantized", {"group_0": _group(_INT4)}),
        _every("W4A16", pack_quantized.write),
    ),
    "packed_asym": Kind(
        compressed("pack-quantized", {"group_0": _group(_INT4 | {"symmetric": False})}),
        _every("W4A16_ASYM", pack_quantized.write),
    ),
    "int8": Kind(
        compressed("int-quantized", {"group_0": _group(_INT8, _TOKEN)}),
        _every("W8A8", naive_quantized.write),
    ),
    "float8_kv": Kind(
        compressed("float-quantized", {"group_0": _group(_FP8, _FP8)}, kv_cache_scheme=_FP8),
        _every("FP8", naive_quantized.write),
        kv_scales=True,
    ),
    "mixed": Kind(
        compressed(
            "mixed-precision",
            {
                "group_0": _group(_INT4, targets=["re:.*mlp.*proj$"], format="pack-quantized"),
                "group_1": _group(
                    _FP8 | {"strategy": "channel"},
                    _FP8 | {"strategy": "token", "dynamic": True},
                    targets=["re:.*self_attn.*proj$"],
                    format="float-quantized",
                ),
            },
        ),
        _mixed,
        max_shard_bytes=50_000,
    ),
}
