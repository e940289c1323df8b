"""A pipeline with adapters: the same object, whose call makes one forward pass per step.

Its class is replaced by a subclass with another `__call__`, which keeps the name and is saved as before. Other instances are
untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from agd_fast.attaching.attachment import attachment_of
from agd_fast.attaching.calling import Interval, Negative, call_pipeline
from agd_fast.attaching.find import components_of, denoiser_of
from agd_fast.attaching.guider_call import GuiderCall
from agd_fast.spec import DenoiserSpec

Pipeline = TypeVar("Pipeline")

_FURTHER_BRANCHES = ("image_guidance_scale", "pag_scale")  # arguments that weight a further branch


def wrap(pipe: Pipeline) -> Pipeline:
    """Let a pipeline's own call arm the adapters of its denoisers. Returns its argument."""
    if isinstance(pipe, DiffusionPipeline) and not is_wrapped(pipe):
        pipe.__class__ = _wrapped(type(pipe))  # type: ignore[arg-type]
    return pipe


def unwrap(pipe: Any) -> None:
    if is_wrapped(pipe):
        pipe.__class__ = type(pipe)._agd_pipeline


def is_wrapped(pipe: Any) -> bool:
    return "_agd_pipeline" in vars(type(pipe))


def _own_class(pipe: Any) -> Any:
    """The class that the pipeline had before it was wrapped."""
    return getattr(type(pipe), "_agd_pipeline", type(pipe))


def own_call(pipe: Any, spec: DenoiserSpec | None = None) -> Callable[..., Any]:
    """The pipeline's call as diffusers has it, which arms nothing, with the guidance scale as one of its arguments."""
    attachment = attachment_of(pipe)
    call = functools.partial(_own_class(pipe).__call__, pipe)
    spec = spec or (attachment.spec if attachment else None)
    guiders = [] if spec is None else guiders_of(pipe, spec)
    if spec is None or not guiders:
        return call
    return GuiderCall(call, guiders, spec.pipeline.omega_arguments[0], spec.pipeline.cfg_off_value)


def guiders_of(pipe: Any, spec: DenoiserSpec) -> list[Any]:
    """The guiders that hold the guidance scale if the call has no argument for it. Raises: ValueError if none is there."""
    names = spec.pipeline.guiders
    found = [guider for name in names if (guider := getattr(pipe, name, None)) is not None]
    if names and not found:
        raise ValueError(f"expected a guider of diffusers as {' or '.join(names)} of this {type(pipe).__name__}, found none")
    return found


def require_known_call(pipe: Any, spec: DenoiserSpec) -> None:
    """Raises: ValueError for a pipeline whose call takes no guidance scale, guides by more than two branches, or leaves its
    denoisers to other pipelines, which it calls."""
    if not isinstance(pipe, DiffusionPipeline):
        return
    cls, name = type(pipe).__name__, spec.pipeline.omega_arguments[0]
    parameters = inspect.signature(own_call(pipe, spec)).parameters
    used = inspect.unwrap(_own_class(pipe).__call__).__code__.co_names
    inner = {name: value for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline) and name in used}
    if name not in parameters:
        expected = f"its {' or '.join(inner)}" if inner else "a pipeline that guides by it"
        raise ValueError(f"a call of {cls} takes no {name}; expected {expected}")
    if further := [name for name in _FURTHER_BRANCHES if name in parameters]:
        raise ValueError(f"{cls} guides by more than two branches ({further[0]}); expected a pipeline with one guidance scale")
    ours = {*map(id, components_of(pipe, spec).values())}
    if any(id(one) in ours for other in inner.values() for one in vars(other).values()):
        raise ValueError(f"{cls} runs other pipelines in its call; expected its {' or '.join(inner)}")


def share(pipe: Any, other: Pipeline) -> Pipeline:
    """Let `other`, a pipeline with the same denoiser as `pipe`, make one forward pass per step with the same adapter.

    Such pipelines are img2img, inpainting, ControlNet, and others that `from_pipe` makes. Returns `other`.
    Raises: ValueError if `pipe` has no adapter, or if `other` has another denoiser or a call that adapters do not support: it
    must take one guidance scale, guide by two branches, and run the denoiser itself.
    """
    attachment = attachment_of(pipe)
    if attachment is None:
        raise ValueError(f"expected a {type(pipe).__name__} with an adapter to share, found none attached")
    ours, theirs = ({*map(id, components_of(model, attachment.spec).values())} for model in (pipe, other))
    if ours != theirs:
        raise ValueError(
            f"expected a pipeline with the same denoiser as this {type(pipe).__name__}, for its adapter is attached to that; "
            f"found another {type(denoiser_of(other)).__name__}. Make one by {type(other).__name__}.from_pipe(pipe)"
        )
    require_known_call(other, attachment.spec)
    return wrap(other)


@functools.cache
def _wrapped(cls: Any) -> Any:
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, guidance_interval: Interval | None = None, negative: Negative = "warn", **kwargs: Any) -> Any:
        return call_pipeline(self, own_call(self), args, kwargs, guidance_interval=guidance_interval, negative=negative)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "__call__": call, "__reduce__": _reduce, "_agd_pipeline": cls})


def _reduce(pipe: Any) -> tuple[Any, ...]:
    return _remake, (type(pipe)._agd_pipeline,), vars(pipe)


def _remake(cls: Any) -> Any:
    wrapped = _wrapped(cls)
    return wrapped.__new__(wrapped)
