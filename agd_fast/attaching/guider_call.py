"""The call of a pipeline whose guidance scale lies on its guider, with the scale as an argument like any other pipeline's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class GuiderCall:
    """`call` with a further argument, the guidance scale, which is put on the guider for that call.

    off: the scale at which there is no guidance; the guider is then switched off, whatever else it would do.
    """

    def __init__(self, call: Callable[..., Any], guider: Any, argument: str, off: float) -> None:
        self.call, self.guider, self.argument, self.off = call, guider, argument, off
        signature = inspect.signature(call)
        scale = inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=guider.guidance_scale)
        self.__signature__ = signature.replace(parameters=[*signature.parameters.values(), scale])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guider = self.guider
        previous = guider.guidance_scale, guider._enabled
        guider.guidance_scale = kwargs.pop(self.argument, previous[0])
        guider._enabled = previous[1] and guider.guidance_scale != self.off
        try:
            return self.call(*args, **kwargs)
        finally:
            guider.guidance_scale, guider._enabled = previous
