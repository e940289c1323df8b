"""What AGD must know about a denoiser, said declaratively.

A `DenoiserSpec` names arguments and module paths; nothing in it is code, so a new backbone is an entry,
not a subclass. The entries that ship are in `agd_fast.families`; any `nn.Module` can bring its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn

SiteForm = Literal["add", "scale", "affine"]
Tokens = Literal["all", "first", "last"]
Place = Literal["first", "last"]


@dataclass(frozen=True)
class Site:
    """Where an adapter acts: the output of every module whose name matches `path`, or one of its arguments.

    path: glob over the names of `denoiser.named_modules()`; `*` also crosses dots. Where a module's batch is a multiple of the
        denoiser's, the entries of a sample follow one another in it.
    width: channels C of what is changed; None reads it off the module (linears, norms, diffusers' attention). A string names
        a parameter that has as many elements, such as the "scale_shift_table" that is added to an argument; modules without it
        do not match.
    input_width: channels of its first argument, for adapters that see it; None means as `width`.
    form: "add" adds δ [B, C]; "scale" computes output·(1 + δ), the γ of a norm; "affine" output·(1 + δ_γ) + δ_β, its (γ, β).
    channel_dim: dimension of C in the output: −1 for tokens last, 1 for [B, C, H, W].
    output: which element to change where the module returns a tuple.
    hidden: name of the first argument where it is passed by keyword.
    argument: name of the argument to change instead of the output, such as the conditioning vector that a block is handed.
        Its last dimension, or its last two together, has C channels.
    tokens: which tokens of a sequence that holds both are the image's: the "first" or "last", as many as the denoiser's input
        has patches. Those of the text are left alone.
    """

    path: str
    width: int | str | None = None
    input_width: int | None = None
    form: SiteForm = "add"
    channel_dim: int = -1
    output: int = 0
    hidden: str = "hidden_states"
    argument: str | None = None
    tokens: Tokens = "all"


@dataclass(frozen=True)
class Condition:
    """A conditioning argument c of the denoiser, batch first.

    argument: its name; a dot reaches into a dict argument ("added_cond_kwargs.text_embeds").
    embedding: names of the base's own modules applied in turn to get e_c [B, D] or [B, L, D]; empty
        takes the argument as it is, tokens in several dimensions [B, L, K, D] as one sequence.
    null: the unconditional value: a number, "config.<attribute>" read off the denoiser, or "same" where it does not
        differ; None when the caller must give one (`Teacher(null_condition=...)`).
    width: channels of e_c, a number or "config.<attribute>", or several of these of which the first that is set counts; None
        finds out by embedding the label 0.
    adapt: whether adapters see it; False only passes it through.
    mask: argument that tells its tokens from padding, [B, L], or how many they are, [B], where the denoiser takes one.
    mask_dim: which of its dimensions the mask is of, where tokens lie in several.
    grouped: whether it has several entries a sample, one after another, such as one a frame; adapters see the first.
    """

    argument: str
    embedding: tuple[str, ...] = ()
    null: int | float | str | None = None
    width: int | str | tuple[str, ...] | None = None
    adapt: bool = True
    mask: str | None = None
    mask_dim: int = 1
    grouped: bool = False


@dataclass(frozen=True)
class PipelineSpec:
    """How diffusers' pipelines run the guidance of a denoiser.

    components: names of the pipeline's denoisers; each gets an adapter. omega_arguments: arguments of the pipeline's call that
        carry the guidance scale, one a component; the last serves those that are left. cfg_off_value: the highest scale at
        which the pipeline makes one forward a step.
    conditional: whether the conditional prediction is the "first" or the "last": of the halves of a doubled batch, or of two
        forwards one after another.
    negative_prompt: what to pass where guidance does not run without one and the caller gives none.
    own_negative: whether the pipeline itself has a text there that is not empty.
    guider: name of the component that holds the guidance scale, where the pipeline has a guider instead of an argument; or of
        several, of which a call uses one.
    pictures: whether its output is pictures, or videos of them; False for sound.
    """

    components: tuple[str, ...] = ("transformer",)
    omega_arguments: tuple[str, ...] = ("guidance_scale",)
    cfg_off_value: float = 1.0
    conditional: Place = "last"
    negative_prompt: str | None = None
    own_negative: bool = False
    guider: str | tuple[str, ...] | None = None
    pictures: bool = True

    @property
    def guiders(self) -> tuple[str, ...]:
        return (self.guider,) if isinstance(self.guider, str) else self.guider or ()


@dataclass(frozen=True)
class DenoiserSpec:
    """How a denoiser is called and where its blocks are.

    sample, timestep: argument names of the noisy input x_t [B, C, ...] and of t [B].
    conditions: its conditioning arguments.
    time_embedding: names of the base's own modules applied in turn to t to get e_t [B, D]; empty uses
        sinusoidal features of t.
    timestep_scale: t · timestep_scale runs over 0 … 1000; for those features.
    timestep_ascends: whether t grows with the noise, as a scheduler's timesteps do; False where it is 1000 less these.
    patch: edge of a patch in the denoiser's input, "config.<attribute>" or a number or one a dimension; for sites that hold
        image and text tokens.
    listed: arguments that are a list with one tensor a sample.
    repeated: arguments that are a list with one entry a sample which is no tensor, such as its sizes; all of a run have the same.
    batch_dims: arguments, by (dotted) name, whose batch is another dimension than the first; None for those that all samples
        share. A name stands for all that is inside of it.
    attention, feed_forward, convolution: blocks that residual adapters are added to.
    modulation: conditioning sites that modulation adapters move.
    adapter_kind: of an adapter whose config names none.
    guided_channels: leading output channels that CFG guides; "config.<attribute>" is read off the denoiser, None means all.
        Channels after them (a learned variance) are left as the conditional pass gives them.
    prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction"; None takes the scheduler's.
    omega_offset: ω = guidance_scale + omega_offset, where ω = 1 is no guidance; 1.0 for families that
        write cond + g·(cond − uncond).
    pipeline: how the pipelines of diffusers run its guidance.
    """

    sample: str = "sample"
    timestep: str = "timestep"
    conditions: tuple[Condition, ...] = ()
    time_embedding: tuple[str, ...] = ()
    timestep_scale: float = 1.0
    timestep_ascends: bool = True
    patch: int | tuple[int, ...] | str = 1
    listed: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)
    attention: tuple[Site, ...] = ()
    feed_forward: tuple[Site, ...] = ()
    convolution: tuple[Site, ...] = ()
    modulation: tuple[Site, ...] = ()
    adapter_kind: str = "modulation"
    guided_channels: int | str | None = None
    prediction_type: str | None = None
    omega_offset: float = 0.0
    pipeline: PipelineSpec = PipelineSpec()

    @property
    def adapted(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if condition.adapt)

    @property
    def guides_above(self) -> float:
        """The ω above which the pipelines guide: more than 1 where the smallest scale that they guide by has a larger ω."""
        return self.pipeline.cfg_off_value + self.omega_offset

    @property
    def grouped(self) -> tuple[str, ...]:
        """Names of the arguments that have several entries a sample."""
        return tuple(condition.argument for condition in self.conditions if condition.grouped)

    def batch_dim(self, name: str) -> int | None:
        """Which dimension of an argument, by (dotted) name, is the batch; None where all samples share it."""
        while name and name not in self.batch_dims:
            name = name.rpartition(".")[0]
        return self.batch_dims[name] if name else 0


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
    """Output and input channels of a module, None where they cannot be told."""
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
    """`value`, or what it names when it is a string "config.<attribute>", or, in a list there, "config.<attribute>.<index>"."""
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


def device_of(module: nn.Module) -> torch.device:
    """Where its forward runs: in between, what accelerate offloads by modules lies on "meta", diffusers' groups on the CPU."""
    device = next(module.parameters()).device
    if device.type == "cpu":
        for inner in module.modules():
            registry = vars(inner).get("_diffusers_hook")
            if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
                return hook.config.onload_device
    if device.type == "meta":
        for inner in module.modules():
            if (found := getattr(getattr(inner, "_hf_hook", None), "execution_device", None)) is not None:
                return torch.device(found)
    return device


def label_count(denoiser: nn.Module, condition: Condition) -> int | None:
    """How many labels the base can look up, its null label among them; None where the condition is no label."""
    for name in condition.embedding:
        for module in find_modules(denoiser, name)[name].modules():
            if isinstance(module, nn.Embedding):
                return module.num_embeddings
    return None


def apply_modules(denoiser: nn.Module, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """Pass `x` through the base's modules `names` in turn, each in its own dtype."""
    for name in names:
        module = denoiser.get_submodule(name)
        if x.is_floating_point() and next(module.parameters(), None) is not None:
            x = x.to(get_parameter_dtype(module))  # what it computes in, under layerwise casting too
        x = module(x)
    return x


def prediction_type_of(scheduler: Any) -> str:
    """What the denoiser predicts under a diffusers scheduler; those of flow matching do not say it."""
    return getattr(scheduler.config, "prediction_type", None) or "flow_prediction"


def forward_parameters(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the denoiser's forward parameters, in positional order."""
    return tuple(inspect.signature(denoiser.forward).parameters)


def required_parameters(denoiser: nn.Module) -> frozenset[str]:
    """Names of the denoiser's forward parameters that have no default."""
    parameters = inspect.signature(denoiser.forward).parameters.items()
    return frozenset(name for name, one in parameters if one.default is one.empty)


def argument_of(name: str, parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value of a (dotted) name in a call of a forward with these parameters; None where it is not passed."""
    outer, _, inner = name.partition(".")
    position = parameters.index(outer) if outer in parameters else len(args)
    value = kwargs[outer] if outer in kwargs else args[position] if position < len(args) else None
    return value.get(inner) if inner and value is not None else value


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the denoiser from values by (dotted) name; where the inner names are numbers they are a list's."""
    arguments: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        outer, _, rest = name.partition(".")
        if rest:
            inner.setdefault(outer, {})[rest] = value
        else:
            arguments[outer] = value
    for outer, found in inner.items():
        nested = nest(found)
        arguments[outer] = [nested[key] for key in sorted(nested, key=int)] if all(map(str.isdigit, nested)) else nested
    return arguments
