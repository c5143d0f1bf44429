"""A checkpoint of a hub as far as it can be told without its weights: JSON files and headers.

Of each weight file the first bytes are fetched, tens of kilobytes for gigabytes.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from qllama.errors import CheckpointError
from qllama_convert.hub import download, explained, is_hub_id, may_be_needed, resolve
from qllama_convert.safetensors_file import MAX_HEADER

_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "*.safetensors.index.json",
)
_FIRST = 100_000  # bytes; most headers are shorter, and a second request costs more than these
_AT_ONCE = 8


class Glance(NamedTuple):
    """A folder to look into.

    Attributes:
        folder: of the checkpoint.
        sizes: of those of its weight files that have only a header there, see `open_checkpoint`.
        name: what the user calls it; None: `folder`.
    """

    folder: Path
    sizes: dict[str, int]
    name: str | None = None


@contextlib.contextmanager
def glance(model: str | Path, revision: str | None = None) -> Iterator[Glance]:
    """A model as `qllama_convert.hub.resolve` finds it, but no weights are downloaded.

    A checkpoint that is whole in the cache is used as it is there, also without a network. Else
    the folder is a temporary one.

    Raises:
        CheckpointError: no such folder and no Hub id, or one that cannot be had.
        ValueError: a revision of a folder.
    """
    if not is_hub_id(model):
        yield Glance(resolve(model, revision), {})
        return
    name = str(model)
    listing = _listing(name, revision)
    if listing is None:
        yield Glance(resolve(name, revision), {})
        return
    commit, weights = listing
    # By its commit: the branch goes on naming the copy in the cache that has weights.
    cached = download(name, commit, _JSON_FILES)
    if all((cached / file).exists() for file in weights):
        yield Glance(cached, {})
        return
    with tempfile.TemporaryDirectory(prefix="qllama-") as temporary:
        folder = Path(temporary)
        for path in cached.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, folder)

        def fetch(file: str) -> int:
            with explained(name, revision):
                header, size = _header(name, commit, file)
            (folder / file).write_bytes(header)
            return size

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sizes = dict(zip(weights, pool.map(fetch, weights), strict=True))
        yield Glance(folder, sizes, name if revision is None else f"{name} at {revision}")


def _listing(name: str, revision: str | None) -> tuple[str, list[str]] | None:
    """The commit of a Hub id and the names of its weight files; None: no hub can be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with explained(name, revision):
        try:
            found = HfApi(library_name="qllama").model_info(name, revision=revision)
        except Exception as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return None  # offline, or whatever the network library has for no connection
    names = [file.rfilename for file in found.siblings or []]
    weights = [name for name in names if name.endswith(".safetensors") and may_be_needed(name)]
    return str(found.sha), weights


def _header(name: str, commit: str, file: str) -> tuple[bytes, int]:
    """What comes before the data of a weight file, and the size of it all."""
    start, size = _first_bytes(name, commit, file, _FIRST)
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < length <= min(size, 8 + MAX_HEADER):
        start, size = _first_bytes(name, commit, file, length)
    return start[:length], size


def _first_bytes(name: str, commit: str, file: str, count: int) -> tuple[bytes, int]:
    """So many bytes of a file, or all there are, and its size."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    request = build_hf_headers(library_name="qllama") | {"range": f"bytes=0-{count - 1}"}
    url = hf_hub_url(name, file, revision=commit, endpoint=constants.ENDPOINT)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # As a stream, since a server may send the whole file all the same.
    with get_session().stream("GET", url, headers=request, timeout=timeout) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        received = b""
        for piece in response.iter_bytes():
            received += piece
            if len(received) >= count:
                break
        whole = response.headers.get("content-range", "").rpartition("/")[2]
        size = whole or response.headers.get("content-length", "")
    if not size.isdecimal():
        raise CheckpointError(
            f"{name}: {constants.ENDPOINT} does not tell the size of {file}; download the model "
            "with `hf download` and inspect its folder"
        )
    return received[:count], int(size)
