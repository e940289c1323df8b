"""Writes docs/families.md: what the specs say, and what the tiny pipelines of the tests do when they are run.

python docs/make_families.py [path]
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
PAGE = DOCS / "families.md"
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    FluxTransformer2DModel,
    Ideogram4Transformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)

import agd_fast as agd  # noqa: E402
from agd_fast.attaching import components_of, own_call, spec_of, uncompiled  # noqa: E402
from agd_fast.families import SPECS, VARIANTS  # noqa: E402
from agd_fast.pipelines import PipelineTeacher  # noqa: E402
from agd_fast.pipelines.record import Recorder, Step  # noqa: E402
from agd_fast.spec import Condition, DenoiserSpec, Site  # noqa: E402
from tiny import FAMILIES, TinyFamily, sd15  # noqa: E402

STANDARD = "ε(∅) + ω·(ε(c) − ε(∅))"
RESCALED = "that, times ‖ε(c)‖ / ‖·‖ along the last dimension"
BY_CHANNELS = "that, times ‖ε(c)‖ / ‖·‖ along the channels"
SHORTENED = "that, times min(1, ‖ε(c)‖ / ‖·‖) along the last dimension"
LEARNED_SIGMA = f"{STANDARD} beside a learned sigma as ε(c) has it"
OTHER = "another rule"
COLUMNS = (
    "denoiser",
    "pipelines that tests run",
    "ω is",
    "no guidance at",
    "default adapter",
    "it sees",
    "recorded target",
    "by",
)
KINDS = ("modulation", "attention", "feed_forward", "convolution")

# what the table cannot show; said where a pipeline departs from the standard combination or may be asked to
REMARKS = {
    "AudioLDM2UNet2DConditionModel": (
        "ε(∅) is that of an empty prompt, through both encoders and the language model. This goes on behind the padding of a "
        "prompt, so that a prompt beside a longer one is not what it is alone. What speech is to say is given beside the prompt: "
        "`inputs={'prompt': [...], 'transcription': [...]}`."
    ),
    "BriaFibo2Transformer2DModel": (
        "The pipeline's default negative prompt is not empty: ε(∅) is that of this text. Captions that ask for text to be drawn "
        "change the condition from step to step: they are refused, unless `call={'render_text_images': False}`."
    ),
    "BriaTransformer2DModel": "ε(∅) is that of zeros, where no negative prompt is given.",
    "CogVideoXTransformer3DModel": (
        "`use_dynamic_cfg=True` makes ω a function of t, and the recorded target follows it; see [limits](limits.md)."
    ),
    "CosmosTransformer3DModel": (
        "Cosmos 2.5. The pipeline writes ε(c) + g·(ε(c) − ε(∅)), which is the standard combination at ω = g + 1, and guides for "
        "g > 1 alone: targets begin above ω = 2, and smaller scales are no guidance, as without an adapter. Its default negative "
        "prompt is not empty: ε(∅) is that of this text. A picture or video to begin with takes the place of a part of the "
        "prediction: such calls are no teacher. t is σ, which the scheduler's timesteps are rounded of, so that the engine "
        "computes what depends on it in each step."
    ),
    "DiTTransformer2DModel": "The ε channels alone are guided; the learned sigma is as the conditional pass gives it.",
    "EasyAnimateTransformer3DModel": (
        'Guidance needs a negative prompt; where none is given, `""` is passed. `guidance_rescale` is 0 by default. In `call=` '
        "it becomes a part of the target."
    ),
    "Flux2Transformer2DModel": (
        "FLUX.2 [klein] base has guidance. FLUX.2-dev has `guidance_embeds` and is refused, as is a pipeline with "
        "`is_distilled`, such as that of FLUX.2 [klein]."
    ),
    "FluxTransformer2DModel": (
        "Without `guidance_embeds`, as models whose guidance was not distilled or was undone: guidance runs only beside a "
        'negative prompt; where none is given, `""` is passed.'
    ),
    "HiDreamImageTransformer2DModel": (
        "The pipeline turns the sign of the prediction; the target is in the denoiser's own. In eval mode the routed experts run "
        "without gradients; see [limits](limits.md)."
    ),
    "HunyuanDiT2DModel": (
        "The learned sigma is dropped, then the rest is guided. `guidance_rescale` is 0 by default. In `call=` it becomes a part "
        "of the target."
    ),
    "HunyuanImageTransformer2DModel": (
        "The scale lies on two guiders, one for prompts with quotes; a scale in the call is for both. An adapter learns whatever "
        "rule they have; here it is `ClassifierFreeGuidance`. The published pipeline has `AdaptiveProjectedMixGuidance`, which "
        "adds up earlier steps and is refused: give it others by `pipe.register_modules(guider=..., ocr_guider=...)`."
    ),
    "HunyuanVideoTransformer3DModel": (
        "Without `guidance_embeds`, as SkyReels-V1: guidance runs only beside a negative prompt; where none is given, "
        '`""` is passed. `guidance_scale` is an input of guidance-distilled models, which are refused.'
    ),
    "HunyuanVideo15Transformer3DModel": (
        "The scale lies on the pipeline's guider. An adapter learns whatever rule that guider has; here it is "
        "`ClassifierFreeGuidance`."
    ),
    "JoyImageEditPlusTransformer3DModel": (
        "Always rescaled. Pictures to edit lie behind the new one in x_t, and are put back into it "
        "before each step; what is predicted for them is a part of the target that nobody reads."
    ),
    "JoyImageEditTransformer3DModel": (
        "Always rescaled. A picture to edit is put back into x_t before each step, as with Edit "
        "Plus; its latents are drawn from torch's own generator, which a call's `generator` does not set: distilling and "
        "evaluating seed it. Prompts have no mask in the denoiser, so that one beside a longer one is not what it is alone."
    ),
    "Kandinsky3UNet": (
        "The pipeline writes (g + 1)·ε(c) − g·ε(∅), which is the standard combination at ω = g + 1, and guides for g > 1 alone: "
        "targets begin above ω = 2, and smaller scales are no guidance, as without an adapter. ε(∅) is that of zeros, all of "
        "them masked, where no negative prompt is given. Prompts are pooled over their padding, so that one beside a longer one "
        "is not what it is alone."
    ),
    "Kandinsky5Transformer3DModel": "The pipeline's default negative prompt is not empty: ε(∅) is that of this text.",
    "Krea2Transformer2DModel": (
        "The pipeline writes ε(c) + g·(ε(c) − ε(∅)), which is the standard combination at ω = g + 1. One with `is_distilled` is "
        "refused."
    ),
    "LatteTransformer3DModel": (
        "All channels are guided, then those of the learned sigma are dropped. `mask_feature`, on by default, cuts the text of a "
        "single prompt to its length, and of several sets the padding to zero, so that a prompt is not what it is alone; with "
        "`call={'mask_feature': False}` it is."
    ),
    "LongCatImageTransformer2DModel": (
        "`enable_cfg_renorm` is on by default and only shortens; with `call={'enable_cfg_renorm': False}` the target is the "
        "standard one. `enable_prompt_rewrite`, on by default, lets a language model write the prompt anew for each run: switch "
        "it off, so that states of one prompt are of one text."
    ),
    "LongCatAudioDiTTransformer": (
        "ε(∅) is that of zeros, where no negative prompt is given. The base's convolutions over the text reach across its "
        "padding, so that a prompt beside a longer one is not what it is alone. t runs from 0 (noise) to 1. Described for "
        "`adaln_type='global'`, the default; others are an error on attaching."
    ),
    "LTXVideoTransformer3DModel": "`guidance_rescale` is 0 by default. In `call=` it becomes a part of the target.",
    "Lumina2Transformer2DModel": (
        "`cfg_normalization` is on by default; with `call={'cfg_normalization': False}` the target is the standard one. "
        "`cfg_trunc_ratio` ends guidance early; the target is then ε(c)."
    ),
    "LuminaNextDiT2DModel": (
        "The first three channels are guided, the fourth is as the conditional pass gives it, and the learned sigma is dropped. "
        "The pipeline turns the sign of the prediction."
    ),
    "MochiTransformer3DModel": "t runs from 0 (noise) to 1000.",
    "MotifVideoTransformer3DModel": (
        "The scale lies on the pipeline's guider. An adapter learns whatever rule that guider has; here it is "
        "`ClassifierFreeGuidance`."
    ),
    "NucleusMoEImageTransformer2DModel": "Always rescaled. The pipeline turns the sign of the prediction.",
    "PixArtTransformer2DModel": "All channels are guided, then those of the learned sigma are dropped.",
    "QwenImageTransformer2DModel": (
        'Always rescaled. Guidance runs only beside a negative prompt; where none is given, `" "` is passed. '
        "`guidance_scale` is an input of guidance-distilled models, which are refused."
    ),
    "SD3Transformer2DModel": "`skip_guidance_layers` adds a third branch and is refused.",
    "SanaTransformer2DModel": "Sana-Sprint has `guidance_embeds` and is refused.",
    "SkyReelsV2Transformer3DModel": (
        "The pipelines of diffusion forcing (`SkyReelsV2DiffusionForcing…`) step a scheduler for each frame; they are not known."
    ),
    "StableAudio3DiTModel": (
        "ε(∅) is that of an empty prompt; the base attends to its padding, an embedding that it has learnt. Guidance is what the "
        "base checkpoints have; the distilled ones run without. The pipelines that begin with a sound or fill in one have none."
    ),
    "StableCascadeUNet": (
        "The prior's pipeline and the decoder's, each with an adapter of its own; of the combined one put it on `prior_pipe` and "
        "`decoder_pipe`. Guidance leaves out the prompt, and in the decoder the prior's latents as well; the decoder's default "
        "scale is none. Adapters see the pooled prompt alone, which both have. Diffusers no longer maintains these pipelines."
    ),
    "StableAudioDiTModel": "ε(∅) is that of zeros, where no negative prompt is given.",
    "UNet2DConditionModel": (
        "`guidance_rescale` is 0 by default. In `call=` it becomes a part of the target. With `class_embeddings_concat`, as "
        "AudioLDM 1 and MusicLDM have it, adapters see `class_labels`, the embedding of the whole text. MusicLDMPipeline does "
        "not run with the CLAP of transformers 5; it was given embeddings. DeepFloyd IF has blocks of its own and pixels: the "
        "first three channels are guided, the learned sigma is as the conditional pass gives it."
    ),
    "UNetMotionModel": (
        "The pipelines repeat the prompt for each frame. Where frames have prompts of their own (FreeNoise), adapters see that "
        "of the first."
    ),
    "WanTransformer3DModel": (
        "Wan 2.2 A14B has two denoisers, each with an adapter and a scale; the second scale is the first's where none is given."
    ),
    "ZImageTransformer2DModel": (
        "The pipeline writes ε(c) + g·(ε(c) − ε(∅)), which is the standard combination at ω = g + 1, and turns the sign of the "
        "prediction. `cfg_normalization` and `cfg_truncation` are off by default."
    ),
}


def main(path: Path = PAGE) -> None:
    path.write_text(page(), encoding="utf-8")


def page() -> str:
    with _quiet():
        tried = _tried()
        rows = [_row(name, spec, tried.get(name, [])) for name, spec in sorted(SPECS.items())]
        refused = [(what, _message(attempt)) for what, attempt in _refused()]
    sites = [[name, *(_sites(getattr(spec, kind)) for kind in KINDS)] for name, spec in sorted(_specs(), key=lambda one: one[0])]
    remarks = [f"- `{name}`: {text}" for name, text in sorted(REMARKS.items())]
    return PAGE_TEXT.format(
        families=_table(COLUMNS, rows),
        remarks="\n".join(remarks),
        sites=_table(("denoiser", *KINDS), sites),
        refused=_table(("what", "what the error says"), [[what, message] for what, message in refused]),
        tests=_tests(),
    )


PAGE_TEXT = """\
# Denoisers that are known

