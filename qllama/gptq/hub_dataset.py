"""The files of a dataset on a hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from qllama_convert.hub import download, list_dataset

from qllama.errors import CheckpointError

DATASET_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", re.ASCII)
"""OWNER/NAME, and after another slash perhaps how the names of its files begin."""

# Where the hub keeps a dataset that lies in other formats, converted.
_PARQUET_BRANCH = "refs/convert/parquet"


def dataset_files(dataset: str, suffixes: Sequence[str]) -> Iterator[Path]:
    """The training files of a Hub dataset in order, each downloaded when it is asked for.

    Those with "train" in their names are taken where there are any, and where the dataset has no
    file of the right kind, those that the hub has made of it. Without a network, the files that
    are in the cache are used.

    Args:
        dataset: what `DATASET_ID` matches.
        suffixes: of the files that can be read, such as ".parquet".

    Raises:
        CheckpointError: it cannot be had, has no such files, or has several sets of them; then the
            message names these.
    """
    match = DATASET_ID.fullmatch(dataset)
    if match is None:
        raise CheckpointError(f"{dataset}: is not of the form OWNER/NAME or OWNER/NAME/BEGINNING")
    name, beginning = match[1], match[2] or ""
    for revision in (None, _PARQUET_BRANCH):
        names = sorted(
            file
            for file in list_dataset(name, revision)
            if file.startswith(beginning) and file.endswith(tuple(suffixes))
        )
        names = [file for file in names if "train" in file] or names
        _check_one_set(name, names)
        for file in names:
            yield download(name, revision, [file], kind="dataset") / file
        if names:
            return
    which = f" whose name begins with {beginning!r}" if beginning else ""
    raise CheckpointError(f"{name}: the dataset has no {' or '.join(suffixes)} file{which}")


def _check_one_set(dataset: str, names: Sequence[str]) -> None:
    """Refuse names that differ in more than the number of a part."""
    sets = sorted({re.sub(r"\d*(-of-\d+[^/]*)?(\.\w+)?$", "", name) for name in names})
    if len(sets) > 1:
        choices = ", ".join(f"{dataset}/{beginning}" for beginning in sets[:8])
        raise CheckpointError(
            f"{dataset}: the dataset has several sets of files; choose one of {choices}"
        )
