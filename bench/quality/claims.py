"""The paper's other claims, measured with the default adapter: one JSON per claim, so that it continues where it stopped."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

import agd_fast as agd
from agd_fast import AdapterConfig, Teacher, TrainConfig
from agd_fast.environment import environment
from agd_fast.evaluation import guidance_explained
from agd_fast.evaluation.explained import SCALES, Student
from agd_fast.files import write_json
from agd_fast.teacher import Conditions, Guidance
from agd_fast.trajectories import Trajectories, collect
from nfe_speed import commit
from quality.arms import FULL, OTHER_RATES
from quality.guiders import apg, cfg_zero_star
from quality.run import require_sizes
from quality.scoring import STATES_SEED, Sizes, cfg, draw, measure, unguided
from quality.students import GUIDANCE_RANGE, full_finetune
from quality.teachers import BenchTeacher
from quality.tuning import Shift, faded, tuned_teacher, upside_down

Values = dict[str, float]

ADAPTER = "claims-adapter"  # the default adapter, for all claims that train none of their own
OMEGA = 2.0  # for the claims that draw images
SEED = 0
TUNING_STEPS = 300
RMSE_IMAGES = 500


@dataclass(frozen=True)
class Claim:
    """setting: one sentence on what was measured. values: label → number. note: what a reader must know beside them."""

    setting: str
    values: Values
    note: str = ""


@dataclass(frozen=True)
class Lab:
    """A teacher, and the sizes of the measurements: training steps and trajectories of an adapter."""

    bench: BenchTeacher
    output: Path
    sizes: Sizes
    steps: int
    trajectories: int

    @property
    def teacher(self) -> Teacher:
        return self.bench.teacher

    @property
    def tuning_steps(self) -> int:
        return min(TUNING_STEPS, self.steps)

    @contextmanager
    def distilled(
        self,
        folder: str = ADAPTER,
        teacher: Teacher | None = None,
        states: Trajectories | None = None,
        adapter: AdapterConfig | None = None,
        **training: Any,
    ) -> Iterator[None]:
        """An adapter of the teacher, or of another one, attached; trained once, into `folder`. training: for the TrainConfig."""
        teacher = teacher or self.teacher
        agd.distill(
            teacher,
            output_dir=self.output / folder,
            conditions=self.bench.table,
            adapter=adapter,
            train_config=TrainConfig(steps=self.steps, **training),
            trajectories=self.trajectories if states is None else states,
            validation=0,
            seed=SEED,
            progress=False,
        )
        try:
            yield
        finally:
            agd.unload(teacher)

    def explained(
        self,
        teacher: Teacher | None = None,
        *,
        table: Conditions | None = None,
        student: Student | None = None,
        scales: tuple[float, ...] = SCALES,
        steps: int | None = None,
    ) -> Values:
        """Guidance explained by scale, "ω=…", and "mean", on the guided states that all students of the bench are scored on."""
        table = self.bench.table if table is None else table
        rows = torch.arange(self.sizes.trajectories) % len(next(iter(table.values())))
        found = guidance_explained(
            teacher or self.teacher,
            {name: value[rows] for name, value in table.items()},
            student=student,
            scales=scales,
            steps=steps or self.sizes.steps,
            seed=STATES_SEED,
        )
        return {"mean": found.mean, **{f"ω={omega:g}": value for omega, value in found.by_scale.items()}}


def run_claims(
    bench: BenchTeacher,
    output: Path,
    sizes: Sizes,
    *,
    names: list[str] | None = None,
    steps: int = 800,
    trajectories: int = 400,
) -> None:
    """Measure the claims that have no result yet, each into output/claim-NAME.json.

    names: in CLAIMS; None takes all that the teacher allows. steps, trajectories: for the training of every adapter.
    Raises: ValueError for an unknown name, a claim on captions with a teacher that takes none, or a folder of other sizes.
    """
    names = [name for name in CLAIMS if name != "unseen_captions" or bench.held_out] if names is None else names
    if unknown := sorted(set(names) - set(CLAIMS)):
        raise ValueError(f"expected claims of {', '.join(CLAIMS)}; found {', '.join(unknown)}")
    require_sizes(output, sizes)
    lab = Lab(bench, output, sizes, steps, trajectories)
    for name in names:
        path = output / f"claim-{name}.json"
        if path.is_file():
            continue
        claim = CLAIMS[name](lab)
        row = {"claim": name, "setting": claim.setting, "values": claim.values, "note": claim.note}
        how = {"steps": steps, "trajectories": trajectories, "environment": environment(), "commit": commit()}
        write_json(path, {**row, **how})
        print(f"{name}: " + ", ".join(f"{label} {value:.3f}" for label, value in claim.values.items()), flush=True)


def _moved(lab: Lab, kinds: dict[str, tuple[Shift, int | None]], prefix: str) -> Values:
    """Guidance explained by the default adapter on its own base and on changed ones, beside its bounds there."""
    with lab.distilled():
        values = {"original": lab.explained()["mean"]}
    for label, (shift, rank) in kinds.items():
        name = f"{prefix}-{label.replace(' ', '_')}"
        tuned = tuned_teacher(lab.bench, lab.output / f"claims-{name}.safetensors", shift, lab.tuning_steps, rank)

        def with_original_guidance(x: Tensor, t: Tensor, c: Conditions, omega: Tensor, tuned: Teacher = tuned) -> Tensor:
            guided, cond = lab.teacher.predict_cfg(x, t, c, omega)
            return tuned.predict(x, t, c) + guided - cond

        values[f"{label}, the original's guidance"] = lab.explained(tuned, student=with_original_guidance)["mean"]
        agd.load(tuned, lab.output / ADAPTER)
        values[f"{label}, moved"] = lab.explained(tuned)["mean"]
        agd.unload(tuned)
        with lab.distilled(f"claims-{name}", tuned):
            values[f"{label}, distilled anew"] = lab.explained(tuned)["mean"]
    return values


_BOUNDS = (
    "Explained is of the changed base's own CFG. 'The original's guidance' adds (ω − 1)·(ε(c) − ε(∅)) of the unchanged base to "
    "ε(c) of the changed one: how much of its guidance is still the old one."
)


def fine_tuned(lab: Lab) -> Claim:
    kinds: dict[str, tuple[Shift, int | None]] = {
        "faded": (faded, None),
        "upside down": (upside_down, None),
        "inverted": (torch.neg, None),
    }
    setting = (
        f"The adapter moved to copies of its base whose weights were all trained {lab.tuning_steps} steps on changed images."
    )
    return Claim(setting, _moved(lab, kinds, "tuned"), _BOUNDS)


def lora(lab: Lab) -> Claim:
    kinds: dict[str, tuple[Shift, int | None]] = {"faded": (faded, 4), "upside down": (upside_down, 4)}
    setting = (
        f"The adapter on its base with a LoRA of rank 4 on every linear, {lab.tuning_steps} steps on changed images, merged."
    )
    return Claim(setting, _moved(lab, kinds, "lora"), _BOUNDS)


def omega_range(lab: Lab) -> Claim:
    with lab.distilled():
        found = lab.explained(scales=(1.25, 6.0, 7.0, 8.0, 10.0, 12.0))
    return Claim("Explained at scales up to 12, trained on 1 to 6.", {n: v for n, v in found.items() if n != "mean"})


def schedulers(lab: Lab) -> Claim:
    ddim = lab.teacher.scheduler
    others = (DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler)
    runs = [(scheduler, lab.sizes.steps) for scheduler in (DDIMScheduler, *others)]
    runs += [(DDIMScheduler, steps) for steps in (10, 50, 100) if steps != lab.sizes.steps]
    values = {}
    with lab.distilled():
        for scheduler, steps in runs:
            teacher = replace(lab.teacher, scheduler=scheduler.from_config(ddim.config))
            bench, sizes = replace(lab.bench, teacher=teacher), replace(lab.sizes, steps=steps)
            sizes = replace(sizes, samples=min(RMSE_IMAGES, sizes.samples))
            label = f"{scheduler.__name__.removesuffix('Scheduler')} {steps} steps"
            values[f"{label}, explained"] = lab.explained(teacher, scales=(OMEGA,), steps=steps)["mean"]
            target, agd_images, plain = (
                draw(bench, student, OMEGA, SEED, sizes) for student in (cfg(bench), teacher.predict_agd, unguided(bench))
            )
            ratio = (agd_images - target).square().mean().sqrt() / (plain - target).square().mean().sqrt()
            values[f"{label}, RMSE ratio"] = ratio.item()
    setting = f"Other schedulers and numbers of steps at ω = {OMEGA:g}; the adapter saw DDIM with 20 to 30 steps."
    return Claim(setting, values, "RMSE ratio: of AGD's images to CFG's from the same noise, by that of unguided ones.")


def equal_nfe(lab: Lab) -> Claim:
    values = {}
    with lab.distilled():
        for steps in (5, 10, 20):
            for name, student, count in (("CFG", cfg(lab.bench), steps), ("AGD", lab.teacher.predict_agd, 2 * steps)):
                images = draw(lab.bench, student, OMEGA, SEED, replace(lab.sizes, steps=count))
                values[f"{name} {count} steps, NFE {2 * steps}"] = measure(lab.bench, images)["frechet"]
    return Claim(f"Fréchet distance at ω = {OMEGA:g}: AGD with 2k steps beside CFG with k, the same forwards.", values)


RULES: dict[str, Guidance | None] = {"CFG": None, "APG": apg, "CFG-Zero*": cfg_zero_star}


def guiders(lab: Lab) -> Claim:
    values = {}
    for label, rule in RULES.items():
        teacher = lab.teacher if rule is None else replace(lab.teacher, guidance=rule)
        bench = replace(lab.bench, teacher=teacher)
        with lab.distilled(ADAPTER if rule is None else f"claims-rule-{teacher.guidance_name.rpartition('.')[2]}", teacher):
            values[f"{label}, explained"] = lab.explained(teacher)["mean"]
            for omega in (2.0, 4.0):
                for arm, student in (("rule", cfg(bench)), ("adapter", teacher.predict_agd)):
                    found = measure(bench, draw(bench, student, omega, SEED, lab.sizes))
                    values |= {f"{label} {arm} ω={omega:g}, {name}": value for name, value in found.items()}
    note = (
        "APG without momentum, η = 0, Δ cut to a root mean square of 0.2, projected in the model's own output (v), not in x0; "
        "CFG-Zero* without its zeroed first step. Both are ε(c) at ω = 1, as identity_at_one assumes."
    )
    return Claim("An adapter distilled from each rule of guidance, beside the rule itself in two passes.", values, note)


def _trainings(lab: Lab, variants: dict[str, dict[str, Any]]) -> Values:
    """Guidance explained, in the mean and at the lowest and highest scale, by TrainConfig entries; {} is the default adapter."""
    with lab.distilled():
        states = Trajectories(lab.output / ADAPTER / "trajectories")
    values: Values = {}
    for label, training in variants.items():
        name = "-".join(f"{key}_{value}" for key, value in training.items())
        with lab.distilled(f"claims-train-{name}", states=states, **training) if training else lab.distilled():
            found = lab.explained()
        values |= {f"{label}, {key}": found[key] for key in ("mean", "ω=1.5", "ω=6")}
    return values


def weightings(lab: Lab) -> Claim:
    variants: dict[str, dict[str, Any]] = {
        "ω-weighted l2": {},
        "uniform l2": {"weighting": "uniform"},
        "ω-weighted l1": {"loss": "l1"},
        "uniform l1": {"weighting": "uniform", "loss": "l1"},
    }
    note = "The ω-weighted loss divides a state's by (ω − 1)² + ¼, with l1 too. One seed."
    return Claim("Explained on guided states by loss and weighting, the same states.", _trainings(lab, variants), note)


def ema(lab: Lab) -> Claim:
    values = _trainings(lab, {"none": {}, "0.95": {"ema": 0.95}, "0.99": {"ema": 0.99}})
    longest = (1 + lab.steps) / (10 + lab.steps)  # the decay's warm-up in agd_fast
    note = (
        f"After {lab.steps} steps the decay has warmed up to {longest:.3f} at most: 0.999 would give what 0.99 gives. One seed."
    )
    return Claim("Explained on guided states by the decay of the average of the adapter's weights.", values, note)


def training_length(lab: Lab) -> Claim:
    """The default adapter at two sizes and the full fine-tune, from a quarter of the steps to four times as many."""
    with lab.distilled():
        states = Trajectories(lab.output / ADAPTER / "trajectories")
    values: Values = {}
    for steps in (max(lab.steps // 4, 1), lab.steps, 4 * lab.steps):
        longer = replace(lab, steps=steps)
        for fraction in (0.02, 0.05):
            config = AdapterConfig(max_fraction=fraction)
            with longer.distilled(f"claims-length-{fraction}-{steps}", states=states, adapter=config):
                values[f"adapter, {fraction:.0%}, {steps} steps"] = lab.explained()["mean"]
        full, _ = full_finetune(lab.teacher, states, TrainConfig(steps=steps, learning_rate=OTHER_RATES[FULL], seed=SEED))
        values[f"full fine-tune, {steps} steps"] = lab.explained(student=full.predict_agd)["mean"]
    setting = f"Explained on guided states by the length of the training, all on the same {len(states):,} states."
    return Claim(setting, values, "Learning rates are those tuned for 800 steps. One seed.")


def more_trajectories(lab: Lab) -> Claim:
    few, many = lab.trajectories, 4 * lab.trajectories
    values: Values = {}
    for count, keep in ((few, None), (many, 6), (many, None)):
        label = f"{count}, {keep or 'all'} steps"
        with tempfile.TemporaryDirectory() as folder:  # collected anew, to time it
            start = time.perf_counter()
            options: dict[str, Any] = {"guidance_range": GUIDANCE_RANGE, "seed": SEED, "progress": False}
            states = collect(lab.teacher, lab.bench.table, folder, trajectories=count, keep=keep, **options)
            seconds = time.perf_counter() - start
            with lab.distilled(f"claims-states-{count}-{keep or 'all'}", states=states):
                values[f"{label}, explained"] = lab.explained()["mean"]
            values |= {f"{label}, states": float(len(states)), f"{label}, seconds to collect": seconds}
    return Claim(f"As many states from four times the trajectories, trained {lab.steps} steps each.", values, "One seed.")


def unseen_captions(lab: Lab) -> Claim:
    if lab.bench.held_out is None:
        raise ValueError("unseen_captions expects a captioned teacher, found one without a held-out template")
    with lab.distilled():
        seen, unseen = lab.explained(), lab.explained(table=lab.bench.held_out[0])
    values = {f"{label}, {key}": value for label, found in (("seen", seen), ("unseen", unseen)) for key, value in found.items()}
    return Claim("Explained on captions of the template that was kept from distillation, beside the others.", values)


CLAIMS: dict[str, Callable[[Lab], Claim]] = {
    "fine_tuned": fine_tuned,
    "lora": lora,
    "omega_range": omega_range,
    "schedulers": schedulers,
    "equal_nfe": equal_nfe,
    "guiders": guiders,
    "weightings": weightings,
    "ema": ema,
    "training_length": training_length,
    "trajectories": more_trajectories,
    "unseen_captions": unseen_captions,
}
