"""The negative prompt of a call: whether it is the one that an adapter was trained for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from agd_fast.attaching.attachment import Attachment

_ONE_EACH = {"num_images_per_prompt": 1, "num_videos_per_prompt": 1, "do_classifier_free_guidance": True}


def other_negative(pipe: Any, arguments: Mapping[str, Any], attachment: Attachment) -> str:
    """A message about a negative prompt that the adapter does not know; empty if it knows it, or there is none."""
    spec, trained = attachment.spec.pipeline, attachment.adapter.config.negative_prompt
    own = bool(spec.negative_prompt) or _has_own(pipe, spec.own_negative)
    known = (None, None if own else "", spec.negative_prompt, trained)
    given = {name: value for name, value in arguments.items() if name.startswith("negative_prompt")}
    leaves = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
    text = trained if trained is not None else spec.negative_prompt
    what = f"the negative prompt {text!r}" if text else "no negative prompt" if own and text is None else "the empty prompt"
    if any(not isinstance(one, Tensor) and one not in known for values in leaves.values() for one in values):
        return f"this adapter was trained for {what}"
    tensors = {name: found for name, values in leaves.items() if (found := [one for one in values if isinstance(one, Tensor)])}
    if not tensors:
        return ""
    made = _made_embeddings(pipe, arguments, text, own)
    strange = [name for name, values in tensors.items() if not all(any(_same(one, like) for like in made) for one in values)]
    if not strange:
        return ""
    why = "are not those that this pipeline makes of it" if made else "may be others, as this pipeline has none to compare with"
    return f"this adapter was trained for {what}, and {', '.join(strange)} {why}"


def _has_own(pipe: Any, own_negative: bool | tuple[str, ...]) -> bool:
    if isinstance(own_negative, bool):
        return own_negative
    names = {cls.__name__ for cls in type(pipe).__mro__} | {f"config.{name}" for name, value in pipe.config.items() if value}
    return not names.isdisjoint(own_negative)


def _made_embeddings(pipe: Any, arguments: Mapping[str, Any], text: str | None, own: bool) -> list[Tensor]:
    """All tensors that the pipeline's own `encode_prompt` makes of a negative prompt. Empty if it does not run, as without text
    encoders, or does not know what giving none means. own: whether giving none differs from giving an empty one."""
    encode = getattr(pipe, "encode_prompt", None)
    parameters = {} if encode is None else inspect.signature(encode).parameters
    both = "negative_prompt" in parameters
    if encode is None or (text is None and own and not both):
        return []
    further = {name: value for name, value in arguments.items() if name in parameters and "prompt" not in name}
    asked = {"prompt": "." if both else text or "", "device": pipe._execution_device, **further, **_ONE_EACH}
    asked |= {} if text is None else {"negative_prompt": text}
    needed = {name: None for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    try:
        with torch.no_grad():
            found = encode(**needed | {name: value for name, value in asked.items() if name in parameters})
    except Exception:  # whatever the code of a pipeline may raise
        return []
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def _same(given: Tensor, own: Tensor) -> bool:
    """Whether both are equal. own: of one sample, or of as many as `given`."""
    like = own.to(given)
    return (own.shape == given.shape or own.shape == (1, *given.shape[1:])) and torch.equal(given, like.expand_as(given))
