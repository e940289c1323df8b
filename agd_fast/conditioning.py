"""From (ω, t, c) to adapter tokens: embedders shared by all sites of an adapter.

e_t and e_c are the base model's own embeddings, computed by its own frozen modules; the adapter only projects them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from agd_fast.adapters.config import AdapterConfig
from agd_fast.forward import device_of
from agd_fast.sites import Layout, apply_modules, config_value
from agd_fast.spec import Condition, DenoiserSpec

SINUSOIDAL_WIDTH = 64  # channels of e_t where the base has no time embedding to reuse


class FourierFeatures(nn.Module):
    """cos(2π(f·ω + φ)) with random f, φ: the paper's features of a scalar. [B] → [B, d]"""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))

    def forward(self, omega: Tensor) -> Tensor:
        return torch.cos(2 * math.pi * (self.frequencies * omega[:, None] + self.phases))


class SmoothFeatures(nn.Module):
    """u and log(1 + u), u from 0 to 1 over the guidance range: what guidance adds is itself smooth in ω. [B] → [B, 2]"""

    width = 2

    def __init__(self, guidance_range: tuple[float, float]) -> None:
        super().__init__()
        self.low, self.high = guidance_range

    def forward(self, omega: Tensor) -> Tensor:
        u = ((omega - self.low) / (self.high - self.low)).clamp(min=-0.9)  # far below the range, keeps the logarithm defined
        return torch.stack([u, u.log1p()], dim=-1)


class OmegaEmbedder(nn.Module):
    """E_ω: [B] → [B, d]. normed: with a LayerNorm inside the MLP of Fourier features as well."""

    def __init__(self, config: AdapterConfig, hidden: int, normed: bool = False) -> None:
        super().__init__()
        if config.omega_features == "fourier":  # section 4 of the paper: features → MLP → LayerNorm
            self.features: nn.Module = FourierFeatures(hidden)
            inner = [nn.Linear(hidden, 4 * hidden), nn.ReLU(), *([nn.LayerNorm(4 * hidden)] if normed else [])]
            self.net = nn.Sequential(*inner, nn.Linear(4 * hidden, hidden), nn.LayerNorm(hidden))
        else:
            self.features = SmoothFeatures(config.guidance_range)
            self.net = nn.Sequential(nn.Linear(SmoothFeatures.width, hidden))

    def forward(self, omega: Tensor) -> Tensor:
        return self.net(self.features(omega))


class Conditioning(nn.Module):
    """ω [B], e_t [B, D_t], e_c [B, D_c] or [B, L, D_c] → tokens of width d: E_ω [B, 1, d], P_t·e_t [B, 1, d],
    P_c·e_c [B, 1 or L, d] for each condition; of the last two, those that the config's `sees` names."""

    def __init__(self, config: AdapterConfig, layout: Layout, hidden: int, normed: bool = False) -> None:
        super().__init__()
        widths = layout.condition_widths if "conditions" in config.sees else {}
        self.omega = OmegaEmbedder(config, hidden, normed)
        self.time = nn.Linear(layout.time_width, hidden) if "time" in config.sees else None
        self.names = tuple(widths)
        self.conditions = nn.ModuleList(nn.Linear(width, hidden) for width in widths.values())

    def forward(self, omega: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        tokens = [self.omega(omega)[:, None]]
        if self.time is not None:
            tokens.append(self.time(time)[:, None])
        for name, project in zip(self.names, self.conditions, strict=True):
            token = project(conditions[name])
            tokens.append(token if token.ndim == 3 else token[:, None])
        return tokens

    def token_masks(self, masks: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Masks of the tokens that count, in the order of `forward`: [B, 1 or L] bool, or None if all count."""
        return (None, *([] if self.time is None else [None]), *(masks.get(name) for name in self.names))


def check_masks(masks: Mapping[str, Tensor], conditions: Mapping[str, Tensor]) -> None:
    """Raises: ValueError unless each mask is [B, L] bool for an e_c [B, L, D]."""
    for name, mask in masks.items():
        if name not in conditions:
            raise ValueError(f"expected masks of {', '.join(map(repr, conditions)) or 'no condition'}; found one of {name!r}")
        shape = tuple(conditions[name].shape)
        if len(shape) != 3 or mask.shape != shape[:2] or mask.dtype is not torch.bool:
            expected = f"{list(shape[:2])} of torch.bool, True at valid tokens" if len(shape) == 3 else "none"
            raise ValueError(
                f"the embedding of {name!r} is {list(shape)}: expected as its mask {expected}; "
                f"found {list(mask.shape)} of {mask.dtype}"
            )


def embed_time(denoiser: nn.Module, spec: DenoiserSpec, timestep: Tensor) -> Tensor:
    """e_t [B, D_t] in the base's dtype, from t [B]."""
    if not spec.time_embedding:
        return get_timestep_embedding(timestep * spec.timestep_scale, SINUSOIDAL_WIDTH, flip_sin_to_cos=True)
    return apply_modules(denoiser, spec.time_embedding, timestep)


def condition_width(denoiser: nn.Module, condition: Condition) -> int:
    """Number of channels of e_c.

    Raises: ValueError when it is unknown or not unique.
    """
    if condition.width is None:
        if not condition.embedding:
            raise ValueError(f"the width of {condition.argument!r} is unknown; expected Condition(..., width=...) in the spec")
        label = torch.zeros(1, dtype=torch.long, device=device_of(denoiser))
        return apply_modules(denoiser, condition.embedding, label).shape[-1]
    names = condition.width if isinstance(condition.width, tuple) else (condition.width,)
    set_ = [name for name in names[:-1] if getattr(denoiser.config, str(name).removeprefix("config."), None) is not None]
    width = config_value(denoiser, (*set_, names[-1])[0])
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if len(widths) != 1:
        raise ValueError(f"expected one width for {condition.argument!r}, found {sorted(widths)} in {condition.width}")
    return int(widths.pop())


def embed_conditions(denoiser: nn.Module, spec: DenoiserSpec, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """e_c [B, D_c] or [B, L, D_c] in the base's dtype by argument, for the conditions that adapters see."""
    return {
        condition.argument: apply_modules(denoiser, condition.embedding, conditions[condition.argument])
        for condition in spec.adapted
    }
