"""Model cards: metadata that the Hub parses, code that compiles, and nothing made up."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from qllama_convert.model_card import has_chat_template, license_of, model_card

FULL: dict[str, Any] = {
    "name": "Llama-3.1-8B-Instruct-W4A16",
    "to": "compressed-tensors",
    "scheme": "W4A16",
    "base_model": "meta-llama/Llama-3.1-8B-Instruct",
    "license_name": "llama3.1",
    "languages": ["en", "no"],
    "recipe": {"scheme": "W4A16", "dampening_frac": 0.1, "note": "a | b\nc"},
    "calibration": "512 sequences, 1,048,576 tokens.",
    "figures": {"perplexity": {"original": 6.2, "quantized": 6.412345}, "KL": {"quantized": 0.05}},
    "protocol": "8 windows of 512 tokens.",
    "notes": ["vLLM runs it."],
}


def front_matter(card: str) -> dict[str, Any]:
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert head is not None
    return yaml.safe_load(head[1])


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_a_whole_card() -> None:
    from huggingface_hub import ModelCard

    card = model_card(**FULL)
    data = ModelCard(card).data
    assert data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert data.license == "llama3.1"
    assert data.language == ["en", "no"]  # not the boolean that YAML makes of a bare no
    assert data.pipeline_tag == "text-generation"
    assert {"compressed-tensors", "vllm", "qllama"} <= set(data.tags)
    assert front_matter(card)["base_model_relation"] == "quantized"
    assert "| dampening_frac | 0.1 |" in card
    assert r"| note | a \| b c |" in card
    assert "| perplexity | 6.2 | 6.412 |" in card
    assert "| KL |  | 0.05 |" in card
    for text in ("1,048,576 tokens", "8 windows of 512", "- vLLM runs it."):
        assert text in card


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "fp8", "bf16", "native"])
@pytest.mark.parametrize("chat", [True, False])
def test_the_code_compiles_and_names_the_readers(to: str, chat: bool) -> None:
    card = model_card(**FULL | {"to": to, "chat": chat})
    code = snippets(card)
    for snippet in code:
        compile(snippet, "card", "exec")
    imports = [snippet.split()[1] for snippet in code]
    expected = ["qllama"] + ["vllm"] * (to != "native")
    expected += ["transformers"] * (to in ("compressed-tensors", "bf16"))
    assert imports == expected
    assert ("llm.chat" in card) == chat


def test_packed_zero_points_need_another_way_in_transformers() -> None:
    card = model_card(**FULL | {"scheme": "W4A16_ASYM"})
    assert "CompressedTensorsConfig(dequantize=True)" in card
    assert "dequantize=True" not in model_card(**FULL)


def test_what_is_not_known_is_not_said() -> None:
    assert "not quantized" in model_card(name="out", to="bf16", scheme="")
    card = model_card(name="out", to="gptq", scheme="W4A16")
    data = front_matter(card)
    assert not {"base_model", "license", "language"} & data.keys()
    for heading in ("How it was made", "What quantization cost", "Worth knowing", "None"):
        assert heading not in card


@pytest.mark.parametrize("path", ["models/a/b", "/models/x", "./x", "../x", "x", "~/x"])
def test_a_folder_is_no_base_model(path: str) -> None:
    assert "base_model" not in front_matter(model_card(**FULL | {"base_model": path}))


def test_a_chat_template(tmp_path: Path) -> None:
    assert not has_chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for text, expected in (("{", False), ("{}", False), ('{"chat_template": "{{ x }}"}', True)):
        config.write_text(text)
        assert has_chat_template(tmp_path) == expected
    config.unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert has_chat_template(tmp_path)


def test_the_licence_of_a_folder(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    readme = tmp_path / "README.md"
    for text, expected in (
        ("", None),
        ("# x\nlicense: mit\n", None),
        ("---\nlicense: llama3.1\ntags: []\n---\n", "llama3.1"),
        ('---\ntags: []\nlicense: "apache-2.0"\n---\nlicense: mit\n', "apache-2.0"),
        ("---\nlicense:\n---\n", None),
    ):
        readme.write_text(text)
        assert license_of(tmp_path) == expected
