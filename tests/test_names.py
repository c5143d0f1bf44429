"""Names and shapes against the checkpoints that transformers and other tools wrote."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import oracle
import pytest
from qllama_convert import names
from qllama_convert.checkpoint import open_checkpoint

from qllama.config import LlamaConfig


@pytest.fixture
def config() -> LlamaConfig:
    """Every size differs from every other."""
    return LlamaConfig(
        vocab_size=11,
        hidden_size=25,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=32,
    )


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    modules: dict[str, tuple[int, ...]] = {names.EMBED_TOKENS: names.embedding_shape(config)}
    modules |= names.linear_shapes(config)
    modules |= names.norm_shapes(config)
    return {f"{path}.weight": shape for path, shape in modules.items()}


def test_shapes(config: LlamaConfig) -> None:
    layer = {
        "input_layernorm": (25,),
        "self_attn.q_proj": (30, 25),
        "self_attn.k_proj": (6, 25),
        "self_attn.v_proj": (6, 25),
        "self_attn.o_proj": (25, 30),
        "post_attention_layernorm": (25,),
        "mlp.gate_proj": (40, 25),
        "mlp.up_proj": (40, 25),
        "mlp.down_proj": (25, 40),
    }
    expected: dict[str, tuple[int, ...]] = {"lm_head": (11, 25), "model.embed_tokens": (11, 25)}
    expected |= {f"model.layers.{i}.{name}": layer[name] for i in (0, 1) for name in layer}
    expected |= {"model.norm": (25,)}
    assert weight_shapes(config) == {f"{path}.weight": s for path, s in expected.items()}
    assert list(names.linear_shapes(config))[-2:] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert list(names.norm_shapes(config))[-1] == "model.norm"


@pytest.mark.oracle
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_has_the_same_parameters(bias: bool, config: LlamaConfig) -> None:
    config = replace(config, attention_bias=bias, mlp_bias=bias)
    expected = {name: list(shape) for name, shape in weight_shapes(config).items()}
    for path, (n, _) in names.linear_shapes(config).items():
        if names.has_bias(config, path):
            expected[f"{path}.bias"] = [n]
    fields = {key: value for key, value in asdict(config).items() if key != "dtype"}
    script = """
        import json
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(**json.loads(str(fields))))
        out["shapes"] = np.array(json.dumps({n: p.shape for n, p in model.named_parameters()}))
    """
    shapes = oracle.run(script, fields=np.array(json.dumps(fields)))["shapes"]
    assert json.loads(str(shapes)) == expected


def test_names_cover_a_real_checkpoint(tiny_llama3: Callable[[str], Path]) -> None:
    with open_checkpoint(tiny_llama3("bf16_original")) as checkpoint:
        found = {name: info.shape for name, info in checkpoint.tensors.items()}
        assert weight_shapes(LlamaConfig.from_hf(checkpoint.config)) == found


def test_modules_of_quantized_checkpoints(tiny_llama3_dir: Path) -> None:
    # `self_attn` itself holds nothing but the scales of a quantized cache.
    with open_checkpoint(tiny_llama3_dir) as checkpoint:
        config = LlamaConfig.from_hf(checkpoint.config)
        known = names.linear_shapes(config).keys() | names.norm_shapes(config).keys()
        found = {names.split_name(name)[0] for name in checkpoint.tensors}
        found -= {f"{names.layer_path(i)}.self_attn" for i in range(config.num_hidden_layers)}
        assert found == known | {names.EMBED_TOKENS}


def test_tied_head_is_listed(config: LlamaConfig) -> None:
    tied = replace(config, tie_word_embeddings=True)
    assert names.linear_shapes(tied)["lm_head"] == (11, 25)


def test_biases(config: LlamaConfig) -> None:
    attention = replace(config, attention_bias=True)
    mlp = replace(config, mlp_bias=True)
    for path in names.linear_shapes(config):
        assert not names.has_bias(config, path)
        assert names.has_bias(attention, path) == ("self_attn" in path)
        assert names.has_bias(mlp, path) == ("mlp" in path)


@pytest.mark.parametrize(
    ("name", "derived"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("model.rotary_emb.inv_freq", True),
        ("model.rotary_emb.original_inv_freq", True),
        ("model.layers.3.self_attn.inv_freq", False),
        ("model.layers.3.self_attn.rotary_emb.weight", False),
        ("model.norm.weight", False),
        ("inv_freq", False),
    ],
)
def test_derived_tensors(name: str, derived: bool) -> None:
    assert names.is_derived(name) == derived
