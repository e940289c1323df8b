"""Unguided, CFG and AGD from the same noise: how close to the real data, how close to each other, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from agd_fast.adapters import count_parameters
from agd_fast.attaching import disabled, require_attachment
from agd_fast.environment import environment
from agd_fast.evaluation.explained import SCALES, guidance_explained
from agd_fast.evaluation.frechet import frechet_distance
from agd_fast.evaluation.precision_recall import precision_recall
from agd_fast.evaluation.speed import Timing, time_interleaved
from agd_fast.pipelines import ARMS
from agd_fast.sampling import sample
from agd_fast.teacher import Conditions, Teacher, as_teacher

FEATURE_BATCH = 250  # images an extractor sees at once


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    images: real samples [M, C, H, W] in the denoiser's space, on the device that the functions below run on.
    features: [N, C, H, W] → [N, D], any extractor. With the weights at hand, torchmetrics' Inception is one:
        `inception = NoTrainInceptionV3("inception-v3-compat", ["2048"])`,
        `lambda x: inception(x.clamp(-1, 1).add(1).mul(127.5).round().byte())`.
    classify: [N, C, H, W] → logits [N, K]; None leaves class accuracy out, as does an evaluation without class labels.
    """

    images: Tensor
    features: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None


@dataclass
class Arm:
    """One way to sample, at one guidance scale. nfe: denoiser evaluations per sample, counted."""

    nfe: float
    frechet_distance: float
    precision: float
    recall: float
    class_accuracy: float | None = None
    seconds_per_image: float | None = None


@dataclass
class Scale:
    """CFG and AGD at one guidance scale, from the same noise. guidance_strength: of AGD along CFG's, see `Explained`."""

    cfg: Arm
    agd: Arm
    guidance_explained: float
    guidance_strength: float
    rmse_to_cfg: dict[str, float]


@dataclass
class Evaluation:
    """Everything measured of one adapter; `to_dict` is what report.json holds.

    guidance_scale: where CFG's Fréchet distance is lowest; arms, rmse_to_cfg and speed are reported there.
    """

    adapter: dict[str, Any]
    guidance_scale: float
    steps: int
    samples: int
    arms: dict[str, Arm]
    guidance_explained: float
    guidance_strength: float
    explained_by_time: dict[str, float]
    rmse_to_cfg: dict[str, float]
    by_scale: dict[str, Scale]
    speedup_over_cfg: float | None = None
    timing: dict[str, Timing] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Any,
    reference: Reference,
    *,
    class_labels: Sequence[int] | Tensor | None = None,
    conditions: Conditions | None = None,
    samples: int = 2000,
    guidance_scales: Sequence[float] = SCALES,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 250,
    explained_trajectories: int = 100,
    timing_rounds: int = 30,
    timing_batch: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Compare the attached adapter with two-pass CFG and the unguided base.

    model: a Teacher, or what makes one, with an adapter attached.
    class_labels: classes, each sampled equally often. conditions: for a model of captions or the like, tensors by argument name,
        batch first, each row sampled equally often; class_labels are then the classes of the rows, for class accuracy alone.
    guidance_scales: ω in the standard convention.
    timing_rounds: interleaved rounds with `timing_batch` samples, or all if these are fewer; 0 leaves speed out.
    Raises: ValueError when no adapter is attached, or class_labels and conditions differ in length.
    """
    teacher = as_teacher(model)
    require_attachment(teacher)
    table = teacher.conditions(class_labels) if conditions is None else teacher.conditions(conditions=conditions)
    count = len(next(iter(table.values())))
    if class_labels is not None and len(class_labels) != count:
        raise ValueError(f"expected one class label a row of conditions, found {len(class_labels)} and {count}")
    rows = torch.arange(samples) % count
    table = {name: value[rows] for name, value in table.items()}
    labels = None if class_labels is None else torch.as_tensor(class_labels)[rows]
    noise = torch.randn(samples, *teacher.sample_shape, generator=torch.Generator().manual_seed(seed))
    real = _features(reference, reference.images)
    held_out = {name: value[:explained_trajectories] for name, value in table.items()}
    by_scale: dict[str, Scale] = {}
    with tqdm(total=2 * len(guidance_scales) + 2, desc="evaluating", disable=not progress) as bar:

        def measure(name: str, omega: float) -> tuple[Arm, Tensor]:
            run = arm_sampler(teacher, name, None, noise, omega, steps, batch_size, conditions=table)
            with count_evaluations(teacher.denoiser) as evaluated:
                images = run()
            bar.update()
            return _arm(reference, real, images, labels, evaluated[0] / samples), images

        unguided, plain = measure("unguided", 1.0)
        explained = guidance_explained(teacher, held_out, scales=tuple(guidance_scales), steps=steps, seed=seed + 1)
        bar.update()
        for omega in guidance_scales:
            cfg, target = measure("cfg", omega)
            agd, images = measure("agd", omega)
            rmse = {"agd": _rmse(images, target), "unguided": _rmse(plain, target)}
            by_scale[f"{omega:g}"] = Scale(cfg, agd, explained.by_scale[omega], explained.strength_by_scale[omega], rmse)
    best = min(by_scale, key=lambda omega: by_scale[omega].cfg.frechet_distance)
    result = Evaluation(
        adapter=describe_adapter(teacher),
        guidance_scale=float(best),
        steps=steps,
        samples=samples,
        arms={"unguided": unguided, "cfg": by_scale[best].cfg, "agd": by_scale[best].agd},
        guidance_explained=explained.mean,
        guidance_strength=explained.strength,
        explained_by_time=explained.to_dict()["by_time"],
        rmse_to_cfg=by_scale[best].rmse_to_cfg,
        by_scale=by_scale,
    )
    if timing_rounds:
        part, start = {name: value[:timing_batch] for name, value in table.items()}, noise[:timing_batch]
        runs: dict[str, Callable[[], Tensor]] = {
            n: arm_sampler(teacher, n, None, start, float(best), steps, timing_batch, conditions=part) for n in ARMS
        }
        result.timing = time_interleaved(runs, rounds=timing_rounds, device=teacher.device, progress=progress)
        for name, arm in result.arms.items():
            arm.seconds_per_image = result.timing[name].median / len(start)
        result.speedup_over_cfg = result.timing["cfg"].over(result.timing["agd"]).median
    return result


def describe_adapter(teacher: Teacher) -> dict[str, Any]:
    """Kind, parameters, their number as a share of the base's, and whether it is calibrated."""
    adapter = require_attachment(teacher).adapter
    parameters = count_parameters(adapter)
    fraction = parameters / count_parameters(teacher.denoiser)
    calibrated = adapter.calibration is not None
    return {"kind": adapter.config.kind, "parameters": parameters, "fraction": fraction, "calibrated": calibrated}


