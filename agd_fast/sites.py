"""What a spec names, found in one denoiser: modules, their widths in channels, entries of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn

from agd_fast.spec import Condition, Site, SiteForm, Tokens


@dataclass(frozen=True)
class ResolvedSite:
    """A site found in one denoiser: a module's full name and its widths in channels."""

    path: str
    width: int
    input_width: int
    form: SiteForm
    channel_dim: int
    output: int
    hidden: str
    argument: str | None = None
    tokens: Tokens = "all"


@dataclass(frozen=True)
class Layout:
    """All that the shapes of an adapter depend on; stored beside its weights.

    sites: by kind of adapter, in the order of the denoiser's modules. time_width: channels of e_t.
    condition_widths: channels of e_c by argument.
    """

    sites: Mapping[str, tuple[ResolvedSite, ...]]
    time_width: int
    condition_widths: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Layout:
        sites = {kind: tuple(ResolvedSite(**site) for site in found) for kind, found in value["sites"].items()}
        return cls(sites, int(value["time_width"]), dict(value["condition_widths"]))


def resolve_sites(denoiser: nn.Module, sites: tuple[Site, ...]) -> tuple[ResolvedSite, ...]:
    """Find every module that `sites` name, in the denoiser's own order.

    Raises: ValueError when a path matches nothing or a width is unknown or wrong.
    """
    found: dict[str, ResolvedSite] = {}
    for site in sites:
        for name, module in _matching(denoiser, site).items():
            width, input_width = _widths(name, module, site)
            found[name] = ResolvedSite(
                name,
                width,
                input_width,
                site.form,
                site.channel_dim,
                site.output,
                site.hidden,
                site.argument,
                site.tokens,
            )
    return tuple(found[name] for name, _ in denoiser.named_modules() if name in found)


def find_modules(denoiser: nn.Module, path: str) -> dict[str, nn.Module]:
    """The denoiser's modules by name, where the name matches the glob `path`.

    Raises: ValueError when there is none, naming the nearest.
    """
    modules = dict(denoiser.named_modules())
    matches = {name: module for name, module in modules.items() if fnmatchcase(name, path)}
    if not matches:
        nearest = get_close_matches(path, [name for name in modules if name], n=4, cutoff=0.3)
        raise ValueError(
            f"no module of {type(denoiser).__name__} matches the path {path!r}; "
            f"modules nearest to it: {', '.join(nearest) or 'none'}"
        )
    return matches


def _matching(denoiser: nn.Module, site: Site) -> dict[str, nn.Module]:
    found = find_modules(denoiser, site.path)
    if not isinstance(site.width, str):
        return found
    having = {name: module for name, module in found.items() if site.width in dict(module.named_parameters())}
    if not having:
        raise ValueError(
            f"expected a parameter {site.width!r} at {site.path!r} to read a width off, found none at {list(found)[:4]}"
        )
    return having


def _widths(name: str, module: nn.Module, site: Site) -> tuple[int, int]:
    if isinstance(site.width, str):
        elements = module.get_parameter(site.width).numel()
        return elements, site.input_width or elements
    width, input_width = (None, None) if site.argument else module_widths(module)
    for what, declared, read in (("width", site.width, width), ("input_width", site.input_width, input_width)):
        if declared is not None and read is not None and declared != read:
            raise ValueError(
                f"width mismatch at {name!r}: the spec says {what}={declared}, the {type(module).__name__} there has {read}"
            )
    width = site.width if width is None else width
    if width is None:
        raise ValueError(
            f"the width of {name!r} cannot be read off a {type(module).__name__}; "
            f"expected Site({site.path!r}, width=...) in the spec"
        )
    return width, site.input_width or input_width or width


def module_widths(module: nn.Module) -> tuple[int | None, int | None]:
    """Output and input channels of a module, None where they are unknown."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1], module.normalized_shape[-1]
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, module.num_channels
    out_dim, query_dim = getattr(module, "out_dim", None), getattr(module, "query_dim", None)
    if isinstance(out_dim, int) and isinstance(query_dim, int):  # diffusers' Attention
        return out_dim, query_dim
    if isinstance(module, FeedForward):
        linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
        return linears[-1].out_features, linears[0].in_features
    return None, None


def config_value(denoiser: nn.Module, value: Any) -> Any:
    """`value`, or the entry that it names if it is a string "config.<attribute>" or, for a list, "config.<attribute>.<index>"."""
    if isinstance(value, str) and value.startswith("config."):
        found: Any = getattr(denoiser, "config", {})
        for name in value.split(".")[1:]:
            found = _entry(found, name)
        if found is None:
            raise ValueError(f"the spec names {value}, but {type(denoiser).__name__} has no such entry in its config")
        return found
    return value


def _entry(found: Any, name: str) -> Any:
    if isinstance(found, Mapping):
        return found.get(name)
    if isinstance(found, (list, tuple)) and name.isdigit():
        return found[int(name)] if int(name) < len(found) else None
    return getattr(found, name, None)


def label_count(denoiser: nn.Module, condition: Condition) -> int | None:
    """How many labels the base can look up, including its null label; None if the condition is not a label."""
    for name in condition.embedding:
        for module in find_modules(denoiser, name)[name].modules():
            if isinstance(module, nn.Embedding):
                return module.num_embeddings
    return None


def apply_modules(denoiser: nn.Module, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """Pass `x` through the base's modules `names` in turn, each in its own dtype."""
    for name in names:
        module = denoiser.get_submodule(name)
        if x.is_floating_point() and list(module.parameters()):
            x = x.to(get_parameter_dtype(module))  # what it computes in, under layerwise casting too
        x = module(x)
    return x
