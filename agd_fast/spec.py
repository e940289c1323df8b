"""What AGD must know about a denoiser, said declaratively.

A `DenoiserSpec` names arguments and module paths; nothing in it is code, so a new backbone is an entry,
not a subclass. The entries that ship are in `agd_fast.families`; any `nn.Module` can bring its own.
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
    own_negative: whether no negative prompt is something else there than an empty one: a text of the pipeline's own, or zeros; or
        names of those of which it is true: pipelines, or "config.<attribute>" where that says so.
    guider: name of the component that holds the guidance scale, where the pipeline has a guider instead of an argument; or of
        several, of which a call uses one.
    pictures: whether its output is pictures, or videos of them; False for sound.
    batched: whether a guided call takes several prompts, in lists; False where it is one, and one generator.
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
    train_mode: modules, by globs over their names, that let no gradients through in eval mode, such as a mixture of experts: each
        by itself, without those inside of it, is in train mode while an adapter is trained.
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
