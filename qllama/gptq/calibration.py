"""Calibration data: from what a user names to token ids.

A `.txt` file is one text, cut into consecutive pieces. In `.jsonl` and `.parquet` files, Hub
datasets and lists, each row is a sample of its own.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qllama.gptq.hub_dataset import DATASET_ID, dataset_files
from qllama.gptq.rows import read_jsonl, read_parquet, read_text
from qllama.tokenizer import encode_chat, encode_prompt

RANDOM_TOKENS = "random-tokens"

Dataset = str | Path | Sequence[Any] | np.ndarray | None  # what a user may name

_READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}
_CHOICES = (
    "a .txt, .jsonl or .parquet file, a Hub dataset such as "
    f"HuggingFaceH4/ultrachat_200k/data/train_sft, or {RANDOM_TOKENS!r}"
)
# Tokens at the end of a text that is cut short may differ from those of the whole text.
_UNSETTLED = 256


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Token ids to calibrate with."""

    sequences: tuple[np.ndarray, ...]  # int32 [T_i], none empty, none longer than asked for
    source: str  # what the user named

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return sum(len(sequence) for sequence in self.sequences)

    def digest(self) -> str:
        """SHA-256, in hex, of the lengths and the ids; not of the name of the source."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.astype("<i4").tobytes())
        return digest.hexdigest()


def shortage(tokens: int, features: int) -> str | None:
    """A sentence that says how many tokens a Linear of `features` inputs wants, if it gets fewer.

    The thresholds are those of `default_dampening_frac` and `examine`.
    """
    if tokens >= 4 * features:
        return None
    then = "such Linears are rounded to nearest" if tokens < features / 8 else "the more is damped"
    return (
        f"{tokens} calibration tokens are few for {features} input features: {then}; "
        f"{4 * features} or more are enough"
    )


def load_calibration(
    dataset: Dataset,
    tokenizer: Any | None,
    vocab_size: int,
    *,
    num_calibration_samples: int = 512,
    max_seq_length: int = 2048,
    seed: int = 0,
) -> CalibrationData:
    """Read calibration data, and warn where there is less than asked for.

    Args:
        dataset: a `.txt` file, tokenized as a whole without special tokens and cut into consecutive
            pieces of `max_seq_length`; a `.jsonl` or `.parquet` file or the id of a Hub dataset,
            whose rows are used in their order and truncated: `messages` through the chat template,
            else `text` as a prompt; "random-tokens"; or a list of such rows, of texts, or of lists
            of token ids, which are used as they are.
            A Hub id may go on with the beginning of a file's name, to choose among the files of a
            dataset: "OWNER/NAME/data/train_sft".
        tokenizer: of the model; None where it has none, and then ids have to be given.
        vocab_size: token ids lie below it.
        num_calibration_samples: sequences to use at most.
        max_seq_length: tokens of the longest sequence.
        seed: of random tokens; nothing else is drawn.

    Raises:
        ValueError: `dataset` is None or nothing that can be read, or what it holds is malformed.
        CheckpointError: a Hub dataset cannot be had.
        OSError: a file cannot be read.
    """
    for name, value in (
        ("num_calibration_samples", num_calibration_samples),
        ("max_seq_length", max_seq_length),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    sequences = _sequences(
        dataset, tokenizer, vocab_size, num_calibration_samples, max_seq_length, seed
    )
    source = str(dataset)
    if isinstance(dataset, Sequence | np.ndarray) and not isinstance(dataset, str):
        source = f"a list of {len(dataset)} rows"
    for sequence in sequences:
        _check_ids(sequence, vocab_size, source)
    if not sequences:
        raise ValueError(f"{source}: there is no text to calibrate with")
    data = CalibrationData(
        sequences=tuple(sequence.astype(np.int32) for sequence in sequences), source=source
    )
    if len(sequences) < num_calibration_samples:
        warnings.warn(
            f"{source} gives {len(sequences)} calibration sequences, {data.tokens} tokens, instead "
            f"of the {num_calibration_samples} asked for",
            stacklevel=2,
        )
    return data


def _sequences(
    dataset: Dataset, tokenizer: Any | None, vocab_size: int, count: int, length: int, seed: int
) -> list[np.ndarray]:
    match dataset:
        case None:
            raise ValueError(
                f"calibration data is needed, and no dataset is named: give {_CHOICES}; best is "
                "text like what the model will read (llm-compressor's examples take 512 rows of "
                "that Hub dataset)"
            )
        case str() if dataset == RANDOM_TOKENS:
            return _random_tokens(tokenizer, vocab_size, count, length, seed)
        case str() | Path() if Path(dataset).suffix == ".txt":
            _check_exists(Path(dataset))
            return _pieces(Path(dataset), _needed(tokenizer, dataset), count, length)
        case str() | Path():
            return _samples(_rows(dataset), _needed(tokenizer, dataset), count, length)
        case Sequence() | np.ndarray():
            rows = ((f"dataset[{i}]", row) for i, row in enumerate(dataset))
            return _samples(rows, tokenizer, count, length)
    raise ValueError(f"dataset is a {type(dataset).__name__}; give {_CHOICES}, or a list")


# -- one text --------------------------------------------------------------------------------------


def _pieces(path: Path, tokenizer: Any, count: int, length: int) -> list[np.ndarray]:
    """The beginning of a text in consecutive pieces; the last may be shorter."""
    wanted = count * length
    size = 8 * (wanted + _UNSETTLED)  # bytes; usually enough, so that not all of it has to be read
    while True:
        text, complete = read_text(path, size)
        ids = np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)
        if complete or len(ids) >= wanted + _UNSETTLED:
            break
        size *= 2
    ids = ids[:wanted]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


# -- rows ------------------------------------------------------------------------------------------


def _rows(dataset: str | Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every row of a file or a Hub dataset."""
    path = Path(dataset)
    if path.suffix in _READERS:
        _check_exists(path)
        yield from _READERS[path.suffix](path)
        return
    if path.exists() or isinstance(dataset, Path) or not DATASET_ID.fullmatch(dataset):
        found = "is a folder" if path.is_dir() else "is not among the kinds of files that are read"
        problem = found if path.exists() else "does not exist"
        raise ValueError(f"dataset {str(dataset)!r} {problem}; give {_CHOICES}")
    for file in dataset_files(dataset, tuple(_READERS)):
        yield from _READERS[file.suffix](file)


