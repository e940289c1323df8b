"""agd-fast push: publishes an adapter on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import agd_fast as agd
from agd_fast.cli.console import console


def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    repo: Annotated[str, typer.Argument(help="Hub repo to publish to, 'name/repo'.")],
    private: Annotated[bool, typer.Option("--private", help="If the repo is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the adapter, for its model card.")] = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, with a model card."""
    url = agd.push_to_hub(adapter, repo, private=private, revision=revision, commit_message=message, license=license)
    console.print(url, markup=False)
