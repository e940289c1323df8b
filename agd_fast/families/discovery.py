"""Proposes a spec for a denoiser that no family describes, from its modules and the names of its arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from agd_fast.forward import forward_parameters
from agd_fast.sites import module_widths
from agd_fast.spec import Condition, DenoiserSpec, Site

_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma")
_PROMPT = "encoder_hidden_states"
_PROMPT_WIDTHS = (  # the width as passed in comes before the width after projection
    "encoder_hid_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "joint_attention_dim",
    "cross_attention_dim",
)
EXAMPLE = (
    'agd_fast.DenoiserSpec(sample="x", timestep="t", conditions=(agd_fast.Condition("label", embedding=("labels",), null=10),), '
    'attention=(agd_fast.Site("blocks.*.attention", width=64),))'
)


def discover(denoiser: nn.Module) -> DenoiserSpec:
    """Propose a spec for a denoiser by the conventions of diffusers.

    The first argument is taken for x_t. Attention blocks, adaLN projections and the prompt are found by what diffusers calls
    them. The proposal is a guess. Read it before you use it: `agd_fast.attach(model, spec=agd_fast.discover(denoiser))`. What
    only a pipeline tells (sign, convention of ω, order of the conditional half) stays at the defaults of `PipelineSpec`.
    Raises: ValueError if there is no timestep argument or no attention block.
    """
    parameters = forward_parameters(denoiser)
    timestep = next((name for name in _TIMESTEPS if name in parameters), None)
    attention = tuple(site for name, module in denoiser.named_modules() if (site := _attention_site(name, module)))
    modulation = tuple(Site(name) for name, module in denoiser.named_modules() if _is_adaln(denoiser, name, module))
    if timestep is None or not attention:
        missing = "a timestep argument" if timestep is None else "attention blocks (modules with to_q and to_out)"
        raise ValueError(
            f"expected {missing} in {type(denoiser).__name__}, whose forward takes {list(parameters)}, found none; describe it "
            f"by hand, as in {EXAMPLE}"
        )
    width = _prompt_width(denoiser)
    conditions = (Condition(_PROMPT, width=width),) if _PROMPT in parameters and width else ()
    kind = "modulation" if modulation else "cross_attention" if conditions else "offset"
    return DenoiserSpec(parameters[0], timestep, conditions, attention=attention, modulation=modulation, adapter_kind=kind)


def _attention_site(name: str, module: nn.Module) -> Site | None:
    query, out = getattr(module, "to_q", None), getattr(module, "to_out", None)
    if isinstance(out, (nn.Sequential, nn.ModuleList)) and len(out):
        out = out[0]
    if not isinstance(query, nn.Linear) or not isinstance(out, nn.Linear):
        return None
    known, _ = module_widths(module)
    return Site(name) if known else Site(name, width=out.out_features, input_width=query.in_features)


def _is_adaln(denoiser: nn.Module, name: str, module: nn.Module) -> bool:
    """A linear of one of diffusers' adaptive norms: it turns the conditioning vector into shifts, scales and gates."""
    parent, _, leaf = name.rpartition(".")
    return isinstance(module, nn.Linear) and leaf == "linear" and "AdaLayerNorm" in type(denoiser.get_submodule(parent)).__name__


def _prompt_width(denoiser: nn.Module) -> int | None:
    config: Any = getattr(denoiser, "config", {})
    for name in _PROMPT_WIDTHS:
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None
