"""One call at a time of the pipelines that share a denoiser with an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident

from agd_fast.attaching.attachment import Attachment

_ASKING = Lock()  # held for as long as it takes to look and to write down what follows from it


@contextmanager
def alone(attachments: Sequence[Attachment], pipeline: str) -> Iterator[None]:
    """One call of a pipeline, with its adapters or without. Raises: RuntimeError inside another that is for the same ones."""
    with _ASKING:
        if any(attachment.caller is not None for attachment in attachments):
            raise RuntimeError(
                f"another call of this {pipeline}, or of one that shares its denoiser, is under way; expected one after "
                "another, also inside agd_fast.disabled: in several threads, a pipeline each (copy.deepcopy(pipe))"
            )
        for attachment in attachments:
            attachment.caller = get_ident()
    try:
        yield
    finally:
        for attachment in attachments:
            attachment.caller = None


@contextmanager
def refuse_other_threads(attachments: Sequence[Attachment], name: str) -> Iterator[None]:
    """name: of the function that asks. Raises: RuntimeError while a call of another thread is under way; inside, none begins."""
    with _ASKING:
        if any(attachment.caller not in (None, get_ident()) for attachment in attachments):
            raise RuntimeError(
                f"agd_fast.{name}(...) in one thread, and a call with the same denoiser under way in another, which it would "
                "change; expected one after another: in several threads, a pipeline each (copy.deepcopy(pipe))"
            )
        yield
