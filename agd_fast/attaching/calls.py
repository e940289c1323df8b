"""Only one call at a time among pipelines that share a denoiser with an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident

from agd_fast.attaching.attachment import Attachment

_ASKING = Lock()  # held from checking callers until what follows from that is written down


@contextmanager
def alone(attachments: Sequence[Attachment], pipeline: str) -> Iterator[None]:
    """One call of a pipeline, with or without its adapters. Raises: RuntimeError during another call with the same adapters."""
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
    """Inside, no call begins. name: of the function that asks. Raises: RuntimeError while a call runs in another thread."""
    with _ASKING:
        if any(attachment.caller not in (None, get_ident()) for attachment in attachments):
            raise RuntimeError(
                f"agd_fast.{name}(...) in one thread, and a call with the same denoiser under way in another, which it would "
                "change; expected one after another: in several threads, a pipeline each (copy.deepcopy(pipe))"
            )
        yield
