"""Converting a checkpoint of the paper's reference code into an adapter of this library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agd_fast.adapters import Adapter, AdapterConfig, adapter_sites
from agd_fast.attaching import denoiser_of, install, layout_for, spec_of, unload
from agd_fast.reference.checkpoint import State, read_checkpoint, renamed
from agd_fast.reference.config import DIT, ReferenceConfig, read_config
from agd_fast.sites import resolve_sites
from agd_fast.spec import DenoiserSpec
from agd_fast.storage import save

SOURCE = "https://github.com/cristianpjensen/agd"


def convert(
    checkpoint: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any],
    base: Any,
    output_dir: str | os.PathLike[str],
    guidance_range: tuple[float, float] | None = None,
) -> Path:
    """Convert an adapter that was trained with the paper's reference code, for `agd_fast.load`; returns `output_dir`.

    checkpoint: the reference code's "<step>.pt". Only tensors are loaded; a pickle that holds anything else is refused.
    config: its "config.yaml", or the mapping in that file.
    base: the model that the adapter was trained on, in diffusers' form: a UNet2DConditionModel or DiTTransformer2DModel, its
        pipeline or a Teacher. It is left as it is.
    guidance_range: the range that ω was drawn from, outside of which `guided` warns; None takes that of the reference scripts.

    The converted adapter computes what the reference's does, up to rounding: its `additive` or `attention` type, with embedders
    at every layer, no (ω − 1) factor, and only on the layers that it has (of SDXL's 70 cross-attentions the reference fills 58).

    For DiT, the reference runs facebook's model, this library diffusers' form of it. `blocks.i.attn` becomes
    `transformer_blocks.i.attn1`.
    - facebook's model has one embedder of t and one of the label, diffusers' has a copy in every block: e_t and e_c are those of
      block 0.
    - diffusers takes sines of t at other frequencies, in the base as in e_t: its Timesteps has downscale_freq_shift=1, facebook's
      formula is that of 0. With 0 set in each block of the base, both are facebook's.
    - The reference's DiT adapters learnt CFG on the first three channels, as facebook's sampling does it.

    Raises: FileNotFoundError; ValueError if the files are not the reference code's, are for Stable Diffusion 3 or for an adapter
    type other than these two, do not match each other, or do not fit the base (naming what was expected and what was found), or
    if the base already has an adapter; OSError if `output_dir` cannot be written.
    """
    reference, denoiser = read_config(config), denoiser_of(base)
    if reference.base_class not in [cls.__name__ for cls in type(denoiser).__mro__]:
        raise ValueError(
            f"the config is of an adapter for a {reference.base_class}, expected one for this {type(denoiser).__name__}"
        )
    spec = spec_of(base)
    if len(spec.adapted) != 1:
        raise ValueError(
            f"adapters of the reference code see one condition, the {reference.condition}; the spec of this "
            f"{type(denoiser).__name__} has adapters see {[condition.argument for condition in spec.adapted]}"
        )
    layers = _matched(read_checkpoint(checkpoint), reference, denoiser, spec, str(checkpoint))
    adapter_config = reference.adapter(tuple(layers), guidance_range)
    with torch.device("meta"):
        adapter = Adapter(adapter_config, layout_for(denoiser, adapter_config, spec))
    _fill(adapter, layers, reference)
    install(denoiser, adapter, spec)
    try:
        return save(base, output_dir, about=_about(Path(checkpoint), reference, adapter_config, spec))
    finally:
        unload(denoiser)


def _fill(adapter: Adapter, layers: Mapping[str, State], reference: ReferenceConfig) -> None:
    part = adapter.parts[reference.kind]
    state = renamed(layers, reference, {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()})
    if reference.arch == "additive":
        state["cfg_mult"] = torch.tensor([reference.cfg_mult])
    part.load_state_dict(state, assign=True)


def _matched(
    found: dict[str, State], reference: ReferenceConfig, denoiser: nn.Module, spec: DenoiserSpec, where: str
) -> dict[str, State]:
    """The checkpoint's layers by their names in the base, in the base's order.

    Raises: ValueError when one that the reference fills in this base is missing, or one is not in the base.
    """
    sites = adapter_sites(reference.kind, AdapterConfig(reference.kind), spec)
    every = [site.path for site in resolve_sites(denoiser, sites)]
    filled = [path for path in every if not left_out(denoiser, path)]
    layers = {_name_in_diffusers(layer, reference): state for layer, state in found.items()}
    missing, foreign = [path for path in filled if path not in layers], sorted(layers.keys() - set(every))
    if missing or foreign:
        raise ValueError(
            f"{where} has adapters at {len(layers)} layers, expected the {len(filled)} that the reference code fills in this "
            f"{type(denoiser).__name__}: missing {missing[:3] or 'none'}, not in the base {foreign[:3] or 'none'}"
        )
    return {path: layers[path] for path in every if path in layers}


def left_out(denoiser: nn.Module, path: str) -> bool:
    """Whether the reference leaves it out: up blocks have one attention more than down blocks, but it counts them alike."""
    match = re.match(r"(up_blocks\.\d+\.attentions)\.(\d+)\.", path)
    return match is not None and int(match[2]) == len(denoiser.get_submodule(match[1])) - 1  # type: ignore[arg-type]


def _name_in_diffusers(layer: str, reference: ReferenceConfig) -> str:
    return re.sub(r"^blocks\.(\d+)\.attn$", r"transformer_blocks.\1.attn1", layer) if reference.base_class == DIT else layer


def _about(checkpoint: Path, reference: ReferenceConfig, config: AdapterConfig, spec: DenoiserSpec) -> dict[str, Any]:
    (condition,) = spec.adapted
    embedders = {
        "e_t": " → ".join(spec.time_embedding) if "time" in config.sees else None,
        "e_c": " → ".join((condition.argument, *condition.embedding)) if "conditions" in config.sees else None,
    }
    about = {
        "converted_from": SOURCE,
        "checkpoint": checkpoint.name,
        "embedders": embedders,
        "reference_config": json.loads(json.dumps(dict(reference.entries), default=str)),
    }
    if reference.base_class == DIT:
        about["note"] = (
            "the reference has one embedder of t and one of the label; here they are block 0's, whose frequencies of t are those "
            "of diffusers (downscale_freq_shift=1), not facebook's; CFG was learnt on the first three channels"
        )
    return about
