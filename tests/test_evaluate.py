"""Perplexity and comparison, against what transformers computes and numpy in float64."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sample_reports import linear, report

import qllama
from qllama import LLM
from qllama.cli import main
from qllama.evaluate.compare import compare_with, remember

WINDOW = 64

Float64 = NDArray[np.float64]

# The commands show warnings as lines; under pytest's filter they would be exceptions.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def folders(tiny_llama3: Callable[[str], Path]) -> tuple[Path, Path]:
    return tiny_llama3("ct_w4a16_g128"), tiny_llama3("ct_w8a8_int8")


@pytest.fixture(scope="module")
def llms(folders: tuple[Path, Path]) -> Iterator[tuple[LLM, LLM]]:
    semantics = "compressed-tensors"
    with LLM(folders[0]) as a, LLM(folders[1], activation_semantics=semantics) as b:
        yield a, b


@pytest.fixture(scope="module")
def text(fixtures_dir: Path) -> str:
    return (fixtures_dir / "eval_text.txt").read_text(encoding="utf-8")[:3000]


def log_softmax(logits: np.ndarray) -> Float64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def nlls(log_probs: Float64, ids: np.ndarray) -> Float64:
    return -np.take_along_axis(log_probs[..., :-1, :], ids[..., 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize(("size_a", "size_b"), [(1, 2), (2, 1), (2, 4)])
def test_models_on_different_meshes(
    size_a: int, size_b: int, tiny_llama3: Callable[[str], Path], text: str
) -> None:
    # Weights only: rounded inputs would flip, and the figures move with them.
    folders = tiny_llama3("ct_w4a16_g128"), tiny_llama3("bf16_original")
    expected = vars(qllama.compare(*folders, text, window=WINDOW, limit=3))
    with (
        LLM(folders[0], tensor_parallel_size=size_a) as a,
        LLM(folders[1], tensor_parallel_size=size_b) as b,
    ):
        found = vars(qllama.compare(a, b, text, window=WINDOW, limit=3))
        remembered = remember(a, text, window=WINDOW, limit=3)
        assert vars(compare_with(remembered, b, text)) == found
    for name, value in expected.items():
        near = value if isinstance(value, str | int) else pytest.approx(value, rel=1e-3)
        assert found[name] == near, name


# -- perplexity ------------------------------------------------------------------------------------


def test_perplexity_of_golden_logits(llms: tuple[LLM, LLM], folders: tuple[Path, Path]) -> None:
    """Logits that transformers computed, a whole sequence one window."""
    golden = load_file(folders[0] / "expected.safetensors")
    for i in range(3):
        ids = golden[f"input_ids_{i}"]
        expected = nlls(log_softmax(golden[f"logits_{i}"]), ids)
        result = qllama.perplexity(llms[0], ids, window=len(ids))
        assert result.tokens == len(ids) - 1
        assert result.mean_nll == pytest.approx(expected.mean(), abs=1e-4)
        assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)


@pytest.mark.oracle
def test_perplexity_of_a_text(llms: tuple[LLM, LLM], folders: tuple[Path, Path], text: str) -> None:
    """transformers tokenizes, cuts, and has its own loss."""
    found = oracle.run(
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder, text = str(folder), str(text)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
        ids = torch.tensor(ids)[: len(ids) // 64 * 64].reshape(-1, 64)
        with torch.no_grad():
            out["loss"] = np.array([model(row[None], labels=row[None]).loss for row in ids])
        """,
        folder=np.array(str(folders[0])),
        text=np.array(text),
    )
    result = qllama.perplexity(llms[0], text, window=WINDOW)
    assert result.windows == len(found["loss"]) > 5
    assert result.tokens == 63 * result.windows
    assert result.mean_nll == pytest.approx(found["loss"].mean(), abs=1e-5)
    assert str(result.tokens) in result.protocol
    assert f"{result.windows} windows of 64" in result.protocol


def test_limit_and_blocks(llms: tuple[LLM, LLM], text: str) -> None:
    """Two windows of 300, which are no multiple of a block, against the logits themselves."""
    llm = llms[0]
    assert llm.tokenizer is not None
    ids = np.array(llm.tokenizer.encode(text, add_special_tokens=False))
    windows = ids[:600].reshape(2, 300)
    expected = np.concatenate([nlls(log_softmax(llm.logits(w)), w) for w in windows])
    result = qllama.perplexity(llm, text, window=300, limit=2)
    assert result.windows == 2
    assert result.mean_nll == pytest.approx(expected.mean(), abs=1e-6)


# -- comparison ------------------------------------------------------------------------------------


def test_comparison_of_golden_logits(llms: tuple[LLM, LLM], folders: tuple[Path, Path]) -> None:
    golden = [load_file(folder / "expected.safetensors") for folder in folders]
    ids = golden[0]["input_ids_2"]
    assert np.array_equal(ids, golden[1]["input_ids_2"])
    a, b = (log_softmax(g["logits_2"]) for g in golden)
    kl = (np.exp(a) * (a - b)).sum(axis=1)[:-1]
    same = (a.argmax(axis=1) == b.argmax(axis=1))[:-1]
    result = qllama.compare(*llms, ids, window=len(ids))
    # Activations are quantized in b: a flipped rounding moves its logits by up to a hundredth.
    assert result.kl_mean == pytest.approx(kl.mean(), rel=0.02)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=0.1)
    assert result.top1_agreement == pytest.approx(same.mean(), abs=1.5 / len(same))
    assert result.perplexity_a == pytest.approx(math.exp(nlls(a, ids).mean()), rel=1e-4)
    assert result.perplexity_b == pytest.approx(math.exp(nlls(b, ids).mean()), rel=0.01)
    assert result.tokens == len(ids) - 1


