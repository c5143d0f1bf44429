"""The embedded demo model: a small Llama 3 that writes like Jane Austen, and how it is made.

`model/` is its checkpoint folder; `python -m qllama.demo.train` makes another one.
"""

from pathlib import Path


def model_path() -> Path:
    """The folder of the embedded model: W4A16 compressed-tensors, tokenizer, model card."""
    return Path(__file__).with_name("model")
