"""Reading the files that texts come in, no further than is asked for.

Rows come with their place, for messages.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, Any]  # its place, such as "texts.jsonl, line 3", and what is there


def read_text(path: Path, size: int) -> tuple[str, bool]:
    """The first `size` bytes of a UTF-8 file as text, and whether that is all of it.

    A byte order mark is dropped, and lines end with a line feed.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(size)
        complete = not file.read(1)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=complete)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: {_not_utf8(error)}") from error
    return text.replace("\r\n", "\n"), complete


def read_jsonl(path: Path) -> Iterator[Row]:
    """The JSON values of a file with one on each line; empty lines are skipped.

    Raises:
        ValueError: a line is no JSON.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: {_not_utf8(error)}") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{place}: is no JSON: {error}") from error


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file as mappings, those columns that hold texts.

    Raises:
        ValueError: it is no Parquet file, or pyarrow is not installed.
        OSError: it cannot be read.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow, which is not installed: pip install pyarrow, "
            "or give a .jsonl file"
        ) from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            # Others may be large; where neither is there, the message names what is.
            columns = [name for name in ("messages", "text") if name in names] or names
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except pyarrow.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: is no Parquet file that can be read ({reason})") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it"
