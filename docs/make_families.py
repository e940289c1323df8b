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
from diffusers import FluxTransformer2DModel, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline  # noqa: E402

import agd_fast as agd  # noqa: E402
from agd_fast.attaching import components_of, own_call, spec_of, uncompiled  # noqa: E402
from agd_fast.families import SPECS  # noqa: E402
from agd_fast.pipelines import PipelineTeacher  # noqa: E402
from agd_fast.pipelines.record import Recorder, Step  # noqa: E402
from agd_fast.spec import Condition, DenoiserSpec, Site  # noqa: E402
from tiny import FAMILIES, TinyFamily, sd15  # noqa: E402

STANDARD = "ε(∅) + ω·(ε(c) − ε(∅))"
RESCALED = "that, times ‖ε(c)‖ / ‖·‖ along the last dimension"
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
    "CogVideoXTransformer3DModel": (
        "`use_dynamic_cfg=True` makes ω a function of t, and the recorded target follows it; see [limits](limits.md)."
    ),
    "DiTTransformer2DModel": "The ε channels alone are guided; the learned sigma is as the conditional pass gives it.",
    "HiDreamImageTransformer2DModel": (
        "The pipeline turns the sign of the prediction; the target is in the denoiser's own. In eval mode the routed experts run "
        "without gradients; see [limits](limits.md)."
    ),
    "HunyuanVideo15Transformer3DModel": (
        "The scale lies on the pipeline's guider. An adapter learns whatever rule that guider has; here it is "
        "`ClassifierFreeGuidance`."
    ),
    "Kandinsky5Transformer3DModel": "The pipeline's default negative prompt is not empty: ε(∅) is that of this text.",
    "LTXVideoTransformer3DModel": "`guidance_rescale` is 0 by default. In `call=` it becomes a part of the target.",
    "Lumina2Transformer2DModel": (
        "`cfg_normalization` is on by default; with `call={'cfg_normalization': False}` the target is the standard one. "
        "`cfg_trunc_ratio` ends guidance early; the target is then ε(c)."
    ),
    "PixArtTransformer2DModel": "All channels are guided, then those of the learned sigma are dropped.",
    "QwenImageTransformer2DModel": (
        'Always rescaled. Guidance runs only beside a negative prompt; where none is given, `" "` is passed. '
        "`guidance_scale` is an input of guidance-distilled models, which are refused."
    ),
    "SD3Transformer2DModel": "`skip_guidance_layers` adds a third branch and is refused.",
    "SanaTransformer2DModel": "Sana-Sprint has `guidance_embeds` and is refused.",
    "StableAudioDiTModel": "ε(∅) is that of zeros, where no negative prompt is given.",
    "UNet2DConditionModel": "`guidance_rescale` is 0 by default. In `call=` it becomes a part of the target.",
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
    sites = [[f"`{name}`", *(_sites(getattr(spec, kind)) for kind in KINDS)] for name, spec in sorted(SPECS.items())]
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

Not recognised, because nothing in their configs tells: models that were distilled to few steps and are called without guidance,
such as SDXL-Turbo, SDXL-Lightning or Z-Image-Turbo. An adapter can be attached to them, but there is no second forward to save.
"""


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
        Recorder(pipe, teacher.denoiser, spec, 1, visit).run(
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
    rescaled = plain * (conditional.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True))
    for name, expected in ((STANDARD, plain), (RESCALED, rescaled)):
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
    if spec.pipeline.guider is not None:
        arguments += f" of `pipe.{spec.pipeline.guider}`, as an argument once an adapter is on"
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
        f"runs them, but for {siblings}: these have the UNet of another and fewer tests.\n\n"
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
    yield "FluxTransformer2DModel with `guidance_embeds`, as FLUX.1-dev", lambda: agd.attach(flux, spec=agd.discover(flux))
    lcm = StableDiffusionPipeline(**{**sd15.components(), "unet": sd15.unet(time_cond_proj_dim=8)})
    yield "UNet2DConditionModel with `time_cond_proj_dim`, as LCM", lambda: agd.attach(lcm)
    parts = {**sd15.components(), "unet": sd15.unet(8)}
    yield "StableDiffusionInstructPix2PixPipeline", lambda: agd.attach(StableDiffusionInstructPix2PixPipeline(**parts))
    unknown = FluxTransformer2DModel(
        **{name: value for name, value in flux.config.items() if not name.startswith("_") and name != "guidance_embeds"}
    )
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
