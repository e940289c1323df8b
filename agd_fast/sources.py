"""Where an adapter is: in a folder, or in a repo of the Hugging Face Hub, which is downloaded to a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from agd_fast.version import __version__

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter.safetensors"
ADAPTER_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
LIBRARY: dict[str, Any] = {"library_name": "agd-fast", "library_version": __version__}  # what the Hub is told


def resolve(source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder of an adapter: `source` itself, or a snapshot of the Hub repo that it names, in the Hub's cache.

    source: a folder; or a string of the form "name/repo" if there is no such folder (a path object never names a repo).
    revision, token: of the repo: a branch, tag or commit, and the token that may read it (None: as logged in).
    Only the adapter's files are downloaded. Without a connection, a snapshot in the cache is used.

    Raises: FileNotFoundError if there is neither a folder nor a repo, if the repo lacks an adapter, or if it is neither reachable
    nor in the cache; ValueError for a string that cannot name a repo, or a revision of a folder; OSError for other answers of the
    Hub.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"a revision goes with the id of a Hub repo alone; found revision={revision!r} and the folder {source}"
            )
        return path
    if not isinstance(source, str) or path.exists() or not re.fullmatch(r"[^/.~][^/]*/[^/]+", source):
        found = "a file" if path.exists() else "no such directory"
        expected = f"expected {CONFIG_NAME} and {WEIGHTS_NAME} in {source}"
        raise FileNotFoundError(f"{expected}, or the id of a Hub repo as text ('name/repo'); found {found}")
    require_repo_id(source)
    patterns = [*ADAPTER_NAMES, *(f"*/{name}" for name in ADAPTER_NAMES)]
    missing = f"expected an adapter in {source}, found no such folder here"
    try:
        with reaching(f"look up {source}"):
            folder = snapshot_download(source, revision=revision, token=token, allow_patterns=patterns, **LIBRARY)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}, and on {constants.ENDPOINT} no such repo that this token may read (private, gated or not there)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"expected the revision {revision!r} in the Hub repo {source}, found none of that name"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{missing}, nothing whole in the Hub's cache, and the Hub was not reached: {reason}") from error
    snapshot = Path(folder)
    lacking = [name for name in ADAPTER_NAMES if not (snapshot / name).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"expected {' and '.join(ADAPTER_NAMES)} in the Hub repo {source}, found {_listing(source, snapshot, token)}"
        )
    return snapshot


def adapter_folders(directory: Path) -> list[Path]:
    """`directory`, and each folder directly in it that holds the adapter of a further denoiser (transformer_2/, …)."""
    inner = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    return [directory, *(folder for folder in inner if all((folder / name).is_file() for name in ADAPTER_NAMES))]


def require_repo_id(repo_id: str) -> None:
    """Raises: ValueError when the Hub would not take `repo_id`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"expected the id of a Hub repo, 'name/repo', found {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"expected the id of a Hub repo, 'name/repo', found {repo_id!r}")


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Raises: ConnectionError for connection problems, for which the Hub's client raises exceptions of its own classes."""
    try:
        yield
    except (OSError, ValueError, TypeError):
        raise
    except Exception as error:
        raise ConnectionError(f"could not {what}: {constants.ENDPOINT} was not reached ({error!r})") from error


def _listing(repo_id: str, snapshot: Path, token: str | bool | None) -> list[str] | str:
    """The files of the repo at the commit of a snapshot, for an error."""
    try:
        return sorted(HfApi(token=token, **LIBRARY).list_repo_files(repo_id, revision=snapshot.name)) or "an empty repo"
    except Exception:  # offline, or refused: the snapshot is what is known
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