def _samples(
    rows: Iterable[tuple[str, Any]], tokenizer: Any | None, count: int, length: int
) -> list[np.ndarray]:
    """The first `count` rows that are not empty, truncated to `length` tokens."""
    empty: list[str] = []

    def filled() -> Iterator[np.ndarray]:
        for place, row in rows:
            try:
                ids = _encode(row, tokenizer)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if len(ids):
                yield ids[:length]
            else:
                empty.append(place)

    sequences = list(islice(filled(), count))
    if empty:
        warnings.warn(
            f"{len(empty)} calibration rows are empty and were left out, the first is {empty[0]}",
            stacklevel=4,
        )
    return sequences


def _encode(row: Any, tokenizer: Any | None) -> np.ndarray:
    """int32 token ids of a row: a text, a conversation, or ids."""
    if isinstance(row, Mapping):
        if row.get("messages") is not None:
            return _encode_messages(row["messages"], _needed(tokenizer, "messages"))
        if row.get("text") is None:
            keys = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"expected a key 'text' or 'messages', found {keys}")
        row = row["text"]
        if not isinstance(row, str):
            raise ValueError(f"'text' must be a string, found {type(row).__name__}")
    if isinstance(row, str):
        _check_text(row)
        ids = encode_prompt(_needed(tokenizer, "texts"), row) if row.strip() else []
        return np.array(ids, np.int32)
    array = np.asarray(row)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError("expected a text, a mapping with 'text' or 'messages', or token ids")
    return array.astype(np.int64)


def _encode_messages(messages: Any, tokenizer: Any) -> np.ndarray:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"'messages' must be a list, found {type(messages).__name__}")
    for message in messages:
        for value in message.values() if isinstance(message, Mapping) else ():
            if isinstance(value, str):
                _check_text(value)
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False) if messages else []
    return np.array(ids, np.int32)


# -- random tokens ---------------------------------------------------------------------------------


def _random_tokens(
    tokenizer: Any | None, vocab_size: int, count: int, length: int, seed: int
) -> list[np.ndarray]:
    """Ordinary tokens, each as likely: none that is special, added or beyond the tokenizer's."""
    allowed = np.arange(vocab_size, dtype=np.int32)
    if tokenizer is not None:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        allowed = np.setdiff1d(np.arange(min(vocab_size, len(tokenizer))), sorted(special))
        allowed = allowed.astype(np.int32)
    if not len(allowed):
        raise ValueError(f"{RANDOM_TOKENS}: the tokenizer has no token that is not special")
    drawn = np.random.default_rng(seed).integers(len(allowed), size=(count, length))
    return list(allowed[drawn])


# -- checks ----------------------------------------------------------------------------------------


def _needed(tokenizer: Any | None, what: object) -> Any:
    if tokenizer is None:
        raise ValueError(
            f"{what}: the model folder has no tokenizer, which texts need; put one there, or give "
            f"token ids or {RANDOM_TOKENS!r}"
        )
    return tokenizer


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"dataset {str(path)!r} {'is no file' if path.exists() else 'is missing'}")


def _check_text(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has half of a surrogate pair, which is no character")


def _check_ids(ids: np.ndarray, vocab_size: int, source: str) -> None:
    beyond = ids[(ids < 0) | (ids >= vocab_size)]
    if beyond.size:
        raise ValueError(
            f"{source}: token ids {beyond[:5].tolist()} are outside the vocabulary of {vocab_size}"
        )
