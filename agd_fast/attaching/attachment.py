"""What is stored on a denoiser that has an adapter, and what is computed from (ω, t, c) when it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from agd_fast.adapters import Adapter
from agd_fast.adapters.base import Ahead, Prepared, SiteAdapter
from agd_fast.attaching.find import bring, bring_embedders, components_of, denoiser_of
from agd_fast.conditioning import embed_conditions, embed_time
from agd_fast.forward import argument_of
from agd_fast.sites import config_value
from agd_fast.spec import Condition, DenoiserSpec

ROOT, SITES = "_agd", "_agd_sites"
# checked once: older versions of torch cannot trace the check
_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "xla")))


class AttachedSite:
    """What the hook at a site needs: what the adapter does there and, during an armed forward, its prepared entry.

    position: that of the argument that it changes, in the module's forward. samples: batch size of the current forward.
    image: how many of the tokens belong to the image.
    """

    def __init__(self, adapter: SiteAdapter, position: int) -> None:
        self.adapter, self.position = adapter, position
        self.prepared: Any = None
        self.samples = 1
        self.image = 0


class Attachment:
    """An adapter on one denoiser, and whether it is armed. Copies and pickles of it are not armed."""

    def __init__(self, adapter: Adapter, spec: DenoiserSpec, parameters: tuple[str, ...], sites: list[AttachedSite]) -> None:
        self.adapter, self.spec, self.sites = adapter, spec, sites
        self.parameters = parameters
        self.handles: list[Any] = []
        self.checkpoints: list[tuple[Any, Any]] = []  # modules whose checkpointing is wrapped for one forward, and the original
        self.enabled = True
        self.caller: int | None = None  # the thread of a pipeline's call that is running, with or without the adapter
        self.omega: Tensor | None = None  # [1] or [B] float32 while armed
        self.gate: Tensor | None = None  # [1], what the adapter is multiplied by; None is 1
        self.ahead: Ahead | None = None  # given if entries are made before the first step, as by the engine

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "enabled": True, "caller": None, "omega": None, "gate": None, "ahead": None}

    @property
    def active(self) -> bool:
        return self.omega is not None and self.enabled

    def require_sites(self, denoiser: nn.Module) -> None:
        """Raises: ValueError if modules that it acts on are no longer in the denoiser: FreeNoise and some quantisation replace
        them by others, without hooks."""
        there = {id(site) for module in denoiser.modules() for site in vars(module).get(SITES, ())}
        gone = [site.adapter.site.path for site in self.sites if id(site) not in there]
        if gone:
            raise ValueError(
                f"modules of this {type(denoiser).__name__} were replaced after its adapter was put on ({len(gone)}, first "
                f"{gone[0]!r}), and have none of it; expected agd_fast.unload(...) of a saved one, then agd_fast.load(...), "
                "which finds those that are there now"
            )

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return argument_of(name, self.parameters, args, kwargs)

    def prepare(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prepared:
        """One entry per site, for a call with these arguments.

        Raises: ValueError when ω is neither one number nor one per sample of the batch, or a condition is not passed.
        """
        spec, omega = self.spec, self.omega
        assert omega is not None
        x = self.argument(spec.sample, args, kwargs)
        batch, first = len(x), x[0]  # a tensor, or a list with one per sample
        if omega.shape[0] not in (1, batch):
            raise ValueError(
                f"guided(...) was given ω for {omega.shape[0]} samples, but the denoiser was called with a batch of {batch}; "
                "expected one forward a step without CFG's doubled batch (double guidance)"
            )
        for site in self.sites:
            site.samples = batch
        self._count_image_tokens(denoiser, first)
        timestep = torch.as_tensor(self.argument(spec.timestep, args, kwargs), device=first.device).float()
        timestep = timestep.flatten(1).amax(dim=1) if timestep.ndim > 1 else timestep.reshape(-1)  # one per token: the noisiest
        conditions: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for condition in spec.adapted:
            value, mask = self._condition(denoiser, condition, batch, args, kwargs)
            conditions[condition.argument] = value
            if mask is not None:
                masks[condition.argument] = mask
        bring(self.adapter, first.device)
        bring_embedders(denoiser, spec, first.device)  # if the base is offloaded until its own forward
        with _no_autocast(first.device):
            with torch.no_grad():
                time = embed_time(denoiser, spec, timestep.expand(batch))
                embedded = embed_conditions(denoiser, spec, conditions)
            omega = omega.to(first.device).expand(batch)
            if self.adapter.calibration is not None:
                omega = self.adapter.calibration(omega, timestep.expand(batch))
            return self.adapter.prepare(omega, time, embedded, masks, gate=self.gate, ahead=self.ahead)

    def _condition(
        self, denoiser: nn.Module, condition: Condition, batch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A condition [B, ...], and a mask [B, L] of its tokens that are not padding, or None."""
        value = self.argument(condition.argument, args, kwargs)
        if value is None:
            raise ValueError(
                f"the adapter needs the condition {condition.argument!r}, which this call of "
                f"{type(denoiser).__name__} does not pass"
            )
        if isinstance(value, list):  # one tensor per sample, with different numbers of tokens
            lengths = [len(one) for one in value]
            value = pad_sequence(value, batch_first=True)
            places = torch.arange(value.shape[1], device=value.device)
            return value, torch.stack([places < length for length in lengths])  # without a copy from the host
        if condition.grouped:
            value = value.unflatten(0, (batch, -1))[:, 0]
        tokens = tuple(value.shape[1:-1])
        if len(tokens) > 1:  # tokens in several dimensions
            value = value.flatten(1, -2)
        mask = None if condition.mask is None else self.argument(condition.mask, args, kwargs)
        return value, None if mask is None else _token_mask(mask, tokens, condition.mask_dim - 1)

    def _count_image_tokens(self, denoiser: nn.Module, first: Tensor) -> None:
        """first: one sample, [C, ...] or already tokens [N, C]."""
        if any(site.adapter.site.tokens != "all" for site in self.sites):
            count = _image_tokens(denoiser, self.spec, tuple(first.shape))
            for site in self.sites:
                site.image = count


