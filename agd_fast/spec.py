"""What AGD must know about a denoiser, as declarative data.

A `DenoiserSpec` names arguments and module paths and contains no code, so a new backbone is a data entry and not a subclass. The
entries that ship with the package are in `agd_fast.families`; for any other `nn.Module`, pass a spec of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SiteForm = Literal["add", "scale", "affine"]
Tokens = Literal["all", "first", "last"]
Place = Literal["first", "last"]


@dataclass(frozen=True)
class Site:
    """Where an adapter acts: on the output of every module whose name matches `path`, or on one of the module's arguments.

    path: glob over the names of `denoiser.named_modules()`; `*` also crosses dots. If a module's batch is a multiple of the
        denoiser's, the entries of one sample must follow one another in it.
    width: number of channels C of what is changed. None reads it off the module (linears, norms, diffusers' attention). A string
        names a parameter with as many elements, such as the "scale_shift_table" that is added to an argument; modules without
        this parameter do not match.
    input_width: number of channels of the module's first argument, for adapters that see it; None means the same as `width`.
    form: "add" adds δ [B, C]. "scale" computes output·(1 + δ), like the γ of a norm. "affine" computes output·(1 + δ_γ) + δ_β,
        like the (γ, β) of a norm.
    channel_dim: dimension of C in the output: −1 if channels come last, as in tokens, or 1 for [B, C, H, W].
    output: index of the element to change if the module returns a tuple.
    hidden: name of the module's first argument, for calls that pass it by keyword.
    argument: name of the argument to change instead of the output, such as the conditioning vector that a block receives. Its
        last dimension, or its last two together, must have C channels.
    tokens: which tokens belong to the image if a sequence holds image and text tokens: the "first" or the "last", as many as the
        denoiser's input has patches. Text tokens are left alone.
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
    embedding: names of the base's own modules, applied in turn, that turn it into e_c [B, D] or [B, L, D]. If empty, the argument
        is used as it is; tokens in several dimensions [B, L, K, D] count as one sequence.
    null: the unconditional value: a number, "config.<attribute>" read off the denoiser, or "same" if it does not differ from the
        conditional value. None if the caller must give it (`Teacher(null_condition=...)`).
    width: number of channels of e_c: a number or "config.<attribute>", or several of these, of which the first one that is set
        counts. None finds it out by embedding the label 0.
    adapt: whether adapters see it; False only passes it through.
    mask: name of the argument that tells tokens from padding [B, L], or that says how many tokens there are [B], if the denoiser
        takes one.
    mask_dim: dimension of the condition that the mask refers to, if tokens lie in several dimensions.
    grouped: whether it has several consecutive entries per sample, such as one per frame; adapters see the first of them.
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
    """How the pipelines of diffusers apply guidance to a denoiser.

    components: names of the pipeline's denoisers; each one gets an adapter.
    omega_arguments: names of the call's arguments that carry the guidance scale, one per component. If there are fewer arguments
        than components, the last argument also serves the remaining components.
    cfg_off_value: the highest guidance scale at which the pipeline makes only one forward pass per step.
    conditional: whether the conditional prediction is the "first" or the "last" one: of the two halves of a doubled batch, or of
        two successive forward passes.
    negative_prompt: the negative prompt to pass if guidance does not run without one and the caller gives none.
    own_negative: whether giving no negative prompt differs from giving an empty one, because the pipeline then uses a text of its
        own or zeros. A tuple lists where this is true: names of pipelines, or "config.<attribute>" for pipelines whose config
        says so.
    guider: name of the component that holds the guidance scale, if the pipeline has a guider instead of an argument; or names of
        several, of which a call uses one.
    pictures: whether the output consists of pictures, or of videos; False for sound.
    batched: whether a guided call takes several prompts, in lists; False if it takes one prompt and one generator.
    """

    components: tuple[str, ...] = ("transformer",)
    omega_arguments: tuple[str, ...] = ("guidance_scale",)
    cfg_off_value: float = 1.0
    conditional: Place = "last"
    negative_prompt: str | None = None
    own_negative: bool | tuple[str, ...] = False
    guider: str | tuple[str, ...] | None = None
    pictures: bool = True
    batched: bool = True

    @property
    def guiders(self) -> tuple[str, ...]:
        return (self.guider,) if isinstance(self.guider, str) else self.guider or ()


@dataclass(frozen=True)
class DenoiserSpec:
    """How a denoiser is called and where its blocks are.

    sample, timestep: names of the arguments for the noisy input x_t [B, C, ...] and for t [B].
    conditions: its conditioning arguments.
    time_embedding: names of the base's own modules, applied in turn, that turn t into e_t [B, D]. If empty, sinusoidal features
        of t are used.
    timestep_scale: factor that brings t to the range 0 … 1000; used for those features, and to find the scheduler's timestep that
        a t belongs to.
    timestep_ascends: whether t grows with the noise, as a scheduler's timesteps do; False if it is 1000 minus these.
    patch: edge length of a patch in the denoiser's input: a number, one number per dimension, or "config.<attribute>". Needed for
        sites that hold image and text tokens.
    listed: names of arguments that are a list with one tensor per sample.
    repeated: names of arguments that are a list with one entry per sample that is not a tensor, such as its sizes; the entry is
        the same for all samples of a run.
    batch_dims: for arguments whose batch is not their first dimension, by (dotted) name: the batch dimension, or None if all
        samples share the argument. A name also covers everything inside it.
    attention, feed_forward, convolution: blocks to which residual adapters are added.
    modulation: conditioning sites that modulation adapters change.
    train_mode: globs over the names of modules that pass no gradients in eval mode, such as a mixture of experts. Each of them is
        in train mode while an adapter is trained; the modules inside it are not.
    adapter_kind: kind of adapter to use if a config names none.
    guided_channels: number of leading output channels that CFG guides; "config.<attribute>" is read off the denoiser, None means
        all. The remaining channels (a learned variance) stay as the conditional pass gives them.
    prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction"; None takes the scheduler's.
    omega_offset: ω = guidance_scale + omega_offset, where ω = 1 is no guidance; 1.0 for families that write cond + g·(cond −
        uncond).
    pipeline: how the pipelines of diffusers apply its guidance.
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
    train_mode: tuple[str, ...] = ()
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
        """The ω above which the pipelines guide: more than 1 if the smallest scale by which they guide has a larger ω."""
        return self.pipeline.cfg_off_value + self.omega_offset

    @property
    def grouped(self) -> tuple[str, ...]:
        """Names of the arguments that have several entries per sample."""
        return tuple(condition.argument for condition in self.conditions if condition.grouped)

    def batch_dim(self, name: str) -> int | None:
        """The batch dimension of an argument, by (dotted) name; None if all samples share the argument."""
        while name and name not in self.batch_dims:
            name = name.rpartition(".")[0]
        return self.batch_dims[name] if name else 0
