"""One process at a time writes to a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.state import is_initialized
from filelock import FileLock, Timeout

LOCK_NAME = ".lock"


@contextmanager
def only_writer(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process can enter this context for the same folder; a killed process lets go of it too. The lock file is
    removed at the end. Among processes that train together, the main one holds the lock for all.

    Raises: BlockingIOError naming a folder that is held.
    """
    if is_initialized() and not PartialState().is_main_process:
        yield
        return
    directory = Path(directory)
    path, made = directory / LOCK_NAME, not directory.exists()
    ours = not path.exists()
    lock = FileLock(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(
            f"another process is writing to {directory}; expected another folder, or this one when that process is done "
            f"(where there is none, remove {path})"
        ) from error
    except (OSError, NotImplementedError):
        pass  # no file can be made there, which the first write reports better, or none can be locked
    try:
        yield
    finally:
        if lock.is_locked or ours:
            with suppress(OSError):  # a system that does not delete open files
                path.unlink()
        lock.release()
        if made:
            with suppress(OSError):  # something was written
                directory.rmdir()
