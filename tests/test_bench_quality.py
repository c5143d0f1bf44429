"""benchmarks/quality.py in its tiny form."""

import json
from collections.abc import Callable
from pathlib import Path

import bench_scripts
import pytest
from quantize_cases import float_checkpoint

import qllama
from qllama import LLM

quality = bench_scripts.load("quality")


def test_cases_are_recipes() -> None:
    from qllama.gptq.recipe import make_recipe

    for case in quality.CASES:
        assert make_recipe({"scheme": case.scheme, **case.settings}).unused == ()
    assert len({case.name() for case in quality.CASES}) == len(quality.CASES)


@pytest.mark.slow
def test_command_line(
    tiny_llama3: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_llama3("ct_w4a16_g128")
    model = float_checkpoint(tmp_path / "model", vocab_size=768)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tiny / name).read_bytes())
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 60)
    peer, out = tmp_path / "peer.json", tmp_path / "quality.json"
    quoted = {"kl": 0.5, "ppl": 50.0, "quantize_wall_s": 9.0}
    peer.write_text(json.dumps({"results": {"gptq_w4a16_g64": quoted}}))
    calibration = ["--calibration", str(text), "--samples", "4", "--length", "64"]
    shown_text = ["--text", str(text), "--window", "32", "--limit", "3"]
    held_back = ["--tune", str(text), "--tune-skip", "500"]
    files = ["--peer-figures", str(peer), "--json", str(out)]
    only = ["--only", "^W4A16( algorithm=rtn)?$"]
    quality.main([str(model), *calibration, *shown_text, *held_back, *only, *files])
    records = json.loads(out.read_text())
    rtn = {"algorithm": "rtn"}
    assert [record["settings"] for record in records] == [rtn, rtn, {}, {}]
    rounded, _, shown, tuned = records
    assert shown["text"] == "text.txt, 96 tokens from 0, windows of 32"
    assert "from 500" in tuned["text"]
    assert shown["peers"]["llm-compressor (quoted)"] == 0.5
    assert "peers" not in tuned
    assert 0 < shown["value"] < rounded["value"]
    parts = shown["parts"]
    assert parts["seconds"] >= parts["solve"] > 0

    # The same, by the public functions.
    recipe = {"scheme": "W4A16", "group_size": 64}
    qllama.quantize(
        model,
        tmp_path / "again",
        recipe=recipe,
        dataset=text,
        num_calibration_samples=4,
        max_seq_length=64,
    )
    with LLM(model) as a, LLM(tmp_path / "again") as b:
        expected = qllama.compare(a, b, text.read_text(), window=32, limit=3)
    assert shown["value"] == pytest.approx(expected.kl_mean, rel=1e-4)
    assert parts["perplexity"] == pytest.approx(expected.perplexity_b, rel=1e-4)
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith("text  W4A16 ")
    assert lines[2].endswith(" x peer")
