"""The tiny Llama in all its forms against golden values of the tools that made it.

They come from transformers and compressed-tensors in float32; each manifest says how near a correct
implementation must come. Dequantized weights are held to them in test_formats.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafts import read_tensors
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.linear import read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization

from qllama.config import LlamaConfig
from qllama.engine.sampling_params import SamplingParams
from qllama.llm import LLM
from qllama.model.dense import make_dense

BACKENDS = ("reference", "xla", "auto")
LENGTH = 64  # of the longest golden sequence


def tolerances(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["tolerances"]


def quantizes_activations(folder: Path) -> bool:
    return (
        "min_share_of_outputs_with_rel_to_max_output_below_1e_minus_5"
        in (tolerances(folder)["unit_linear_fp32"])
    )


def sequences(golden: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [golden[f"input_ids_{i}"] for i in range(3)]


def all_logits(llm: LLM, golden: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of every position of the three sequences, `[86, V]`.

    Each is padded at its end to one length, which a causal model must not notice, so that one
    program is compiled instead of three.
    """
    return np.concatenate(
        [llm.logits(np.pad(ids, (0, LENGTH - len(ids))))[: len(ids)] for ids in sequences(golden)]
    )


def assert_near(found: np.ndarray, expected: np.ndarray, limits: dict[str, float]) -> None:
    assert found.shape == expected.shape
    error = found - expected
    assert np.abs(error).max() <= limits["max_abs"]
    assert np.sqrt((error**2).mean() / (expected**2).mean()) <= limits["rel_rms"]
    agreement = (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()
    assert agreement >= limits["argmax_agreement"]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, "float32") for backend in BACKENDS),
        ("xla", "bfloat16"),
        ("auto", "bfloat16"),
        pytest.param("reference", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_golden_ones(tiny_llama3_dir: Path, backend: str, dtype: str) -> None:
    golden = read_tensors(tiny_llama3_dir / "expected.safetensors")
    expected = np.concatenate([golden[f"logits_{i}"] for i in range(3)])
    limits = tolerances(tiny_llama3_dir)
    limits = limits["logits_fp32_compute" if dtype == "float32" else "logits_bf16_compute"]
    with LLM(
        tiny_llama3_dir, dtype=dtype, backend=backend, activation_semantics="compressed-tensors"
    ) as llm:
        assert_near(all_logits(llm, golden), expected, limits)


# Where inputs are quantized: else semantics are one, and these the programs of the golden logits.
@pytest.mark.parametrize(
    "kind",
    [
        "autofp8_static",
        "ct_fp8_block",
        "ct_fp8_dynamic",
        "ct_fp8_static",
        "ct_fp8_static_kv_fp8",
        "ct_w8a8_int8",
    ],
)
def test_backends_agree_under_the_default_semantics(
    tiny_llama3: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_llama3(kind)
    golden = read_tensors(folder / "expected.safetensors")
    limits = tolerances(folder)["logits_fp32_compute"]
    logits = {}
    for backend in BACKENDS:
        with LLM(folder, dtype="float32", backend=backend) as llm:
            logits[backend] = all_logits(llm, golden)
    for backend in ("xla", "auto"):
        assert_near(logits[backend], logits["reference"], limits)


def test_greedy_tokens_are_the_golden_ones(tiny_llama3_dir: Path) -> None:
    golden = read_tensors(tiny_llama3_dir / "expected.safetensors")
    expected = golden["greedy_ids_1"]
    params = SamplingParams(temperature=0.0, max_tokens=len(expected), ignore_eos=True)
    with LLM(tiny_llama3_dir, dtype="float32", activation_semantics="compressed-tensors") as llm:
        (output,) = llm.generate({"prompt_token_ids": golden["input_ids_1"]}, params)
    found = output.outputs[0].token_ids
    assert len(found) == len(expected)
    # Where activations are quantized, "until the first step whose margin is below 0.3".
    least = 0.3 if quantizes_activations(tiny_llama3_dir) else 0.0
    settled = next((i for i, m in enumerate(golden["greedy_margin_1"]) if m < least), len(expected))
    assert list(found[:settled]) == expected[:settled].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_linear_quantizes_its_input_as_the_library_does(
    tiny_llama3_dir: Path, backend: str
) -> None:
    """What end-to-end logits hardly show: skipping activation quantization costs them little."""
    golden = read_tensors(tiny_llama3_dir / "expected.safetensors")
    (path,) = (
        name.removeprefix("unit_input.") for name in golden if name.startswith("unit_input.")
    )
    x, expected = golden[f"unit_input.{path}"], golden[f"unit_output.{path}"]
    with open_checkpoint(tiny_llama3_dir) as checkpoint:
        shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
        quantization = parse_quantization(checkpoint, shapes)
        weight = read_linear(checkpoint, quantization, path, shapes[path]).weight
    linear = make_dense(
        jax.tree.map(jnp.asarray, weight),
        dtype=jnp.float32,
        backend=backend,
        semantics="compressed-tensors",
    )
    error = np.abs(np.asarray(jax.jit(linear)(jnp.asarray(x))) - expected) / np.abs(expected).max()
    limits = tolerances(tiny_llama3_dir)["unit_linear_fp32"]
    assert error.max() <= limits["max_rel_to_max_output"]
    share = limits.get("min_share_of_outputs_with_rel_to_max_output_below_1e_minus_5", 1.0)
    assert (error < 1e-5).mean() >= share
