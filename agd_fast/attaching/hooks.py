"""The hooks: one before and after the denoiser, which prepare and clear, and those at the sites, which change a module's
output or one of its arguments. They are module-level functions, so that copies and pickles carry them along.

torch.compile traces them; that of torch 2.8 does not support `vars`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.attaching.attachment import ROOT, SITES, AttachedSite, Attachment


def prepare_forward(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attachment: Attachment = getattr(denoiser, ROOT)
    if attachment.active:
        for site, entry in zip(attachment.sites, attachment.prepare(denoiser, args, kwargs), strict=True):
            site.prepared = entry
        if torch.is_grad_enabled():
            _keep_for_recomputation(denoiser, attachment)


def finish_forward(denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    attachment: Attachment = getattr(denoiser, ROOT)
    for site in attachment.sites:
        site.prepared = None
    if attachment.checkpoints:
        for module, checkpoint in attachment.checkpoints:
            module._gradient_checkpointing_func = checkpoint
        attachment.checkpoints = []


def change_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    for attached in getattr(module, SITES):
        if attached.prepared is not None and attached.adapter.site.argument is None:
            site = attached.adapter.site
            base = output[site.output] if isinstance(output, tuple) else output
            hidden = args[0] if args else kwargs.get(site.hidden, base)
            changed = _changed(attached, hidden, base)
            whole = isinstance(output, tuple)
            output = (*output[: site.output], changed, *output[site.output + 1 :]) if whole else changed
    return output


def change_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for attached in getattr(module, SITES):
        name, position = attached.adapter.site.argument, attached.position
        if attached.prepared is None or name is None:
            continue
        if name in kwargs:
            kwargs = {**kwargs, name: _changed(attached, kwargs[name], kwargs[name])}
        else:
            changed = _changed(attached, args[position], args[position])
            args = (*args[:position], changed, *args[position + 1 :])
    return args, kwargs


def _changed(attached: AttachedSite, hidden: Tensor, base: Tensor) -> Tensor:
    """What the site makes of `base`; hidden: the module's input, for adapters that see it."""
    adapter, prepared, site = attached.adapter, attached.prepared, attached.adapter.site
    if site.argument is not None and base.shape[-1] != site.width:
        rows = base.flatten(-2)  # [B, ..., k, C] is a table of k rows
        _require_width(site, rows)
        return adapter(rows, rows, prepared).unflatten(-1, base.shape[-2:])
    _require_width(site, base)
    if (several := len(base) // attached.samples) > 1:
        return _changed_entries(attached, hidden, base, several)
    if site.tokens == "all":
        return adapter(hidden, base, prepared)
    count, total = attached.image, base.shape[1]
    text, image = (
        (slice(count, None), slice(count)) if site.tokens == "first" else (slice(total - count), slice(total - count, None))
    )
    changed, left = adapter(hidden[:, image], base[:, image], prepared), base[:, text]
    return torch.cat([changed, left] if site.tokens == "first" else [left, changed], dim=1)


def _changed_entries(attached: AttachedSite, hidden: Tensor, base: Tensor, several: int) -> Tensor:
    """As `_changed`, for a batch with several consecutive entries per sample, such as frames of a video: their tokens are the
    sample's."""
    adapter, prepared = attached.adapter, attached.prepared
    if adapter.site.channel_dim == -1 and base.ndim > 2:
        hidden, joined = (tokens.unflatten(0, (-1, several)).flatten(1, 2) for tokens in (hidden, base))
        return adapter(hidden, joined, prepared).reshape(base.shape)
    if isinstance(prepared, Tensor):  # [B, …]; others are of one sample
        prepared = prepared.repeat_interleave(several, dim=0)
    return adapter(hidden, base, prepared)


def _require_width(site: Any, base: Tensor) -> None:
    if base.shape[site.channel_dim] != site.width:
        raise ValueError(
            f"width mismatch at {site.path!r}: the adapter was made for {site.width} channels at dimension "
            f"{site.channel_dim}, the output there is {tuple(base.shape)}"
        )


class _Recomputing:
    """Gradient checkpointing of blocks whose recomputation, in backward, uses what was prepared for their forward."""

    def __init__(self, checkpoint: Callable[..., Any], sites: list[AttachedSite]) -> None:
        self.checkpoint, self.sites = checkpoint, sites

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept = [site.prepared for site in self.sites]

        def run(*args: Any, **kwargs: Any) -> Any:
            found = [site.prepared for site in self.sites]
            self._set(kept)
            try:
                return function(*args, **kwargs)
            finally:
                self._set(found)

        return self.checkpoint(run, *args, **kwargs)

    def _set(self, prepared: list[Any]) -> None:
        for site, entry in zip(self.sites, prepared, strict=True):
            site.prepared = entry


def _keep_for_recomputation(denoiser: nn.Module, attachment: Attachment) -> None:
    """Raises: ValueError for reentrant checkpointing, which cuts what it is handed off from its gradients."""
    modules: list[Any] = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        function = module._gradient_checkpointing_func
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "an armed adapter needs gradient checkpointing with use_reentrant=False, diffusers' default; found "
                "use_reentrant=True"
            )
        attachment.checkpoints.append((module, function))
        module._gradient_checkpointing_func = _Recomputing(function, attachment.sites)
