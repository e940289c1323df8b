"""A tiny pipeline as the teacher, and what a run of it wrote."""

import json

from safetensors.torch import load_file
from torch import Tensor

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.distillation import TrainConfig
from agd_fast.pipelines import PipelineTeacher
from helpers_families import denoisers
from tiny import FAMILIES

SD15 = FAMILIES["sd15"]
SIZE = {"height": 16, "width": 16}


def distill_pipe(pipe, directory, family=SD15, **changes):
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    settings = {
        "call": call,
        "guidance_range": (1.0, 6.0),
        "adapter": agd.AdapterConfig(hidden=2),
        "trajectories": 4,
        "sampling_steps": 2,
        "shard_size": 2,
        "train_config": TrainConfig(steps=4, batch_size=4, log_every=2, checkpoint_every=2),
        "validation": 0,
        "progress": False,
    }
    if "prompts" not in changes and "inputs" not in changes:
        changes["inputs"] = family.inputs(3)
    return agd.distill(pipe, output_dir=directory, **{**settings, **changes})


def teacher_of(pipe, family, cls=PipelineTeacher, count=2, **call):
    call = {name: value for name, value in {**family.call, **call}.items() if name != "num_inference_steps"}
    return cls.of(pipe, inputs=family.inputs(count), call=call)


def states_in(directory) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted((directory / "trajectories").glob("*.safetensors"))]


def plan_of(directory):
    return json.loads((directory / "trajectories" / "manifest.json").read_text())["plan"]


def log_of(directory):
    """Its entries without what the clock tells."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


def assert_untouched(pipe):
    assert not is_wrapped(pipe)
    assert all(attachment_of(denoiser) is None for denoiser in denoisers(pipe).values())
    assert "step" not in vars(pipe.scheduler)
    assert not any(denoiser._forward_pre_hooks for denoiser in denoisers(pipe).values())
