"""The call of a pipeline whose guidance scale lies on its guiders, with the scale as an argument like any other pipeline's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


class GuiderCall:
    """`call` with a further argument, the guidance scale, which is set on the guiders for that call. Without it, each guider
    keeps its own; the signature gives the first one's as the default.

    off: the scale at which there is no guidance; the guiders are then switched off, whatever else they would do.
    """

    def __init__(self, call: Callable[..., Any], guiders: Sequence[Any], argument: str, off: float) -> None:
        self.call, self.guiders, self.argument, self.off = call, guiders, argument, off
        signature = inspect.signature(call)
        default = guiders[0].guidance_scale if guiders[0]._enabled else off
        scale = inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=default)
        self.__signature__ = signature.replace(parameters=[*signature.parameters.values(), scale])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        previous = [(guider.guidance_scale, guider._enabled) for guider in self.guiders]
        scale = kwargs.pop(self.argument, None)
        for guider in self.guiders:
            guider.guidance_scale = guider.guidance_scale if scale is None else scale
            guider._enabled = guider._enabled and guider.guidance_scale != self.off
        try:
            return self.call(*args, **kwargs)
        finally:
            for guider, (own, enabled) in zip(self.guiders, previous, strict=True):
                guider.guidance_scale, guider._enabled = own, enabled
