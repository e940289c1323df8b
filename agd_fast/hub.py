"""Publishing adapters on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from agd_fast.sources import ADAPTER_NAMES, LIBRARY, adapter_folders, reaching, require_repo_id
from agd_fast.storage import read_adapter, read_config
from agd_fast.version import __version__

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"


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
    """Publish the adapter in `directory` as a model repo on the Hub, in one commit, and return the URL of the repo.

    directory: a folder that `agd_fast.save` or `agd_fast.distill` wrote. These are uploaded: the adapter's two files, those of
        further denoisers in folders beside them, a picture (samples.png, else grid.png, else the newest in validation/), and
        README.md. If there is no README.md, a model card is made from adapter_config.json and distill.json. Nothing else is
        uploaded, and nothing is written to `directory`.
    repo_id: "name/repo".
    private: applies only if the repo is new.
    revision: the branch to commit to.
    create: create the repo, and the branch, if they do not exist.
    license: licence of the adapter, for the card; left out unless given.

    If an earlier push left a further denoiser in the repo that `directory` lacks, it is deleted there.
    Raises: FileNotFoundError, ValueError if the folder holds no complete adapter or `repo_id` is not valid; OSError if the Hub
    refuses or cannot be reached.
    """
    directory = Path(directory)
    require_repo_id(repo_id)
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
    api = HfApi(token=token, **LIBRARY)
    with reaching(f"push to {repo_id}"):
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