def _token_mask(mask: Tensor, tokens: tuple[int, ...], dim: int = 0) -> Tensor:
    """A mask [B, L] of the tokens that count, from a mask of them and possibly more that follow, or from how many count [B].

    dim: the dimension that `mask` refers to, if tokens lie in several dimensions, such as positions and layers.
    """
    length = tokens[dim]
    counts = torch.arange(length, device=mask.device) < mask[:, None] if mask.ndim == 1 else mask.flatten(1)[:, :length] > 0
    over = [length if index == dim else 1 for index in range(len(tokens))]
    return counts.reshape(len(mask), *over).expand(-1, *tokens).flatten(1)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it; "meta" does not."""
    return torch.autocast(device.type, enabled=False) if device.type in _AUTOCASTING else nullcontext()


def _image_tokens(denoiser: nn.Module, spec: DenoiserSpec, shape: tuple[int, ...]) -> int:
    if len(shape) == 2:
        return shape[0]
    patch = config_value(denoiser, spec.patch)
    edges = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    sizes = shape[1:]
    edges = (1,) * (len(sizes) - len(edges)) + edges
    return math.prod(-(-size // edge) for size, edge in zip(sizes, edges, strict=True))


def attachment_of(model: Any) -> Attachment | None:
    return vars(denoiser_of(model)).get(ROOT)


def attachments_of(model: Any) -> list[Attachment]:
    """The attachments of all its denoisers."""
    first = attachment_of(model)
    components = () if first is None else components_of(model, first.spec).values()
    return [found for found in map(attachment_of, components) if found is not None]


def require_attachment(model: Any) -> Attachment:
    """Raises: ValueError when no adapter is attached."""
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"no adapter is attached to this {type(denoiser_of(model)).__name__}; expected agd_fast.load(...), "
            "agd_fast.attach(...) or agd_fast.distill(...) first"
        )
    return attachment
