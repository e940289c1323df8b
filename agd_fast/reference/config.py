"""The reference code's config.yaml, which its training scripts write beside their checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agd_fast.adapters import AdapterConfig

UNET, DIT = "UNet2DConditionModel", "DiTTransformer2DModel"
KINDS = {"additive": "reference_offset", "attention": "reference_cross_attention"}
_UNSUPPORTED = ("mlp_gate", "learned_pos_emb")  # in the code, but in none of the paper's results


@dataclass(frozen=True)
class ReferenceConfig:
    """What a checkpoint's adapters were built with.

    arch: "additive" or "attention". base_class: the diffusers class that they belong to. hidden_dim: their width d.
    use_timestep, use_condition: whether they see t, and the class label or the prompt.
    cfg_mult: ω is multiplied by it; `additive` only.
    entries: the whole file.
    """

    arch: str
    base_class: str
    hidden_dim: int
    use_timestep: bool
    use_condition: bool
    cfg_mult: float
    entries: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return KINDS[self.arch]

    @property
    def condition(self) -> str:
        return "prompt" if self.base_class == UNET else "class"

    def adapter(self, layers: tuple[str, ...], guidance_range: tuple[float, float] | None = None) -> AdapterConfig:
        """guidance_range: None takes what the reference's scripts draw ω from, 1 to 6 for DiT and 1 to 12 for UNets."""
        seen = (("time", self.use_timestep), ("conditions", self.use_condition))
        return AdapterConfig(
            self.kind,
            self.hidden_dim,
            omega_features="fourier",
            identity_at_one=False,
            guidance_range=guidance_range or (1.0, 12.0 if self.base_class == UNET else 6.0),
            layers=layers,
            sees=tuple(name for name, used in seen if used),  # type: ignore[misc]
        )


def read_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> ReferenceConfig:
    """A config.yaml, or what it holds.

    Raises: FileNotFoundError; ValueError when it is not YAML, lacks an entry, or is of a model or adapter without a counterpart.
    """
    where, entries = "the config", config
    if not isinstance(config, Mapping):
        where = str(config)
        try:
            entries = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not valid YAML without Python objects: {error}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} is no config.yaml of the reference code: expected a mapping, found a {type(entries).__name__}")
    unet = "base_model" in entries
    if not unet and "image_size" not in entries:
        raise ValueError(f"{where} must have base_model (a UNet) or image_size (DiT); found the entries {sorted(entries)}")
    if unet and "stable-diffusion-3" in str(entries["base_model"]):
        raise ValueError(
            f"{where} has base_model={entries['base_model']!r}: the reference code cannot run Stable Diffusion 3; "
            "expected Stable Diffusion 2.1 or XL, or a DiT"
        )
    needed: dict[str, type | tuple[type, ...]] = {"arch": str, "hidden_dim": int, "use_timestep": bool}
    needed["use_prompt" if unet else "use_class_label"] = bool
    if not unet and entries.get("arch") == "additive":
        needed["cfg_mult"] = (int, float)
    for name, kind in needed.items():
        if not isinstance(entries.get(name), kind):
            expected = kind.__name__ if isinstance(kind, type) else "number"
            raise ValueError(f"{where} must have {name} as {expected}; found {entries.get(name, 'none')!r}")
    if entries["arch"] not in KINDS:
        what = "is not supported" if entries["arch"] in _UNSUPPORTED else "is unknown"
        raise ValueError(f"{where} has arch={entries['arch']!r}, which {what}; expected one of {', '.join(map(repr, KINDS))}")
    cfg_mult = float(entries.get("cfg_mult", 1000.0))  # the UNet scripts leave it at the class's default, 1,000
    return ReferenceConfig(
        entries["arch"],
        UNET if unet else DIT,
        entries["hidden_dim"],
        entries["use_timestep"],
        entries["use_prompt" if unet else "use_class_label"],
        cfg_mult,
        dict(entries),
    )
