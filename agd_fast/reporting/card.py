"""The model card of an adapter: what its folder records, as the README.md of a Hub repo."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from agd_fast.adapters import count_parameters
from agd_fast.files import read_json
from agd_fast.storage import read_adapter, read_config

NOT_RECORDED = "not recorded"
RESULT_NAME = "distill.json"  # of `agd_fast.distill`
TAGS = ["agd-fast", "diffusers", "adapter-guidance-distillation", "classifier-free-guidance", "guidance-distillation"]
LABELLED = ("DiTTransformer2DModel",)  # classes whose pipelines are given class labels and no prompt
PLAIN_CFG = "agd_fast.ops.guidance_combine"
# for classes whose pipelines all start from text; most classes serve several tasks, and an adapter does not tell which
PIPELINE_TAGS = dict.fromkeys(("PixArtTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"), "text-to-image")


def model_card(folders: Sequence[Path], repo_id: str, *, picture: str | None = None, license: str | None = None) -> str:
    """Markdown with a YAML header, from facts in adapter_config.json and distill.json; what is not there is "not recorded".

    folders: that of the adapter, then those of further denoisers' adapters. picture: name of the sample grid in the repo.
    Raises: FileNotFoundError, ValueError when a folder holds no complete adapter.
    """
    denoisers = [_facts(folder, first=index == 0) for index, folder in enumerate(folders)]
    first = denoisers[0]
    base_model = first["base_model"]
    loadable = _is_hub_id(base_model)
    header = ModelCardData(
        library_name="agd-fast",
        base_model=base_model if loadable else None,
        base_model_relation="adapter" if loadable else None,
        pipeline_tag=first["pipeline_tag"],
        tags=TAGS,
        license=license,
    )
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"code": _code, "number": _number, "percent": _percent}
    template = resources.files("agd_fast.reporting").joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        header=header.to_yaml(),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        loadable=loadable,
        library_version=first["library_version"],
        picture=picture,
        denoisers=denoisers,
        snippet="pipeline" if hasattr(diffusers, first["base_class"]) else "denoiser",
        example_scale=_example_scale(first["low"] - first["omega_offset"], first["high"] - first["omega_offset"]),
        example_input="class_labels=[1]" if first["base_class"] in LABELLED else '"a fox"',
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _facts(folder: Path, *, first: bool) -> dict[str, Any]:
    config = read_config(folder)
    adapter, about, layout = config["adapter"], dict(config["about"]), config["layout"]
    path = folder / RESULT_NAME
    result = read_json(path) if path.is_file() else {}
    explained = result.get("guidance_explained") or {"mean": about.get("guidance_explained")}
    low, high = adapter["guidance_range"]
    return {
        "folder": None if first else folder.name,
        "base_model": _base_name(about.pop("base_model", None)),
        "base_class": config["base_class"],
        "library_version": config.get("library_version", NOT_RECORDED),
        "kind": adapter["kind"],
        "hidden": adapter["hidden"],
        "rank": adapter["rank"],
        "identity_at_one": adapter["identity_at_one"],
        "sites": sum(len(sites) for sites in layout["sites"].values()),
        "parameters": count_parameters(read_adapter(folder, config)),
        "fraction": result.get("fraction"),
        "low": low,
        "high": high,
        "omega_offset": config["omega_offset"],
        "convention": config.get("guidance_convention", NOT_RECORDED),
        "prediction_type": config["prediction_type"],
        "rule": _rule(about.pop("teacher", None)),
        "calibrated": config.get("calibration") is not None,
        "explained": explained["mean"],
        "by_scale": explained.get("by_scale"),
        "strengths": explained.get("strength_by_scale"),
        "loss": result.get("loss"),
        "training": _training(about, result),
        "pipeline_tag": about.get("pipeline_tag") or PIPELINE_TAGS.get(config["base_class"]),
    }


def _training(about: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of how it was trained, and whatever else its maker noted, by name."""
    named = {"states": about.get("source"), "started from": None, "scheduler": about.get("scheduler")}
    if "init" in about:
        named["started from"] = f"the adapter {about['init']}" if about["init"] else "zero"
    settings = {name: "none" if value is None else value for name, value in (about.get("train") or {}).items()}
    seconds = {f"seconds to {phase}": round(value, 1) for phase, value in (result.get("seconds") or {}).items()}
    known = {"train", "source", "init", "scheduler", "guidance_explained", "pipeline_tag"}
    notes = {name: value for name, value in about.items() if name not in known and isinstance(value, str | int | float)}
    return {**named, **(settings or {"settings": None}), **seconds, **notes}


def _rule(name: str | None) -> str:
    if name == PLAIN_CFG:
        return "classifier-free guidance, ε(∅) + ω·(ε(c) − ε(∅))"
    return _code(name)


def _base_name(name: str | None) -> str | None:
    """As recorded; of a path on the maker's machine, only the last part."""
    return Path(name).name if name and (Path(name).is_absolute() or Path(name).exists()) else name


def _is_hub_id(name: str | None) -> bool:
    return bool(name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


def _example_scale(low: float, high: float) -> str:
    return "7.5" if low <= 7.5 <= high else f"{(low + high) / 2:.2g}"


def _code(value: Any) -> str:
    """In Markdown's code quotes, on one line."""
    if value is None:
        return NOT_RECORDED
    text = " ".join(str(value).replace("`", "'").split())
    return f"`{text}`"


def _number(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.1%}"
