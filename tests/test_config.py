"""The architecture read from config.json: both spellings, defaults, and everything refused."""

from typing import Any

import pytest

from qllama.config import LlamaConfig, RopeScaling
from qllama.errors import CheckpointError

LEAST = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 512,
}


def parse(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf(LEAST | changes)


def test_what_is_left_out_is_what_transformers_takes() -> None:
    assert parse() == LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
    )


def test_null_means_left_out() -> None:
    optional = (
        "num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling "
        "rope_parameters attention_bias mlp_bias tie_word_embeddings dtype torch_dtype "
        "bos_token_id eos_token_id"
    )
    assert parse(**dict.fromkeys(optional.split())) == parse()


def test_everything_given_is_read() -> None:
    config = parse(
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=3,
    )
    assert (config.num_key_value_heads, config.head_dim) == (2, 32)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (4096, 1e-5)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (True,) * 3
    assert config.bos_token_id == 3


@pytest.mark.parametrize(
    ("given", "expected"), [(None, ()), (5, (5,)), (0, (0,)), ([1, 127], (1, 127)), ([], ())]
)
def test_eos_is_one_id_or_a_list(given: Any, expected: tuple[int, ...]) -> None:
    assert parse(eos_token_id=given).eos_token_ids == expected


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float16", "dtype": "float16"}, "float16"),
    ],
)
def test_dtype_in_either_spelling(keys: dict[str, str], dtype: str) -> None:
    assert parse(**keys).dtype == dtype


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, None),
        ({}, None),
        ({"rope_type": "default"}, None),
        (
            {"rope_type": "linear", "factor": 4},
            RopeScaling(rope_type="linear", factor=4.0, original_max_position_embeddings=1024),
        ),
        (
            {"type": "dynamic", "factor": 2.0},
            RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=1024),
        ),
        (
            LLAMA3 | {"type": "llama3"},
            RopeScaling(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=2.0,
                high_freq_factor=5.0,
                original_max_position_embeddings=512,
            ),
        ),
    ],
)
def test_rope_in_either_spelling(section: dict[str, Any] | None, expected: RopeScaling) -> None:
    positions = {"max_position_embeddings": 1024}
    old = parse(rope_scaling=section, rope_theta=5e5, **positions)
    new = parse(rope_parameters=(section or {}) | {"rope_theta": 5e5}, **positions)
    both = parse(
        rope_scaling=section,
        rope_theta=500000,
        rope_parameters=(section or {}) | {"rope_theta": 5e5},
        **positions,
    )
    assert old == new == both
    assert (old.rope_theta, old.rope_scaling) == (5e5, expected)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 1000),
        ({"rope_type": "linear", "factor": 2.5}, 2500),
        ({"rope_type": "dynamic", "factor": 2.0}, 2000),
        (LLAMA3, 1000),  # already stretched
    ],
)
def test_max_model_len(scaling: dict[str, Any] | None, longest: int) -> None:
    assert parse(max_position_embeddings=1000, rope_scaling=scaling).max_model_len == longest


def llama3(*missing: str, **changes: Any) -> dict[str, Any]:
    """LLAMA3 without some keys and with other values."""
    return {key: value for key, value in (LLAMA3 | changes).items() if key not in missing}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"model_type": None, "architectures": ["X"]}, "model_type=None (architectures=['X'])"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; Llama uses 'silu'"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size=0 must be an integer from 1 to 2147483647"),
        ({"vocab_size": -1}, "vocab_size=-1 must be an integer"),
        ({"vocab_size": "128"}, "vocab_size='128' must be an integer"),
        ({"intermediate_size": 96.0}, "intermediate_size=96.0 must be an integer"),
        ({"num_attention_heads": True}, "num_attention_heads=True must be an integer"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings=2147483648 must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be an integer from 1 to"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value"),
        ({"num_key_value_heads": 12}, "num_attention_heads=6 is not a multiple of num_key_value"),
        ({"hidden_size": 50}, "hidden_size=50 is not a multiple of num_attention_heads=6"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"head_dim": [8]}, "head_dim=[8] must be an integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a positive number"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a positive number"),
        ({"rope_theta": 10**400}, "must be a positive number"),
        ({"attention_bias": 1}, "attention_bias=1 must be true or false"),
        ({"mlp_bias": "false"}, "mlp_bias='false' must be true or false"),
        ({"tie_word_embeddings": []}, "tie_word_embeddings=[] must be true or false"),
        ({"dtype": "float64"}, "dtype='float64'; use one of bfloat16, float16, float32"),
        ({"torch_dtype": {}}, "dtype={}; use one of"),
        (
            {"dtype": "float16", "torch_dtype": "bfloat16"},
            "dtype='float16' but torch_dtype='bfloat16'",
        ),
        ({"eos_token_id": 128}, "eos_token_id=128 must be a token id below vocab_size=128"),
        ({"eos_token_id": [1, -2]}, "eos_token_id=[1, -2] must be a token id"),
        ({"eos_token_id": [[1]]}, "eos_token_id=[[1]] must be a token id"),
        ({"bos_token_id": "1"}, "bos_token_id='1' must be a token id"),
        ({"bos_token_id": True}, "bos_token_id=True must be a token id"),
        # Rotary settings.
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_parameters": [LLAMA3]}, "must be an object"),
        ({"rope_parameters": {"rope_theta": "1"}}, "rope_parameters.rope_theta='1' must be"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta is given as [10000.0, 500000.0]",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": llama3(factor=4.0)},
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "rope_scaling names two types, 'linear' and 'dynamic'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type='yarn' is not supported; 'default', 'linear', 'dynamic' and",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"type": 3}}, "rope_type=3 is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type=['linear'] is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope_scaling.factor=0 must be a"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
            "'dynamic' rotary scaling needs head_dim above 2",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is not supported",
        ),
        ({"rope_scaling": llama3("factor")}, "rope_scaling.factor is missing"),
        ({"rope_scaling": llama3("low_freq_factor")}, "rope_scaling.low_freq_factor is missing"),
        (
            {"rope_scaling": llama3(high_freq_factor=2)},
            "rope_scaling.high_freq_factor=2.0 must exceed low_freq_factor=2.0",
        ),
        (
            {"rope_scaling": llama3("original_max_position_embeddings")},
            "rope_scaling.original_max_position_embeddings is missing",
        ),
        (
            {"rope_parameters": llama3(original_max_position_embeddings=0.5)},
            "rope_parameters.original_max_position_embeddings=0.5 must be an integer",
        ),
    ],
)
def test_refusals_say_what_was_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        parse(**changes)
    assert str(refusal.value).startswith("config.json: ")
    assert message in str(refusal.value)
