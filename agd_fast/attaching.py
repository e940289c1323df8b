"""Putting an adapter on a denoiser and taking it off again.

A site is a forward hook plus an empty marker subclass (`module.__class__` swapped for a subclass with the same
forward), so that torch.compile's type guard sees attach and detach. Hooks are module-level functions; what they need
lies on module attributes outside of parameters and submodules, so the base's state dict never holds an adapter key and
deepcopy and pickle carry the adapter along. An attached adapter does nothing until `guided` arms it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agd_fast.adapters import Adapter, AdapterConfig, adapter_sites, build_adapter, count_parameters, for_backbone
from agd_fast.adapters.base import Prepared, SiteAdapter
from agd_fast.conditioning import condition_width, embed_conditions, embed_time
from agd_fast.families import find_spec
from agd_fast.spec import DenoiserSpec, Layout, device_of, find_modules, forward_parameters, resolve_sites

Model = TypeVar("Model")
GuidanceScale = float | Sequence[float] | Tensor

_ROOT, _SITES = "_agd", "_agd_sites"


def denoiser_of(model: Any) -> nn.Module:
    """The denoiser of a Teacher, a diffusers pipeline, a compiled module or a denoiser.

    Raises: TypeError.
    """
    component = component_of(model)
    return getattr(component, "_orig_mod", component)  # torch.compile


def component_of(model: Any) -> nn.Module:
    """As `denoiser_of`, but compiled where it is compiled."""
    for name in ("denoiser", "transformer", "unet"):
        inner = None if isinstance(model, nn.Module) else getattr(model, name, None)
        if isinstance(inner, nn.Module):
            model = inner
            break
    if not isinstance(model, nn.Module):
        raise TypeError(
            "expected a denoiser (nn.Module), an agd_fast.Teacher or a diffusers pipeline with a unet or transformer, "
            f"found {type(model).__name__}"
        )
    return model


class AttachedSite:
    """What the hook at a site needs: what the adapter does there and, during an armed forward, its prepared entry."""

    def __init__(self, adapter: SiteAdapter) -> None:
        self.adapter = adapter
        self.prepared: Any = None


class Attachment:
    """An adapter on one denoiser, and whether it is armed. Its copies and pickles are not."""

    def __init__(self, adapter: Adapter, spec: DenoiserSpec, parameters: tuple[str, ...]) -> None:
        self.adapter, self.spec = adapter, spec
        self.positions = {name: position for position, name in enumerate(parameters)}
        self.sites = [AttachedSite(part) for part in adapter.sites]
        self.handles: list[Any] = []
        self.enabled = True
        self.omega: Tensor | None = None  # [1] or [B] float32 while armed

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "enabled": True, "omega": None}

    @property
    def active(self) -> bool:
        return self.omega is not None and self.enabled

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        outer, _, inner = name.partition(".")
        position = self.positions.get(outer, len(args))
        value = kwargs[outer] if outer in kwargs else args[position] if position < len(args) else None
        return value.get(inner) if inner and value is not None else value

    def prepare(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prepared:
        spec, omega = self.spec, self.omega
        assert omega is not None
        x = self.argument(spec.sample, args, kwargs)
        batch = x.shape[0]
        if omega.shape[0] not in (1, batch):
            raise ValueError(
                f"guided(...) was given ω for {omega.shape[0]} samples, but the denoiser was called with a batch of {batch}; "
                "expected one forward a step without CFG's doubled batch (double guidance)"
            )
        timestep = torch.as_tensor(self.argument(spec.timestep, args, kwargs), device=x.device)
        conditions = {}
        for condition in spec.adapted:
            value = self.argument(condition.argument, args, kwargs)
            if value is None:
                raise ValueError(
                    f"the adapter needs the condition {condition.argument!r}, which this call of "
                    f"{type(denoiser).__name__} does not pass"
                )
            conditions[condition.argument] = value
        if next(self.adapter.parameters()).device != x.device:
            with torch.inference_mode(False):  # inference tensors could never be trained again
                self.adapter.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                time = embed_time(denoiser, spec, timestep.float().reshape(-1).expand(batch))
                embedded = embed_conditions(denoiser, spec, conditions)
            return self.adapter.prepare(omega.to(x.device).expand(batch), time, embedded)


def _prepare_forward(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attachment: Attachment = denoiser._agd  # type: ignore[assignment]
    if attachment.active:
        for site, entry in zip(attachment.sites, attachment.prepare(denoiser, args, kwargs), strict=True):
            site.prepared = entry


def _finish_forward(denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for site in denoiser._agd.sites:  # type: ignore[union-attr]
        site.prepared = None


def _apply_at_site(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    for attached in module._agd_sites:  # type: ignore[union-attr]
        if attached.prepared is not None:
            output = _changed(attached.adapter, attached.prepared, args, kwargs, output)
    return output


def _changed(adapter: SiteAdapter, prepared: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    site = adapter.site
    base = output[site.output] if isinstance(output, tuple) else output
    if base.shape[site.channel_dim] != site.width:
        raise ValueError(
            f"width mismatch at {site.path!r}: the adapter was made for {site.width} channels at dimension "
            f"{site.channel_dim}, the output there is {tuple(base.shape)}"
        )
    hidden = args[0] if args else kwargs.get(site.hidden, base)
    changed = adapter(hidden, base, prepared)
    if isinstance(output, tuple):
        return (*output[: site.output], changed, *output[site.output + 1 :])
    return changed


@functools.cache
def _marker(cls: type[nn.Module]) -> type[nn.Module]:
    """An empty subclass that is named, saved and pickled as `cls`."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "__reduce__": _reduce, "_agd_base": cls})