This page is written by `python docs/make_families.py`, from the specs in `agd_fast/families/` and from runs of the tiny pipelines
in `tests/tiny/`. These have diffusers' own classes and random weights. **No published weights and no GPU were used: how good an
adapter gets on these models is not measured yet**, but for the small DiT and UNet of the [README](../README.md).

{families}

How to read it:

- *ω is*: ω in terms of the guidance scale g, and the argument of the pipeline's call that carries g. ω = 1 is no guidance.
- *no guidance at*: the g at which the pipeline makes one forward a step. It is what the pipeline gets while an adapter is armed.
- *it sees*: what an adapter is conditioned on beside ω and t. "(masked)": it is told which tokens are padding.
- *recorded target*: what the pipeline's own guided run hands to its scheduler, in the denoiser's sign; found by running it and
  comparing. A recorded target is taken from there, so an adapter learns what the pipeline makes, whatever that is.
- *by*: what the tiny pipelines are given: text, which encoders with random weights encode; embeddings; or class labels.

{tests}

{remarks}

## Where adapters act

Globs over `denoiser.named_modules()`. An adapter adds to a module's output, unless something else is said: *γ* multiplies it
by 1 + δ; *γ, β* does that and adds; *on `x`* changes the argument `x` that the module is handed. *image first* and *image last*:
in a sequence of text and image tokens, those of the text are left alone.

