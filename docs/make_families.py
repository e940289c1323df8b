"""Writes docs/families.md: its text is docs/families.template.md, its tables are what the specs say and what tiny pipelines do.

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
from string import Template
from typing import Any

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
PAGE = DOCS / "families.md"
TEMPLATE = DOCS / "families.template.md"
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    FluxTransformer2DModel,
    Ideogram4Transformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)

import agd_fast as agd  # noqa: E402
from agd_fast.attaching import components_of, spec_of, uncompiled  # noqa: E402
from agd_fast.families import SPECS, VARIANTS  # noqa: E402
from agd_fast.pipelines import PipelineTeacher  # noqa: E402
from agd_fast.pipelines.record import Step  # noqa: E402
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


def main(path: Path = PAGE) -> None:
    path.write_text(page(), encoding="utf-8")


def page() -> str:
    with _quiet():
        tried = _tried()
        rows = [_row(name, spec, tried.get(name, [])) for name, spec in sorted(SPECS.items())]
        refused = [[what, _message(attempt)] for what, attempt in _refused()]
    sites = [[name, *(_sites(getattr(spec, kind)) for kind in KINDS)] for name, spec in sorted(_specs(), key=lambda one: one[0])]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        families=_table(COLUMNS, rows),
        sites=_table(("denoiser", *KINDS), sites),
        refused=_table(("what", "what the error says"), refused),
        tests=_tests(),
    )


def _specs() -> Iterator[tuple[str, DenoiserSpec]]:
    """Every spec, by what it is of."""
    for name, spec in SPECS.items():
        yield f"`{name}`", spec
        for entry, variant in VARIANTS.get(name, {}).items():
            yield f"`{name}` with `{entry}`", variant


def _tried() -> dict[str, list[tuple[str, TinyFamily, Any, str | None]]]:
    """By denoiser class: name, family, pipeline and recorded target of every tiny pipeline that has it."""
    found: dict[str, list[tuple[str, TinyFamily, Any, str | None]]] = {}
    for name, family in {**FAMILIES, **_siblings()}.items():
        pipe = family.pipeline()
        components = components_of(pipe, spec_of(pipe))
        known = found.setdefault(_class_of(components), [])
        targets = set() if name not in FAMILIES and known else {target_of(pipe, family, component) for component in components}
        known.append((name, family, pipe, "; ".join(sorted(targets)) or None))
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
    call = {name: value for name, value in family.call.items() if name != "num_inference_steps"}
    teacher = PipelineTeacher.of(pipe, component, inputs=family.inputs(1), call=call)
    scale = next(iter(family.guided.values()))
    names: set[str] = set()

    def visit(step: Step) -> torch.Tensor:
        # here, as a pipeline may write the next step into the same tensor
        names.add(_rule(teacher, step, scale + family.omega_offset))
        return step.guided

    teacher.runs.follow([0], scale, 4, [0], visit)
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
    channels = min(2, plain.ndim - 1)
    by_channels = conditional.norm(dim=channels, keepdim=True) / plain.norm(dim=channels, keepdim=True)
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
        f"The names in brackets are the pipelines in `tests/tiny/`. Every test of a family ({over_all}) runs them. The "
        f"exceptions, with fewer tests, are {siblings}: they share the denoiser or its class with another one, or make one "
        "sample a call.\n\n"
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
