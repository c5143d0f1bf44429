"""The tokenizer of a checkpoint, and how prompts and conversations become token ids."""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qllama.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# A tokenizer that is all in tokenizer.json: its names in transformers 4 and 5.
_GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Any | None:
    """The transformers tokenizer in `folder`; None where it has none. Contacts no hub, and runs no
    code that the folder brings.

    Raises:
        CheckpointError: its files are there but cannot be used, or make token ids that a model of
            `vocab_size` does not have.
    """
    folder = Path(folder)
    if not any(os.path.lexists(folder / name) for name in TOKENIZER_FILES):
        return None
    # Else transformers tells every user that it found no PyTorch, which qllama does without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading may never end
            raise CheckpointError(f"{path}: is not a regular file; remove it")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # Some of what may be wrong shows only in use.
        ids = encode_prompt(tokenizer, "Hello")
        tokenizer.decode(ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The libraries raise whatever a malformed file makes them stumble on. A panic of Rust code is
    # not even an Exception.
    except BaseException as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise CheckpointError(
            f"{folder}: the tokenizer files cannot be used ({reason}); download them again, or "
            "pass tokenizer="
        ) from error
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer makes token id {max(ids)}, but the model has {vocab_size} "
            "tokens: they do not belong together; pass tokenizer="
        )
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class to load with: where the folder names the general one, that, else `AutoTokenizer`.

    `AutoTokenizer` would come to the same class, but takes a second to import.
    """
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").exists() and config.exists():
        settings = json.loads(config.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") in _GENERAL and "auto_map" not in settings:
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts around one: BOS, for Llama 3.

    A text that begins with the BOS token's own text gets no second one.
    """
    bos = tokenizer.bos_token
    begins = bool(bos) and text.startswith(bos)
    return tokenizer.encode(text, add_special_tokens=not begins)


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation, rendered by the checkpoint's chat template.

    Args:
        tokenizer: of the checkpoint.
        messages: `{"role": ..., "content": ...}`, oldest first.
        add_generation_prompt: end with the header of the assistant's turn.

    Raises:
        ValueError: there is no chat template, or it refuses these messages.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r}')
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; use generate() with a prompt in the model's own "
            "format, or a checkpoint with chat_template.jinja"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # a template is a program, so whatever its mistakes raise
        raise ValueError(f"the chat template cannot render these messages: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written them
