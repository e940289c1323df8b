"""What a pipeline is called with, one row per prompt: text, embeddings, pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agd_fast.files import fingerprint

Inputs = Mapping[str, Sequence[Any] | Tensor]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_FURTHER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def rows_of(inputs: Inputs, rows: Sequence[int], batched: bool) -> dict[str, Any]:
    """These rows of every input, for a call that takes several or, if it is not batched, one.

    A single row that is neither text nor a number is passed without a list: many pipelines take one picture, or read a list as
    several pictures of one prompt. So are text and numbers if the call is not batched. Embeddings of prompts stay in a list.
    """
    found = {n: value[[*rows]] if isinstance(value, Tensor) else [value[row] for row in rows] for n, value in inputs.items()}
    if len(rows) > 1:
        return found
    return {n: value if _stays(n, value, batched) else value[0] for n, value in found.items()}


def _stays(name: str, value: Sequence[Any] | Tensor, batched: bool) -> bool:
    """Whether a single row of an input is passed as a batch of one."""
    return isinstance(value, Tensor) or (batched if _makes_batches(value) else "prompt" in name)


def make_batches(inputs: Inputs) -> bool:
    """Whether every pipeline takes several rows of these inputs at once."""
    return all(map(_makes_batches, inputs.values()))


def _makes_batches(value: Sequence[Any] | Tensor) -> bool:
    return isinstance(value, Tensor) or all(isinstance(one, (str, int, float)) or one is None for one in value)


def require_arguments(call: Callable[..., Any], given: Mapping[str, Any], cls: type) -> None:
    """Check the arguments `given` to `call`, that of a pipeline of this class.

    Raises: ValueError when it needs more, such as the picture that a video begins with, or has no such argument. Many of
    diffusers' own calls take any argument by **kwargs and ignore it; other classes may pass it on.
    """
    parameters = inspect.signature(call).parameters.values()
    named = {one.name: one for one in parameters if one.kind in _NAMED}
    if missing := [one.name for one in named.values() if one.default is one.empty and one.name not in given]:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)} beside {', '.join(given)}; {_expected(missing[0])}")
    passed_on = any(one.kind in _FURTHER for one in parameters) and not cls.__call__.__module__.startswith("diffusers.")
    if not passed_on and (unknown := [one for one in given if one not in named]):
        near = ", ".join(get_close_matches(unknown[0], named, cutoff=0.0))
        raise ValueError(
            f"a call of {cls.__name__} has no argument {', '.join(unknown)}; expected its own, the nearest are {near}"
        )


@contextmanager
def asking_for_images(call: Callable[..., Any], given: Mapping[str, Any], name: str) -> Iterator[None]:
    """Adds to an error which input may be missing, if the call inside takes a picture or video that was not given."""
    try:
        yield
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        missing = [one for one in ("image", "video") if one in inspect.signature(call).parameters and given.get(one) is None]
        if not missing:
            raise
        raise ValueError(f"{name}: {error}; if it needs {missing[0]}: {_expected(missing[0])}") from error


def _expected(name: str) -> str:
    return f"expected inputs={{'prompt': [...], {name!r}: [...]}}, one a prompt"


def described(value: Any) -> str:
    """A text that tells one value from another, the same in every process: tensors and pictures by a hash of what they hold."""
    if isinstance(value, Tensor):
        return fingerprint({"value": value})
    if isinstance(value, np.ndarray):
        return fingerprint({"value": torch.from_numpy(np.ascontiguousarray(value))})
    if isinstance(value, Image.Image):
        shown = value.convert("RGBA") if value.mode == "P" else value  # whose pixels are indices into a palette
        pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
        return f"{value.mode} {value.width}x{value.height} {fingerprint({'value': pixels})}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(described, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{one.name}={described(getattr(value, one.name))}" for one in fields(value))
        return f"{type(value).__name__}({inner})"
    return repr(value)
