"""Attaching an adapter to a denoiser and removing it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from agd_fast.adapters import Adapter, AdapterConfig, adapter_sites, build_adapter, count_parameters, for_backbone
from agd_fast.attaching.attachment import ROOT, SITES, AttachedSite, Attachment, attachment_of
from agd_fast.attaching.find import bring_embedders, components_of, denoiser_of, own_modules, uncompiled
from agd_fast.attaching.hooks import change_argument, change_output, finish_forward, prepare_forward
from agd_fast.attaching.markers import mark, unmark
from agd_fast.attaching.scope import optimized
from agd_fast.attaching.wrapping import require_known_call, unwrap, wrap
from agd_fast.conditioning import condition_width, embed_time
from agd_fast.families import find_spec
from agd_fast.forward import device_of, forward_parameters
from agd_fast.sites import Layout, ResolvedSite, find_modules, resolve_sites
from agd_fast.spec import DenoiserSpec

Model = TypeVar("Model")


def spec_of(model: Any, spec: DenoiserSpec | None = None) -> DenoiserSpec:
    """The spec as given, or that of an attached adapter, of a Teacher, or of a known class. Raises: TypeError."""
    attachment = attachment_of(model)
    return spec or (attachment.spec if attachment else None) or getattr(model, "spec", None) or find_spec(denoiser_of(model))


def attach(model: Any, config: AdapterConfig | None = None, *, spec: DenoiserSpec | None = None) -> Adapter:
    """Attach a new adapter, initialized to zero, to a denoiser.

    The denoiser's outputs stay bit-equal until the adapter is trained. A pipeline with several denoisers gets one adapter for
    each; the first one is returned. The pipeline's own call then arms them.
    Raises: TypeError for an unknown denoiser without a spec; ValueError if an adapter is already attached, a block path is
    unknown, a width does not match, guidance is already distilled into the model, or a pipeline's call takes no guidance scale,
    guides by more than two branches, or leaves its denoiser to other pipelines that it calls.
    """
    spec = spec_of(model, spec)
    require_known_call(model, spec)
    config = for_backbone(config or AdapterConfig(), spec)
    _require_undistilled(getattr(model, "owner", model))
    fresh = []
    for component in components_of(model, spec).values():
        denoiser = uncompiled(component)
        _require_guidance(denoiser)
        layout = layout_for(denoiser, config, spec)
        fresh.append((denoiser, build_adapter(config, layout, count_parameters(denoiser))))
    wrap(model)
    for denoiser, adapter in fresh:
        install(denoiser, adapter, spec)
    return fresh[0][1]


def layout_for(denoiser: nn.Module, config: AdapterConfig, spec: DenoiserSpec) -> Layout:
    """Sites and widths of `denoiser` for this kind of adapter, read off its modules.

    Raises: ValueError when a path is unknown, a width mismatched, or the spec's embeddings do not run, and for a denoiser on
    several devices.
    """
    _require_one_device(denoiser)
    with own_modules(denoiser):
        sites = {kind: resolve_sites(denoiser, adapter_sites(kind, config, spec)) for kind in config.kinds}
        for names in (spec.time_embedding, *(condition.embedding for condition in spec.adapted)):
            for name in names:
                find_modules(denoiser, name)
    bring_embedders(denoiser, spec, device_of(denoiser))
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


def install(denoiser: nn.Module, adapter: Adapter, spec: DenoiserSpec) -> Adapter:
    """Hook `adapter` into the sites of its layout.

    Raises: ValueError when the denoiser has an adapter already.
    """
    if attachment_of(denoiser) is not None:
        raise ValueError(
            f"this {type(denoiser).__name__} already has an adapter; expected agd_fast.unload(...) before another one, or a "
            "fresh model to load it into, also where a notebook's cell runs again"
        )
    adapter.to(device_of(denoiser))
    with own_modules(denoiser):
        modules = {part.site.path: denoiser.get_submodule(part.site.path) for part in adapter.sites}
    sites = [AttachedSite(part, _position(modules[part.site.path], part.site)) for part in adapter.sites]
    attachment = Attachment(adapter, spec, forward_parameters(denoiser), sites)
    attachment.handles = [
        denoiser.register_forward_pre_hook(prepare_forward, with_kwargs=True),
        denoiser.register_forward_hook(finish_forward, always_call=True),
    ]
    setattr(denoiser, ROOT, attachment)
    mark(denoiser)
    for path, module in modules.items():
        here = [site for site in sites if site.adapter.site.path == path]
        setattr(module, SITES, here)
        if any(site.adapter.site.argument is not None for site in here):
            attachment.handles.append(module.register_forward_pre_hook(change_argument, with_kwargs=True))
        if any(site.adapter.site.argument is None for site in here):
            attachment.handles.append(module.register_forward_hook(change_output, with_kwargs=True))
        mark(module)
    return adapter


def _position(module: nn.Module, site: ResolvedSite) -> int:
    """Position in the module's forward of the argument that a site changes; −1 if none. Raises: ValueError if it is not there."""
    if site.argument is None:
        return -1
    parameters = forward_parameters(module)
    if site.argument not in parameters:
        raise ValueError(f"expected an argument {site.argument!r} of {site.path!r} ({type(module).__name__}), found {parameters}")
    return parameters.index(site.argument)


def _require_one_device(denoiser: nn.Module) -> None:
    """Raises: ValueError if a device_map spread it over several devices: what its sites need of (ω, t, c) is computed on one."""
    places: Any = getattr(denoiser, "hf_device_map", None) or {}
    devices = sorted({str(place) for place in places.values()} - {"cpu", "disk"})  # weights there run elsewhere
    if len(devices) > 1:
        raise ValueError(
            f"this {type(denoiser).__name__} lies on several devices ({', '.join(devices)}); an adapter needs all of it on one, "
            "for instance with enable_group_offload or enable_model_cpu_offload where it is too large"
        )


def _require_guidance(denoiser: nn.Module) -> None:
    """Raises: ValueError when ω is an input of the denoiser, which then makes only one forward per step."""
    config: Any = getattr(denoiser, "config", {})
    for name in ("guidance_embeds", "time_cond_proj_dim"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"this {type(denoiser).__name__} takes the guidance scale as an input ({name}={value}), so it makes one forward "
                "a step already: expected a model that runs classifier-free guidance, AGD gains nothing here"
            )


def _require_undistilled(model: Any) -> None:
    """Raises: ValueError for a pipeline whose config says that its model is distilled: it then runs without guidance."""
    if isinstance(model, DiffusionPipeline) and model.config.get("is_distilled"):
        raise ValueError(
            f"this {type(model).__name__} says that its model is distilled (is_distilled=True), so it makes one forward a step "
            "already: expected a model that runs classifier-free guidance, AGD gains nothing here"
        )


def unload(model: Model) -> Model:
    """Remove the adapter from `model` and return `model`.

    The base is then bit-exact again. While the engine is on, it is exact up to rounding; the engine stays on until
    `optimize(model, None)`. Pipelines that share the denoiser lose the adapter too, and use the next one that is attached.
    """
    first = attachment_of(model)
    for component in () if first is None else components_of(model, first.spec).values():
        denoiser = uncompiled(component)
        attachment = attachment_of(denoiser)
        if attachment is None:
            continue
        for handle in attachment.handles:
            handle.remove()
        for module in denoiser.modules():  # not by path: a site may have moved, as LoRA moves what it wraps
            vars(module).pop(ROOT, None)
            vars(module).pop(SITES, None)
            unmark(module)
    if not optimized(model):
        unwrap(model)
    return model