{sites}

`modulation` acts on the first column; `gated_lora` on convolutions, or on attention and feed-forward where there are none;
`cross_attention` and `offset` on attention.

## What is refused

AGD makes one forward of two. A model that makes one already, because the guidance scale was distilled into it as an input, gains
nothing. Each of these was tried on a tiny model:

{refused}

`guidance_embeds` is what FLUX.1-dev, FLUX.2-dev, HunyuanVideo, its FramePack and Sana-Sprint have in their configs,
`time_cond_proj_dim` what LCM has and what was distilled like it. InstructPix2Pix guides by three branches, with a scale for each
of two.

Image models of diffusers that run guidance and are not in the table, because of how their pipelines call them:

- Ideogram 4: the unconditional prediction is another model's, and is made at every scale.
- OmniGen: both predictions are made at every scale; with pictures in the prompt there are three.
- DreamLite: a second scale, for the picture that is edited, is a third branch.
- Qwen-Image 2.1: keys and values of the text are kept from the first step on, so that later steps are called otherwise.
- GLM-Image: an autoregressive model writes tokens first, and what is kept of pictures is handed to the denoiser as an object.
- PRX: with guidance the pipeline of diffusers 0.42 runs one prompt a call, and fails with several.
- FLUX.3: has Modular Diffusers' blocks and no pipeline.