def _reduce(module: Any) -> tuple[Any, ...]:
    return _remake, (module._agd_base,), module.__getstate__()


def _remake(base: type[nn.Module]) -> nn.Module:
    marker = _marker(base)  # type: ignore[arg-type]
    return marker.__new__(marker)


def _mark(module: nn.Module) -> None:
    if "_agd_base" not in vars(type(module)):
        module.__class__ = _marker(type(module))  # type: ignore[arg-type]


def _unmark(module: nn.Module) -> None:
    base = vars(type(module)).get("_agd_base")
    if base is not None:
        module.__class__ = base


def attachment_of(model: Any) -> Attachment | None:
    return vars(denoiser_of(model)).get(_ROOT)


def layout_for(denoiser: nn.Module, config: AdapterConfig, spec: DenoiserSpec) -> Layout:
    """Sites and widths of `denoiser` for this kind of adapter, read off its modules.

    Raises: ValueError when a path is unknown, a width mismatched, or the spec's embeddings do not run.
    """
    sites = {kind: resolve_sites(denoiser, adapter_sites(kind, config, spec)) for kind in config.kinds}
    for names in (spec.time_embedding, *(condition.embedding for condition in spec.adapted)):
        for name in names:
            find_modules(denoiser, name)
    with torch.no_grad():
        try:
            time_width = embed_time(denoiser, spec, torch.zeros(1, device=device_of(denoiser))).shape[-1]
        except RuntimeError as error:
            raise ValueError(
                f"the spec's time_embedding {spec.time_embedding} does not run on t [1]: {error}; expected modules from t to "
                "e_t [B, D], or () to use sinusoidal features of t"
            ) from error
        widths = {condition.argument: condition_width(denoiser, condition) for condition in spec.adapted}
    return Layout(sites, time_width, widths)


def attach(model: Any, config: AdapterConfig | None = None, *, spec: DenoiserSpec | None = None) -> Adapter:
    """Put a fresh zero adapter on a denoiser; the denoiser's outputs stay bit-equal until it is trained.

    Raises: TypeError for an unknown denoiser without a spec; ValueError when an adapter is attached already, a block
    path is unknown or a width does not match.
    """
    denoiser = denoiser_of(model)
    spec = spec or getattr(model, "spec", None) or find_spec(denoiser)
    config = for_backbone(config or AdapterConfig(), spec)
    layout = layout_for(denoiser, config, spec)
    return install(denoiser, build_adapter(config, layout, count_parameters(denoiser)), spec)


