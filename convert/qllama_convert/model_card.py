"""The README.md of an exported checkpoint: what it is, how it was made, how it is run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qllama.errors import CheckpointError
from qllama_convert.files import open_file, read_json

_FORM_TAGS = {
    "compressed-tensors": ("compressed-tensors", "vllm"),
    "gptq": ("gptq",),
    "fp8": ("fp8", "vllm"),
}


def model_card(
    *,
    name: str,
    to: str,
    scheme: str,
    base_model: str | None = None,
    license_name: str | None = None,
    languages: Sequence[str] = (),
    recipe: Mapping[str, object] | None = None,
    calibration: str | None = None,
    figures: Mapping[str, Mapping[str, object]] | None = None,
    protocol: str | None = None,
    notes: Sequence[str] = (),
    chat: bool = True,
) -> str:
    """Markdown with the metadata block that the Hub reads.

    Args:
        name: of the checkpoint, the title.
        to: the form it was exported as, such as "compressed-tensors".
        scheme: how it is quantized, such as "W4A16"; "": it is not.
        base_model: Hub id of the model that was quantized; None, or a path: it is not named.
        license_name: of the base model, as the Hub spells it ("llama3.1", "apache-2.0").
        languages: codes such as "en".
        recipe: setting -> value, in the order they are to be shown.
        calibration: the data, in a sentence.
        figures: measure -> {"original": ..., "quantized": ...}, or other columns.
        protocol: how the figures were measured, in a sentence.
        notes: sentences that a user should know.
        chat: the model has a chat template.
    """
    base = base_model if base_model and _is_hub_id(base_model) else None
    parts = [
        _front_matter(to, base, license_name, languages),
        f"# {name}\n\n{_introduction(scheme, to, base)}",
        _settings("How it was made", recipe, calibration),
        _figures(figures, protocol),
        _usage(name, to, scheme, chat),
        "" if not notes else "## Worth knowing\n\n" + "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def license_of(folder: Path) -> str | None:
    """The licence that a model folder's own README.md states, as the Hub spells it, if any."""
    try:
        with open_file(folder / "README.md") as file:
            text = file.read(1 << 16).decode("utf-8", "replace")
    except (CheckpointError, OSError):
        return None
    if not text.startswith("---\n"):
        return None
    for line in text[4:].partition("\n---")[0].splitlines():
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip().strip("\"'")
    return None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has one, in a file of its own or in its config."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except CheckpointError:
        return False


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(owner.strip("./~") and slash and name and "/" not in name)


def _front_matter(
    to: str, base: str | None, license_name: str | None, languages: Sequence[str]
) -> str:
    lines = ["---"]
    if base:
        lines += [f"base_model: {_yaml(base)}", "base_model_relation: quantized"]
    if license_name:
        lines.append(f"license: {_yaml(license_name)}")
    if languages:
        lines += ["language:", *(f"- {_yaml(language)}" for language in languages)]
    tags = ["llama", "qllama", *_FORM_TAGS.get(to, ())]
    library = "qllama" if to == "native" else "transformers"
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _introduction(scheme: str, to: str, base: str | None) -> str:
    model = f"[{base}](https://huggingface.co/{base})" if base else "A Llama model"
    if not scheme:
        return f"{model}, not quantized, in the {to} format."
    if to == "bf16":
        return f"{model}, quantized to {scheme} and dequantized again."
    return f"{model}, quantized to {scheme}, in the {to} format."


def _settings(title: str, recipe: Mapping[str, object] | None, calibration: str | None) -> str:
    if not recipe and not calibration:
        return ""
    lines = [f"## {title}", "", "Quantized with qllama."]
    if recipe:
        rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in recipe.items()]
        lines += ["", "| setting | value |", "| --- | --- |", *rows]
    if calibration:
        lines += ["", f"Calibration data: {calibration}"]
    return "\n".join(lines)


def _figures(figures: Mapping[str, Mapping[str, object]] | None, protocol: str | None) -> str:
    if not figures:
        return ""
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    lines = [
        "## What quantization cost",
        "",
        f"| | {' | '.join(map(_cell, columns))} |",
        "| --- |" + " --- |" * len(columns),
        *(
            f"| {_cell(measure)} | {' | '.join(_cell(row.get(c, '')) for c in columns)} |"
            for measure, row in figures.items()
        ),
    ]
    return "\n".join([*lines, *(["", protocol] if protocol else [])])


def _usage(name: str, to: str, scheme: str, chat: bool) -> str:
    ask = (
        'llm.chat([{"role": "user", "content": "Who are you?"}], params)'
        if chat
        else 'llm.generate(["It is a truth"], params)'
    )
    run = f"""params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=256)
print({ask}[0].outputs[0].text)"""
    blocks = [
        "## How to run it",
        f"With qllama:\n\n```python\nfrom qllama import LLM, SamplingParams\n\n"
        f'llm = LLM("{name}")\n{run}\n```',
    ]
    if to != "native":
        blocks.append(
            f"With vLLM:\n\n```python\nfrom vllm import LLM, SamplingParams\n\n"
            f'llm = LLM("{name}")\n{run}\n```'
        )
    if to in ("compressed-tensors", "bf16"):
        blocks.append(_with_transformers(name, to, packed_zeros="ASYM" in scheme))
    return "\n\n".join(blocks)


def _with_transformers(name: str, to: str, *, packed_zeros: bool) -> str:
    imports, option = "AutoModelForCausalLM, AutoTokenizer", ""
    libraries = "transformers" if to == "bf16" else "transformers and compressed-tensors"
    if to != "bf16" and packed_zeros:
        imports += ", CompressedTensorsConfig"
        option = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    return f"""With {libraries}:

```python
from transformers import {imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto"{option})
inputs = tokenizer("It is a truth", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _yaml(text: str) -> str:
    """A plain scalar where that is safe, else a quoted one (JSON's strings are YAML's)."""
    plain = all(c.isalnum() or c in "._-/" for c in text) and text[:1].isalpha()
    return text if plain and text.lower() not in _YAML_WORDS else json.dumps(text)


_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