Models of video and sound, for the same reason, and U-Nets whose blocks are others than those of their class in the table:

- LTX-2 and Kandinsky 6: video and sound are predicted, guided and stepped side by side; by default LTX-2 guides by four branches.
- Cosmos: Cosmos 1 steps its scheduler twice a step; what Cosmos 2 hands to it is mixed with x_t, as what Cosmos 2.5 does with a
  picture or video to begin with.
- Wan VACE: takes one prompt and one generator a call.
- ModelScope's text to video (UNet3DConditionModel): the frames of all videos are the batch that is handed to the scheduler.
- ACE-Step: guidance has momentum, so that it depends on the steps before.
- Helios: makes one chunk of the video after another, each from those before. AnyFlow: is told at each step which t comes next.
- Kandinsky 2.x: a UNet2DConditionModel with the blocks of DeepFloyd IF, conditioned on embeddings of pictures that a prior makes;
  not described yet.

Not recognised, because nothing in their configs tells: models that were distilled to few steps and are called without guidance,
such as SDXL-Turbo, SDXL-Lightning, FLUX.1-schnell, Z-Image-Turbo or Stable Audio 3 but for its base checkpoints. An adapter can
be attached to them, but there is no second forward to save.
"""


def _specs() -> Iterator[tuple[str, DenoiserSpec]]:
    """Every spec, by what it is of."""
    for name, spec in SPECS.items():
        yield f"`{name}`", spec
        for entry, variant in VARIANTS.get(name, {}).items():
            yield f"`{name}` with `{entry}`", variant


def _tried() -> dict[str, list[tuple[str, TinyFamily, Any, str | None]]]:
    """By denoiser class: name, family, pipeline and recorded target of every tiny pipeline that has it."""
    found: dict[str, list[tuple[str, TinyFamily, Any, str | None]]] = {}
    for name, family in FAMILIES.items():
        pipe = family.pipeline()
        components = components_of(pipe, spec_of(pipe))
        targets = {target_of(pipe, family, component) for component in components}
        entry = (name, family, pipe, "; ".join(sorted(targets)))
        found.setdefault(_class_of(components), []).append(entry)
    for name, family in _siblings().items():
        pipe = family.pipeline()
        found.setdefault(_class_of(components_of(pipe, spec_of(pipe))), []).append((name, family, pipe, None))
    return found


def _siblings() -> dict[str, TinyFamily]:
    """Further pipelines of a family's denoiser, such as image to image."""
    found: dict[str, TinyFamily] = {}
    for path in sorted((TESTS / "tiny").glob("[a-z]*.py")):
        found |= getattr(import_module(f"tiny.{path.stem}"), "SIBLINGS", {})
    return found


