"""Where a model is: the folder that the user names, or the copy of a Hub id in the local cache.

The one place that may contact a hub, and only for a Hub id. Token, cache, endpoint and offline mode
are those of huggingface_hub: `hf auth login` or HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from qllama.errors import CheckpointError

TOKENIZER_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "*.jinja")
"""Name patterns of what a tokenizer is made of."""

CHECKPOINT_FILES = (*TOKENIZER_FILES, "*.json", "*.safetensors", "README.md", "LICENSE*")
"""Name patterns of what a checkpoint is made of."""

# Meta's own layout, and folders, where other formats lie: `original/`, `onnx/`.
_NEVER = ("consolidated*", "*/*")

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # OWNER/NAME


def resolve(
    model: str | Path,
    revision: str | None = None,
    *,
    files: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """The folder of a model, downloaded first where it has to be.

    An existing folder is used as it is, and no hub is contacted. A Hub id, such as
    "RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8", is brought up to date in the cache: files that
    are there are not downloaded again, and one whose connection breaks goes on where it stopped.
    Without a network, the cached copy is used.

    Args:
        model: a folder, or a Hub id. A `Path` is always a folder.
        revision: branch, tag or commit of a Hub id; None: its main branch.
        files: name patterns of what is needed of a Hub id.

    Raises:
        CheckpointError: no such folder and no Hub id, or one that cannot be had; a line that says
            why, and what to do.
        ValueError: a revision of a folder.
    """
    if os.path.lexists(model):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} belongs to a Hub id, but {str(model)!r} is a folder here; "
                "leave it out"
            )
        return Path(model)
    if isinstance(model, Path) or not is_hub_id(model):
        raise CheckpointError(
            f"{model}: there is no such folder; expected a checkpoint folder, or a Hub id of the "
            "form OWNER/NAME"
        )
    return download(model, revision, files)


def is_hub_id(model: str | Path) -> bool:
    """Whether `resolve` would ask a hub: no folder, and of the form OWNER/NAME."""
    return (
        isinstance(model, str)
        and not os.path.lexists(model)
        and _HUB_ID.fullmatch(model) is not None
    )


def may_be_needed(file: str) -> bool:
    """Whether a file of a Hub model is not in a folder, nor in Meta's own layout."""
    return not any(fnmatch(file, pattern) for pattern in _NEVER)


def list_dataset(name: str, revision: str | None = None) -> list[str]:
    """Names of the files of a Hub dataset; of those in the cache where no hub can be reached.

    Args:
        name: OWNER/NAME.
        revision: branch, tag or commit; None: the main branch. None of its files if there is none.

    Raises:
        CheckpointError: there is no such dataset, or neither a hub nor a copy of it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    try:
        found = HfApi().dataset_info(name, revision=revision).siblings or []
        return [file.rfilename for file in found]
    except RevisionNotFoundError:
        return []
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise CheckpointError(
                f"{_named(name, revision)}: {_explain(error, 'dataset')}"
            ) from error
        try:
            copy = snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                local_files_only=True,
                allow_patterns=[""],  # else it would miss those that were never asked for
            )
        except Exception as missing:
            missing.__cause__ = error
            raise CheckpointError(
                f"{_named(name, revision)}: {_explain(missing, 'dataset')}"
            ) from missing
    return [str(path.relative_to(copy)) for path in Path(copy).rglob("*") if path.is_file()]


def download(name: str, revision: str | None, files: Sequence[str], *, kind: str = "model") -> Path:
    """The folder in the cache that holds the files of a Hub repository that match `files`.

    Raises:
        CheckpointError: they cannot be had.
    """
    from importlib.metadata import PackageNotFoundError, version

    from huggingface_hub import snapshot_download

    try:
        own_version = version("qllama")
    except PackageNotFoundError:  # runs from its source folder
        own_version = None
    with explained(name, revision, kind), _interruptible() as interrupted:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(_NEVER) if kind == "model" else None,
            library_name="qllama",
            library_version=own_version,
            tqdm_class=_progress_bars(interrupted),
        )
    return Path(folder)


@contextlib.contextmanager
def explained(name: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Make whatever huggingface_hub raises in the block a `CheckpointError` of one line.

    Its own errors, those of its network library, and OSError: all of them end the same way.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{_named(name, revision)}: {_explain(error, kind)}") from error


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, before it raises KeyboardInterrupt as ever.

    huggingface_hub downloads in threads and waits for them, gigabytes perhaps, also when it is
    interrupted; so these threads have to learn of it.
    """
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or usual is not signal.default_int_handler:
        yield interrupted  # somebody else decides what Ctrl-C does
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _progress_bars(interrupted: threading.Event) -> type:
    """The library's bars, shown on a terminal only, which stop their download when interrupted."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None} | kwargs)  # None: where there is a terminal

        def update(self, n: float | None = 1) -> bool | None:
            if interrupted.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    return Bar


def _named(model: str, revision: str | None) -> str:
    return model if revision is None else f"{model} at revision {revision!r}"


def _explain(error: BaseException, kind: str) -> str:
    """What went wrong and what to do, in one line; `kind`: "model" or "dataset"."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    here = "folder" if kind == "model" else "file"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    match error:
        case GatedRepoError():
            return f"is gated; ask for access on {hub}, then {login}"
        case RepositoryNotFoundError():
            return (
                f"there is no such {here} here and no such {kind} on {hub}; check the spelling, or "
                f"if the {kind} is private, {login}"
            )
        case RevisionNotFoundError():
            return f"{hub} has the {kind}, but no such branch, tag or commit"
        case IncompleteSnapshotError():
            return (
                f"the copy in {cache} is incomplete, and {_why_no_hub(error)}; go online and run "
                "this again, which downloads what is missing"
            )
        case LocalEntryNotFoundError():
            return (
                f"there is no copy in {cache}, and {_why_no_hub(error)}; go online and run this "
                f"again, or give {'the folder of a checkpoint' if kind == 'model' else 'a file'}"
            )
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"{hub} does not accept the token; {login} with another one"
        case HfHubHTTPError():
            return f"{_answer(error)}; run this again later: complete files are kept"
        case HFValidationError():
            return f"there is no such {here} here, and this is no Hub id (OWNER/NAME)"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return (
                f"the disk of {cache} is full; free space and run this again (complete files are "
                "kept), or set HF_HOME to a folder on another disk"
            )
        case OSError(errno=int()) if not isinstance(error, ConnectionError | OfflineModeIsEnabled):
            return f"cannot be stored in {cache}: {error.strerror}; HF_HOME names another folder"
    return f"the download broke off ({_first_line(error)}); run this again: complete files are kept"


def _why_no_hub(error: BaseException) -> str:
    """Why the hub was not asked, or did not answer as it should."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to download it"
    if isinstance(cause, HfHubHTTPError):
        return _answer(cause)
    reason = "" if cause is None else f" ({_first_line(cause)})"
    return f"{constants.ENDPOINT} cannot be reached{reason}"


def _answer(error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    reason = (error.server_message or error.response.reason_phrase).partition("\n")[0]
    return f"{constants.ENDPOINT} answers {error.response.status_code} ({reason})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