def install(denoiser: nn.Module, adapter: Adapter, spec: DenoiserSpec) -> Adapter:
    """Hook `adapter` into the sites of its layout.

    Raises: ValueError when the denoiser has an adapter already.
    """
    if attachment_of(denoiser) is not None:
        raise ValueError(
            f"this {type(denoiser).__name__} already has an adapter; expected agd_fast.unload(...) before another one"
        )
    adapter.to(device_of(denoiser))
    attachment = Attachment(adapter, spec, forward_parameters(denoiser))
    attachment.handles = [
        denoiser.register_forward_pre_hook(_prepare_forward, with_kwargs=True),
        denoiser.register_forward_hook(_finish_forward, always_call=True),
    ]
    setattr(denoiser, _ROOT, attachment)
    _mark(denoiser)
    for attached in attachment.sites:
        module = denoiser.get_submodule(attached.adapter.site.path)
        if _SITES not in vars(module):
            setattr(module, _SITES, [])
            attachment.handles.append(module.register_forward_hook(_apply_at_site, with_kwargs=True))
            _mark(module)
        vars(module)[_SITES].append(attached)
    return adapter


def unload(model: Model) -> Model:
    """Take the adapter off; the base is bit-exact again. Returns its argument."""
    denoiser = denoiser_of(model)
    attachment = attachment_of(denoiser)
    if attachment is None:
        return model
    for handle in attachment.handles:
        handle.remove()
    for module in denoiser.modules():  # not by path: a site may have moved, as LoRA moves what it wraps
        vars(module).pop(_ROOT, None)
        vars(module).pop(_SITES, None)
        _unmark(module)
    return model


def require_attachment(model: Any) -> Attachment:
    """Raises: ValueError when no adapter is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"no adapter is attached to this {type(denoiser_of(model)).__name__}; expected agd_fast.load(...), "
            "agd_fast.attach(...) or agd_fast.distill(...) first"
        )
    return attachment


@contextmanager
def guided(model: Any, guidance_scale: GuidanceScale) -> Iterator[None]:
    """Arm the adapter: every forward inside predicts the guided result in one pass.

    guidance_scale: one number, or one a sample [B], in the family's own convention. With one number a doubled CFG
    batch cannot be told from a plain one: call the denoiser, or a pipeline with its own guidance off.
    Raises: ValueError when no adapter is attached. Warns: when ω lies outside the range that was trained.
    """
    attachment = require_attachment(model)
    omega = to_omega(guidance_scale, attachment.spec)
    _warn_outside(omega, attachment.adapter.config)
    with armed(attachment, omega.to(device_of(denoiser_of(model)))):
        yield


@contextmanager
def armed(attachment: Attachment, omega: Tensor) -> Iterator[None]:
    """Arm with ω [1] or [B] as it is: no conversion, no check, no host sync."""
    previous, attachment.omega = attachment.omega, omega
    try:
        yield
    finally:
        attachment.omega = previous


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The base, bit-exact, whatever is attached or armed."""
    attachment = attachment_of(model)
    if attachment is None:
        yield
        return
    previous, attachment.enabled = attachment.enabled, False
    try:
        yield
    finally:
        attachment.enabled = previous


def to_omega(guidance_scale: GuidanceScale, spec: DenoiserSpec) -> Tensor:
    """ω in the standard convention (ω = 1: no guidance), [1] or [B] float32."""
    scale = torch.as_tensor(guidance_scale, dtype=torch.float32).detach()
    if scale.ndim > 1 or not torch.isfinite(scale).all():
        raise ValueError(
            f"expected one finite guidance scale or one a sample [B], found shape {tuple(scale.shape)}: {scale.tolist()}"
        )
    return scale.reshape(-1) + spec.omega_offset


def _warn_outside(omega: Tensor, config: AdapterConfig) -> None:
    low, high = config.guidance_range
    outside = (omega < low - 1e-6) | (omega > high + 1e-6)
    if config.identity_at_one:
        outside &= omega != 1
    if outside.any():
        lowest, highest = float(omega.min()), float(omega.max())
        warnings.warn(
            f"guidance scale ω from {lowest:g} to {highest:g} lies outside [{low:g}, {high:g}], "
            "the range this adapter was trained on; far outside, samples break: distil with a wider guidance_range",
            stacklevel=4,
        )