def _class_of(components: dict[str, Any]) -> str:
    (name,) = {
        next(cls.__name__ for cls in type(uncompiled(component)).__mro__ if cls.__name__ in SPECS)
        for component in components.values()
    }
    return name


def target_of(pipe: Any, family: TinyFamily, component: str) -> str:
    """Which combination of ε(∅) and ε(c) the pipeline's guided run hands to its scheduler."""
    inputs, spec = family.inputs(1), spec_of(pipe)
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    teacher = PipelineTeacher.of(pipe, component, inputs=inputs, call=call)
    omega = next(iter(family.guided.values())) + family.omega_offset
    names: set[str] = set()

    def visit(step: Step) -> torch.Tensor:
        names.add(_rule(teacher, step, omega))  # here, as a pipeline may write the next step into the same tensor
        return step.guided

    arguments = {**inputs, **family.call, **family.guided, "num_inference_steps": 4}
    if len(family.guided) > 1 and component == "transformer_2":
        omega = family.guided["guidance_scale_2"]
    with torch.no_grad():
        Recorder(pipe, teacher.denoiser, spec, 1, visit, teacher.ask_what_is_handed(0)).run(
            lambda: own_call(pipe, spec)(**arguments, generator=torch.Generator().manual_seed(0))
        )
    return names.pop() if len(names) == 1 else OTHER


def _rule(teacher: PipelineTeacher, step: Step, omega: float) -> str:
    if step.unconditional is None:
        return OTHER
    conditional, unconditional = (
        teacher.predict(call.sample, call.timestep, {**call.rows, **call.constants})
        for call in (step.conditional, step.unconditional)
    )
    plain = unconditional + omega * (conditional - unconditional)
    ratio = conditional.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)
    half = (plain.shape[1] + 1) // 2
    by_channels = conditional.norm(dim=2, keepdim=True) / plain.norm(dim=2, keepdim=True)
    rules = (
        (STANDARD, plain),
        (RESCALED, plain * ratio),
        (SHORTENED, plain * ratio.clamp(max=1)),
        (BY_CHANNELS, plain * by_channels),
        (LEARNED_SIGMA, torch.cat([plain[:, :half], conditional[:, half:]], dim=1)),
    )
    for name, expected in rules:
        guided = step.guided[:, : expected.shape[1]]
        if (guided - expected).abs().max() < 1e-4 * expected.abs().max():
            return name
    return OTHER


