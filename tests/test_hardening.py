"""Checkpoints that once crashed, hung or gave NaN where a CheckpointError belongs."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drafts import read_tensors, write_tensors
from qllama_convert.checkpoint import CheckpointWarning
from small_checkpoints import LLAMA3_ROPE, make

from qllama import LLM, CheckpointError

BF16 = ml_dtypes.bfloat16
ATTENTION = "model.layers.0.self_attn"
Q_PROJ = f"{ATTENTION}.q_proj"
IDS = [1, 5, 9, 20]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: make(kind, tmp_path / kind)


def edit_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))


def edit_tensor(folder: Path, name: str, edit: Callable[[np.ndarray], Any]) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    tensors[name] = edit(tensors[name].copy())
    write_tensors(folder / "model.safetensors", tensors)


def refusal(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        with pytest.raises(CheckpointError) as caught:
            LLM(folder)
    message = str(caught.value)
    assert len(message) < 2000
    return message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300"),  # 0 in float32
        ({"rope_theta": 1e-30}, "rope_theta=1e-30"),  # infinite angles
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 1e-30}}, "rope_scaling.factor=1e-30"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-9}}, "factor=1e-09"),  # no positions
        ({"rope_scaling": {"type": "dynamic", "factor": 1e17}}, "factor=1e"),  # 0 ** 0
        ({"attention_bias": "x" * 10**6}, "must be true or false"),  # a long message
        ({"hidden_size": [[[[[[[[[[]]]]]]]]]] * 9}, "hidden_size="),
        ({"eos_token_id": [10**30] * 10**5}, "must be a token id"),
    ],
)
def test_configs(checkpoint: Callable[[str], Path], values: dict[str, Any], message: str) -> None:
    folder = checkpoint("plain")
    edit_config(folder, **values)
    assert message in refusal(folder)


def test_large_but_possible_numbers(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("plain")
    scaling = {"type": "dynamic", "factor": 1e6}
    edit_config(folder, rope_theta=1e18, rms_norm_eps=1e-12, rope_scaling=scaling)
    assert np.isfinite(LLM(folder, max_model_len=64).logits(IDS)).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("value", [65536, -3e38])
def test_weights_that_would_overflow(
    checkpoint: Callable[[str], Path], dtype: Any, value: float
) -> None:
    folder = checkpoint("plain")

    def edit(weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(dtype)
        weight[7] = value
        return weight

    edit_tensor(folder, "model.norm.weight", edit)
    assert "model.norm: tensor weight has the value" in refusal(folder)


def test_weights_as_large_as_float16_allows(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("plain")
    edit_tensor(folder, "model.norm.weight", lambda weight: np.full_like(weight, 65000, np.float16))
    edit_tensor(folder, f"{Q_PROJ}.weight", lambda weight: np.full_like(weight, 65000, np.float32))
    assert np.isfinite(LLM(folder).logits(IDS)).all()


@pytest.mark.parametrize("kind", ["packed", "int8", "float8_kv"])
@pytest.mark.parametrize("value", [256, 3e38])
def test_scales_that_would_overflow(
    checkpoint: Callable[[str], Path], kind: str, value: float
) -> None:
    folder = checkpoint(kind)
    edit_tensor(folder, f"{Q_PROJ}.weight_scale", lambda scale: np.full_like(scale, value))
    assert f"{Q_PROJ}: the scale at [0, 0] is" in refusal(folder)


@pytest.mark.parametrize("name", [f"{Q_PROJ}.input_scale", f"{ATTENTION}.k_scale"])
def test_scales_whose_reciprocal_is_infinite(checkpoint: Callable[[str], Path], name: str) -> None:
    folder = checkpoint("float8_kv")
    edit_tensor(folder, name, lambda scale: np.full_like(scale, 1e-39))
    assert "subnormal" in refusal(folder)


def test_biases_of_different_dtypes_are_read(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tied")
    before = LLM(folder).logits(IDS)
    edit_tensor(folder, f"{Q_PROJ}.bias", lambda bias: bias.astype(np.float32))
    np.testing.assert_allclose(LLM(folder).logits(IDS), before, atol=1e-5)


def test_an_expression_that_backtracks_for_ever(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mixed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:^(([a-z_.0-9])+.)+!")
    (folder / "config.json").write_text(json.dumps(config))
    assert np.isfinite(LLM(folder).logits(IDS)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": 1e300}, "temperature must be"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must be"),
        ({"max_new_tokens": "x" * 10**6}, "max_tokens must be an integer"),
        ({"top_k": []}, "top_k must be an integer"),
    ],
)
def test_generation_configs(
    checkpoint: Callable[[str], Path], values: dict[str, Any], message: str
) -> None:
    folder = checkpoint("tokenizer")
    edit_config(folder, "generation_config.json", **values)
    found = refusal(folder)
    assert "generation_config.json" in found
    assert message in found


# -- tokenizers --------------------------------------------------------------------------------


def spoil_tokenizer(folder: Path, *path: str | int, value: Any) -> None:
    name = folder / "tokenizer.json"
    content = json.loads(name.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    name.write_text(json.dumps(content))


def test_a_tokenizer_that_fails_only_in_use(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tokenizer")
    edit_config(folder, "tokenizer_config.json", model_max_length="128")
    assert "the tokenizer files cannot be used (TypeError" in refusal(folder)


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tokenizer")
    spoil_tokenizer(folder, "post_processor", "special_tokens", "<s>", "ids", value=[64])
    assert "makes token id 64, but the model has 64 tokens" in refusal(folder)


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("tokenizer")
    (folder / "own.py").write_text("class Own: ...")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked the user"))
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    edit_config(folder, "tokenizer_config.json", **code)
    assert "contains custom code" in refusal(folder)


NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*NEEDED, *OTHERS])
@pytest.mark.parametrize("what", ["pipe", "loop", "folder", "device", "empty"])
def test_files_that_are_none(checkpoint: Callable[[str], Path], name: str, what: str) -> None:
    folder = checkpoint("tokenizer")
    path = folder / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(name)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    else:
        path.touch()
    if name in NEEDED or what in ("pipe", "device"):
        assert name.partition(".")[0] in refusal(folder)
        return
    with contextlib.suppress(CheckpointError):  # the library may do without
        assert LLM(folder).tokenizer is not None


def test_a_broken_chat_template_says_so(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tokenizer")
    (folder / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    llm = LLM(folder)
    with pytest.raises(ValueError, match="the chat template cannot render these messages"):
        llm.chat([{"role": "user", "content": "a"}])
