"""Adapters on the Hugging Face Hub: a folder pushed to a repo, a repo resolved to a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from agd_fast.storage import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_config
from agd_fast.version import __version__

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"
ADAPTER_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
_LIBRARY: dict[str, Any] = {"library_name": "agd-fast", "library_version": __version__}


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create: bool = True,
    license: str | None = None,
) -> str:
    """Publish the adapter in `directory` as a model repo of the Hub, in one commit, and return the repo's URL.

    directory: as `agd_fast.save` or `agd_fast.distill` wrote it. Of it are uploaded: the adapter's two files, those of further
        denoisers in folders beside them, a picture (samples.png, else grid.png, else the newest of validation/) and README.md;
        without one, a model card is made of adapter_config.json and distill.json. Nothing else, and nothing is written here.
    repo_id: "name/repo". private: only where the repo is new. revision: the branch to commit to.
    create: make the repo, and the branch, where they do not exist.
    license: of the adapter, for the card; left out unless given.

    A further denoiser that an earlier push left in the repo and that `directory` lacks is deleted there.
    Raises: FileNotFoundError, ValueError when the folder holds no whole adapter or `repo_id` is none; OSError when the Hub
    refuses or cannot be reached.
    """
    directory = Path(directory)
    _require_repo_id(repo_id)
    folders = adapter_folders(directory)
    for folder in folders:
        read_adapter(folder, read_config(folder))  # what nobody could load is not published
    files: dict[str, Path | bytes] = {
        (folder / name).relative_to(directory).as_posix(): folder / name for folder in folders for name in ADAPTER_NAMES
    }
    picture = find_picture(directory)
    if picture is not None:
        files[PICTURE_NAME] = picture
    card = directory / CARD_NAME
    files[CARD_NAME] = card if card.is_file() else _card(directory, repo_id, picture is not None, license)
    api = HfApi(token=token, **_LIBRARY)
    with _reaching(f"push to {repo_id}"):
        if create:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision not in (None, constants.DEFAULT_REVISION):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [path for path in there if path.count("/") == 1 and path.split("/")[1] in ADAPTER_NAMES and path not in files]
        api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=commit_message or f"Upload an adapter of agd-fast {__version__}",
            revision=revision,
        )
    url = f"{api.endpoint}/{repo_id}"
    return url if revision is None else f"{url}/tree/{revision}"


def resolve(source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder of an adapter: `source` itself, or a snapshot of the Hub repo that it names, in the Hub's cache.

    source: a folder; or text of the form "name/repo" where there is no such folder (a path object is never a repo).
    revision, token: of the repo: a branch, tag or commit, and what may read it (None: as logged in).
    Only the adapter's files are downloaded. Without a connection, a snapshot in the cache is used.

    Raises: FileNotFoundError for neither folder nor repo, a repo that lacks an adapter, or one that is neither reached nor in
    the cache; ValueError for text that no repo may be called, or a revision of a folder; OSError for other answers of the Hub.
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
    _require_repo_id(source)
    patterns = [*ADAPTER_NAMES, *(f"*/{name}" for name in ADAPTER_NAMES)]
    missing = f"expected an adapter in {source}, found no such folder here"
    try:
        with _reaching(f"look up {source}"):
            folder = snapshot_download(source, revision=revision, token=token, allow_patterns=patterns, **_LIBRARY)
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


def find_picture(directory: Path) -> Path | None:
    """A grid of samples: samples.png, else the evaluation's grid.png, else the newest of validation/."""
    for path in (directory / PICTURE_NAME, directory / "grid.png"):
        if path.is_file():
            return path
    validation = (directory / "validation").glob("*.png")
    return max(validation, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def _card(directory: Path, repo_id: str, picture: bool, license: str | None) -> bytes:
    from agd_fast.reporting.card import model_card

    folders = adapter_folders(directory)
    return model_card(folders, repo_id, picture=PICTURE_NAME if picture else None, license=license).encode()


def _listing(repo_id: str, snapshot: Path, token: str | bool | None) -> list[str] | str:
    """The files of the repo at the commit of a snapshot, for an error."""
    try:
        return sorted(HfApi(token=token, **_LIBRARY).list_repo_files(repo_id, revision=snapshot.name)) or "an empty repo"
    except Exception:  # offline, or refused: the snapshot is what is known
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


def _require_repo_id(repo_id: str) -> None:
    """Raises: ValueError when the Hub would not take `repo_id`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"expected the id of a Hub repo, 'name/repo', found {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"expected the id of a Hub repo, 'name/repo', found {repo_id!r}")


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Raises: ConnectionError for what is wrong with the connection, which the Hub's client says in classes of its own."""
    try:
        yield
    except (OSError, ValueError, TypeError):
        raise
    except Exception as error:
        raise ConnectionError(f"could not {what}: {constants.ENDPOINT} was not reached ({error!r})") from error
