"""Loading a tokenizer: the shortcut around `AutoTokenizer` comes to the same object."""

from pathlib import Path

import pytest

from qllama import demo
from qllama.errors import CheckpointError
from qllama.tokenizer import load_tokenizer


def same_as_auto(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template
    assert ours.all_special_ids == theirs.all_special_ids
    text = "Naïve Emma  said: \n\n“12345”<|eot_id|>"
    assert ours.encode(text) == theirs.encode(text)


def test_fixtures(tiny_llama3_dir: Path) -> None:
    same_as_auto(tiny_llama3_dir)


def test_the_embedded_model() -> None:
    same_as_auto(demo.model_path())


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("settings", ["{", "[]", "3", '"text"', '{"tokenizer_class": []}'])
def test_unusable_settings(settings: str, tmp_path: Path) -> None:
    model = demo.model_path()
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match="tokenizer files cannot be used"):
        load_tokenizer(tmp_path)
