"""From novels as plain text to what a model is trained on: chapters, paragraphs, token ids."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHAPTER = re.compile(r"chapter [ivxlc\d]+\.?", re.IGNORECASE)
_VOLUME = re.compile(r"volume [ivx]+\.?", re.IGNORECASE)
_LAST_WORDS = ("finis", "the end")
_ROLES = ("user", "assistant")

Chapter = list[str]  # its paragraphs, each one line


def read_novel(path: Path) -> list[Chapter]:
    """The chapters of a novel in which blank lines separate paragraphs.

    Lines are joined, headings dropped, and so are the title page, the underscores that mark
    emphasis, lines of asterisks and an editor's remarks in brackets. A text without chapter
    headings is one chapter.
    """
    text = path.read_text(encoding="utf-8").replace("_", "")
    chapters: list[Chapter] = [[]]
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if _CHAPTER.fullmatch(paragraph):
            chapters.append([])
        elif not (
            not paragraph.strip(" *")
            or paragraph.startswith("[")
            or _VOLUME.fullmatch(paragraph)
            or paragraph.lower() in _LAST_WORDS
        ):
            chapters[-1].append(paragraph)
    # What stands before the first heading is the title page.
    return [chapter for chapter in chapters[len(chapters) > 1 :] if chapter]


class Novels(NamedTuple):
    """What a folder of novels is used for."""

    names: list[str]  # of the files to train on
    chapters: list[Chapter]  # theirs
    held_out: str  # the text to validate on, its paragraphs joined by empty lines


def read_novels(folder: Path, validation: str) -> Novels:
    """All `*.txt` in a folder, of which the one named `validation` is held out.

    Raises:
        ValueError: it is not there, or no other is.
    """
    paths = [path for path in sorted(folder.glob("*.txt")) if path.name != validation]
    if not paths or not (folder / validation).is_file():
        raise ValueError(f"{folder} must hold {validation} and at least one other .txt file")
    return Novels(
        names=[path.name for path in paths],
        chapters=[chapter for path in paths for chapter in read_novel(path)],
        held_out="\n\n".join(p for c in read_novel(folder / validation) for p in c),
    )


class Corpus(NamedTuple):
    """Two streams of token ids, and where in each a text may begin."""

    prose: np.ndarray  # int32 [P]: chapters, each within <|begin_of_text|> ... <|end_of_text|>
    paragraphs: np.ndarray  # indices of the first token of each paragraph
    chat: np.ndarray  # int32 [C]: the paragraphs as turns that user and assistant take
    turns: np.ndarray  # indices of the first token of each of the user's turns
    begin_of_text: int


def tokenize(chapters: Sequence[Chapter], tokenizer: "Tokenizer") -> Corpus:
    """Both streams of `chapters`."""
    vocabulary = tokenizer.get_vocab()
    begin, end = vocabulary["<|begin_of_text|>"], vocabulary["<|end_of_text|>"]
    header, header_end = vocabulary["<|start_header_id|>"], vocabulary["<|end_header_id|>"]
    end_of_turn = vocabulary["<|eot_id|>"]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    prose: list[int] = []
    paragraphs: list[int] = []
    chat: list[int] = []
    turns: list[int] = []
    for chapter in chapters:
        prose.append(begin)
        chat.append(begin)
        for i, paragraph in enumerate(chapter):
            paragraphs.append(len(prose))
            # Paragraph by paragraph gives the tokens of the whole: none crosses an empty line.
            prose += encode(paragraph if i == len(chapter) - 1 else paragraph + "\n\n")
            role = _ROLES[i % 2]
            if role == "user":
                turns.append(len(chat))
            opening = [header, *encode(role), header_end, *encode("\n\n")]
            chat += [*opening, *encode(paragraph), end_of_turn]
        prose.append(end)
        chat.append(end)
    return Corpus(
        np.array(prose, np.int32),
        np.array(paragraphs),
        np.array(chat, np.int32),
        np.array(turns),
        begin,
    )


def sample_batch(corpus: Corpus, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """int32 `[batch, length + 1]`: inputs and, one to the right, what they should predict.

    Half of the rows begin anywhere in the prose. The others begin as a prompt does, with
    <|begin_of_text|>: three in eight with a paragraph, one in eight with a turn of the chat.
    """
    rows = np.empty((batch, length + 1), np.int32)
    for row in rows:
        kind = rng.integers(8)
        if kind < 4:
            start = int(rng.integers(len(corpus.prose)))
            row[:] = _window(corpus.prose, start, length + 1)
            continue
        stream, starts = (corpus.chat, corpus.turns) if kind == 7 else corpus[:2]
        row[0] = corpus.begin_of_text
        row[1:] = _window(stream, int(rng.choice(starts)), length)
    return rows


def windows(ids: np.ndarray, length: int) -> np.ndarray:
    """Consecutive windows `[n, length]` of `ids`; a shorter rest is left out.

    Raises:
        ValueError: not even one window.
    """
    count = len(ids) // length
    if not count:
        raise ValueError(f"{len(ids)} tokens do not fill one window of {length}")
    return ids[: count * length].reshape(count, length)


def _window(stream: np.ndarray, start: int, length: int) -> np.ndarray:
    return np.take(stream, np.arange(start, start + length), mode="wrap")
