"""A folder on its way to its name: written aside and renamed, and locked while its writer lives.

A writer that is killed leaves its folder behind; the next one to the same output sees that nobody
holds its lock, and removes it.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, `.NAME.<hex>.partial`, gone at the end unless it was renamed.

    Those of dead writers are removed first: they may fill the disk.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder, "partial")
    with contextlib.ExitStack() as stack:
        partial = _make_locked(folder, stack)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, folder: Path, *, overwrite: bool) -> None:
    """Rename. There is no portable exchange of two folders, so for a moment neither is in place;
    a crash just then leaves the old one beside it as `.NAME.<hex>.replaced`, until another has its
    name.

    Raises:
        OSError: as renaming does; the old folder is in place.
    """
    with contextlib.ExitStack() as stack:
        if overwrite and folder.exists():
            replaced = partial.with_suffix(".replaced")
            with contextlib.suppress(BlockingIOError):
                _lock(folder, stack)
            folder.rename(replaced)
            try:
                partial.rename(folder)
            except BaseException:
                replaced.rename(folder)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(folder)
    _remove_leftovers(folder, "replaced")


def _make_locked(folder: Path, stack: contextlib.ExitStack) -> Path:
    while True:
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        # Another writer may have taken it for a leftover before it was locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            _lock(partial, stack)
            if partial.is_dir():
                return partial


def _remove_leftovers(folder: Path, kind: str) -> None:
    """Remove what dead writers to `folder` have left beside it."""
    left = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.{kind}")
    with contextlib.suppress(OSError):  # what cannot be tidied up is no reason not to write
        for name in filter(left.fullmatch, os.listdir(folder.parent)):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                if _lock(folder.with_name(name), stack):
                    shutil.rmtree(folder.with_name(name), ignore_errors=True)


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a folder until `stack` ends, or this process does, however it ends.

    Returns:
        False where folders cannot be locked, as on some network file systems: nobody can tell
        there whether a writer lives.

    Raises:
        BlockingIOError: it is locked.
        FileNotFoundError: it is gone.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError:
        return False
    return True