def _row(name: str, spec: DenoiserSpec, tried: list[tuple[str, TinyFamily, Any, str | None]]) -> list[str]:
    pipelines: dict[str, list[str]] = {}
    for label, _, pipe, _ in tried:
        pipelines.setdefault(type(pipe).__name__, []).append(label)
    targets = sorted({target for *_, target in tried if target is not None})
    offset = f"g + {spec.omega_offset:g}" if spec.omega_offset else "g"
    arguments = " and ".join(f"`{argument}`" for argument in spec.pipeline.omega_arguments)
    if spec.pipeline.guiders:
        holders = " and ".join(f"`pipe.{guider}`" for guider in spec.pipeline.guiders)
        arguments += f" of {holders}, as an argument once an adapter is on"
    return [
        f"`{name}`",
        "; ".join(f"{cls} ({', '.join(labels)})" for cls, labels in pipelines.items()) or "none",
        f"{offset}: {arguments}",
        f"{spec.pipeline.cfg_off_value:g}",
        f"`{spec.adapter_kind}`",
        ", ".join(map(_condition, spec.adapted)) or "nothing",
        "; ".join(targets) or "not run",
        "; ".join(dict.fromkeys(_encoded(family, pipe) for _, family, pipe, _ in tried)) or "nothing",
    ]


def _condition(condition: Condition) -> str:
    return f"`{condition.argument}`" + (" (masked)" if condition.mask else "")


def _encoded(family: TinyFamily, pipe: Any) -> str:
    if "class_labels" in family.inputs(1):
        return "class labels"
    encoders = [name for name, module in pipe.components.items() if name.startswith("text_encoder") and module is not None]
    if "prompt" not in family.inputs(1) or not encoders:
        return "embeddings"
    return "text" if len(encoders) == 1 else f"text by {len(encoders)} encoders"


def _sites(sites: tuple[Site, ...]) -> str:
    return "<br>".join(map(_site, sites)) or "–"


def _site(site: Site) -> str:
    said = [f"on `{site.argument}`"] if site.argument else []
    said += {"add": [], "scale": ["γ"], "affine": ["γ, β"]}[site.form]
    said += [] if site.tokens == "all" else [f"image {site.tokens}"]
    return f"`{site.path}`" + (f" ({'; '.join(said)})" if said else "")


def _tests() -> str:
    """Which files run what."""
    over_all = ", ".join(f"`tests/{path.name}`" for path in sorted(TESTS.glob("test_families*.py")))
    siblings = ", ".join(f"`{name}`" for name in _siblings())
    return (
        f"The names in brackets are those of the pipelines in `tests/tiny/`. Every test of a family ({over_all}) "
        f"runs them, but for {siblings}: these have the denoiser of another, or its class, and fewer tests.\n\n"
        "What a pipeline does beyond the table:"
    )


def _refused() -> Iterator[tuple[str, Callable[[], Any]]]:
    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    yield "FluxTransformer2DModel with `guidance_embeds`, as FLUX.1-dev", lambda: agd.attach(flux)
    klein = FAMILIES["flux2"].pipeline()
    klein.register_to_config(is_distilled=True)
    yield "Flux2KleinPipeline or Krea2Pipeline with `is_distilled`", lambda: agd.attach(klein)
    lcm = StableDiffusionPipeline(**{**sd15.components(), "unet": sd15.unet(time_cond_proj_dim=8)})
    yield "UNet2DConditionModel with `time_cond_proj_dim`, as LCM", lambda: agd.attach(lcm)
    parts = {**sd15.components(), "unet": sd15.unet(8)}
    yield "StableDiffusionInstructPix2PixPipeline", lambda: agd.attach(StableDiffusionInstructPix2PixPipeline(**parts))
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "intermediate_size": 8, "adaln_dim": 4}
    unknown = Ideogram4Transformer2DModel(in_channels=4, llm_features_dim=8, mrope_section=(2, 1, 1), **sizes)
    yield "a class that is not in the table, without `spec=`", lambda: agd.attach(unknown)


def _message(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        text = str(error).replace("|", "\\|")
        start, known, rest = text.partition("; known: ")  # the list of the table above
        if known:
            text = f"{start}; known: … {rest[rest.index('Describe') :]}"
        return f"{type(error).__name__}: {text}"
    raise AssertionError("expected a refusal, found none")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextmanager
def _quiet() -> Iterator[None]:
    """Of what diffusers and transformers say while tiny models are built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