def arm_sampler(
    teacher: Teacher,
    name: str,
    class_labels: Tensor | None,
    noise: Tensor,
    omega: float,
    steps: int,
    batch_size: int,
    progress: bool = False,
    conditions: Conditions | None = None,
) -> Callable[[], Tensor]:
    """A call that samples one arm: the base in one pass, the base with CFG in two, or the adapter in one."""

    def run() -> Tensor:
        with nullcontext() if name == "agd" else disabled(teacher):
            return sample(
                teacher,
                class_labels,
                conditions=conditions,
                guidance_scale=omega - teacher.spec.omega_offset,
                steps=steps,
                method=name,  # type: ignore[arg-type]
                noise=noise,
                seed=0,
                batch_size=batch_size,
                progress=progress,
            )

    return run


@contextmanager
def count_evaluations(denoiser: nn.Module) -> Iterator[list[int]]:
    """Counts the samples that go through the denoiser: the yielded list holds their number."""
    count = [0]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        count[0] += len(output if isinstance(output, Tensor) else output[0])

    handle = denoiser.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def _arm(reference: Reference, real: Tensor, images: Tensor, labels: Tensor | None, per_sample: float) -> Arm:
    fake = _features(reference, images)
    precision, recall = precision_recall(real, fake)
    accuracy = None
    if reference.classify is not None and labels is not None:
        with torch.inference_mode():
            predicted = reference.classify(images.to(reference.images.device)).argmax(1)
            accuracy = (predicted.cpu() == labels).double().mean().item()
    return Arm(per_sample, frechet_distance(real, fake), precision, recall, accuracy)


def _features(reference: Reference, images: Tensor) -> Tensor:
    with torch.inference_mode():
        parts = images.to(reference.images.device).split(FEATURE_BATCH)
        return torch.cat([reference.features(part).flatten(1).cpu() for part in parts])


def _rmse(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).square().mean().sqrt().item()