def test_comparison_equals_that_of_all_logits_in_float64(llms: tuple[LLM, LLM], text: str) -> None:
    a, b = llms
    assert a.tokenizer is not None
    ids = np.array(a.tokenizer.encode(text, add_special_tokens=False))
    windows = ids[: len(ids) // 300 * 300].reshape(-1, 300)
    kls, agree = [], []
    for window in windows:
        p, q = (log_softmax(llm.logits(window))[:-1] for llm in llms)
        kls.append((np.exp(p) * (p - q)).sum(axis=1))
        agree.append(p.argmax(axis=1) == q.argmax(axis=1))
    result = qllama.compare(a, b, text, window=300)
    assert result.kl_mean == pytest.approx(np.mean(kls), rel=1e-4)
    assert result.kl_p99 == pytest.approx(np.percentile(kls, 99), rel=1e-4)
    assert result.top1_agreement == np.mean(agree)
    assert result.perplexity_a == pytest.approx(
        qllama.perplexity(a, text, window=300).perplexity, rel=1e-6
    )


def test_models_need_not_be_in_memory_together(
    llms: tuple[LLM, LLM], folders: tuple[Path, Path], text: str
) -> None:
    together = qllama.compare(llms[0], llms[1], text, window=WINDOW, limit=4)
    with LLM(folders[0]) as first:
        reference = remember(first, text, window=WINDOW, limit=4)
    assert not hasattr(first, "model")  # closed
    assert compare_with(reference, llms[1], text) == together


def test_folders_can_be_given(folders: tuple[Path, Path], llms: tuple[LLM, LLM], text: str) -> None:
    same = qllama.compare(folders[0], llms[0], text, window=WINDOW, limit=3)
    assert (same.kl_mean, same.kl_p99, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert same.perplexity_a == same.perplexity_b
    other = qllama.compare(str(folders[0]), folders[1], text, window=WINDOW, limit=3)
    assert other.kl_mean > 0.001


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "Short."}, "tokens, which do not fill a window of 64; give a longer text"),
        ({"window": 1}, "window=1 must be an integer of 2 or more"),
        ({"window": 6.4}, "window=6.4 must be an integer of 2 or more"),
        ({"limit": 0}, "limit=0 must be an integer of 1 or more"),
        ({"window": 10**6}, "window=1000000 is more than the"),
        ({"text": [3, 768] * 40}, "token ids [768"),
    ],
)
def test_bad_arguments(
    llms: tuple[LLM, LLM], text: str, options: dict[str, Any], message: str
) -> None:
    arguments = {"text": text, "window": WINDOW} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        qllama.perplexity(llms[0], **arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        qllama.compare(*llms, **arguments)


def test_other_tokenizers_are_refused(llms: tuple[LLM, LLM], text: str) -> None:
    tiny = llms[0]
    with LLM(max_model_len=128) as demo:
        sizes = f"{tiny.config.vocab_size} and {demo.config.vocab_size}"
        with pytest.raises(ValueError, match=f"the models have vocabularies of {sizes} tokens"):
            qllama.compare(tiny, demo, text, window=WINDOW)
    reference = remember(tiny, text, window=WINDOW, limit=2)
    with pytest.raises(ValueError, match="tokenizers make different tokens of the text"):
        compare_with(reference, llms[1], "Another text. " * 100)


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_commands(
    folders: tuple[Path, Path],
    llms: tuple[LLM, LLM],
    text_file: Path,
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    protocol = ["--text", str(text_file), "--window", "64", "--limit", "2"]
    a, b = map(str, folders)
    expected = qllama.perplexity(llms[0], text, window=64, limit=2)
    assert main(["perplexity", a, *protocol, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["perplexity"] == expected.perplexity
    assert main(["perplexity", a, *protocol]) == 0
    output = capfd.readouterr().out
    assert f"perplexity  {expected.perplexity:.4f}\n" in output
    assert expected.protocol in output

    compared = qllama.compare(*llms, text, window=64, limit=2)
    semantics = ["--activation-semantics", "compressed-tensors"]
    assert main(["compare", a, b, *protocol, *semantics, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kl_mean"] == pytest.approx(compared.kl_mean, rel=1e-6)
    assert main(["compare", a, b, *protocol]) == 0
    assert re.search(r"KL\(A \|\| B\) +mean 0\.\d+, 99th perc", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "{model}", "--text", "missing.txt"], "missing.txt: cannot be read: No"),
        (["perplexity", "{model}", "--text", "{latin}"], "line 1: is not UTF-8 text (byte 0xef)"),
        (["perplexity", "{model}", "--text", "{text}", "--window", "0"], "window=0 must be"),
        (["compare", "{model}", "missing", "--text", "{text}", "--limit", "1"], "no such folder"),
    ],
)
def test_mistakes(
    folders: tuple[Path, Path],
    text_file: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    latin = text_file.with_name("latin.txt")
    latin.write_bytes(b"na\xefve")
    names = {"model": folders[0], "latin": latin, "text": text_file}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_compare_writes_the_report_page(
    folders: tuple[Path, Path],
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    a, b, page = folders[0], tmp_path / "quantized", tmp_path / "page.html"
    shutil.copytree(folders[1], b)
    protocol = ["--text", str(text_file), "--window", "64", "--limit", "2"]
    command = ["compare", str(a), str(b), *protocol, "--report", str(page), "--json"]
    assert main(command) == 2
    assert "has no quantization_report.json, which" in capfd.readouterr().err
    (b / "quantization_report.json").write_text(report(linear(0, "mlp.up_proj")).to_json())
    assert main(command) == 0
    figures = json.loads(capfd.readouterr().out)
    written = page.read_text(encoding="utf-8")
    assert f"<b>{figures['kl_mean']:.4f}</b>" in written
    assert figures["protocol"] in written
