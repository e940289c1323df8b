"""Collecting the states that an adapter is trained on, with the teacher's guided prediction for each."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from agd_fast.checking import is_finite, number_range, require_seed, require_whole
from agd_fast.files import fingerprint, remove_partial, write_tensors
from agd_fast.locking import only_writer
from agd_fast.sampling import Data, require_data
from agd_fast.schedule import number_of_calls
from agd_fast.teacher import Conditions, State, Teacher
from agd_fast.trajectories.dataset import Trajectories, pack
from agd_fast.trajectories.manifest import MANIFEST_NAME, Manifest, Plan, Shard
from agd_fast.trajectories.reservoir import Reservoir
from agd_fast.warning import warn

logger = logging.getLogger(__name__)

Source = Literal["trajectories", "data", "student"]


def collect(
    teacher: Teacher,
    conditions: Conditions,
    directory: str | os.PathLike[str],
    *,
    trajectories: int = 400,
    guidance_range: tuple[float, float] = (1.0, 6.0),
    steps: int | tuple[int, int] = (20, 30),
    keep: int | None = None,
    source: Source = "trajectories",
    data: Data | None = None,
    shard_size: int = 50,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Trajectories:
    """Collect states into `directory`, or finish what an interrupted run left there.

    A state is x_t at one step of a trajectory, with t, ω, its conditions and the teacher's guided prediction.
    conditions: table that the trajectories cycle through, batch first.
    guidance_range: ω is drawn from U[low, high], in the standard convention.
    steps: number of steps of the schedule, or (lowest, highest), from which each shard draws its number.
    keep: number of states kept of each trajectory; None keeps all.
    source: "trajectories" follows the teacher's guidance. "data" noises `data` at the same timesteps (the paper's ablation).
        "student" follows the attached adapter, so that it meets its own errors (DAgger, arXiv 1011.0686). The targets are the
        teacher's guided predictions in every case.
    shard_size: number of trajectories that run at once; at most these are lost if the process is killed.
    dtype: dtype of the stored states.

    Raises: ValueError for numbers out of range, data that does not fit the source, source="student" without a usable adapter, and
    a folder with other trajectories or a foreign file (named); FloatingPointError naming where a state is not finite; OSError if
    the disk is full, or another process is writing to the folder. Warns: if a file is missing or corrupted; it is made again.
    """
    directory = Path(directory)
    ends = steps if isinstance(steps, tuple | list) else (steps, steps)
    for end in ends:
        require_whole(steps=end)
    require_whole(trajectories=trajectories, shard_size=shard_size, keep=keep)
    require_seed(seed)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ValueError(f"steps must be (lowest, highest), found {steps}")
    low, high = ends
    guidance_range = number_range("guidance_range", guidance_range)
    dtype = dtype or teacher.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"states are stored as numbers of floating point, such as torch.bfloat16, found dtype={dtype!r}")
    if guidance_range[0] < teacher.guides_above:
        above, offset = teacher.guides_above, teacher.spec.omega_offset
        scales = " to ".join(f"{omega - offset:g}" for omega in guidance_range)
        raise ValueError(
            f"{teacher.name} guides by scales above {above - offset:g} (ω = {above:g}) alone; expected a guidance_range from "
            f"there on, found {scales} (ω from {guidance_range[0]:g} to {guidance_range[1]:g})"
        )
    _require_source(teacher, conditions, source, data)
    teacher.require_conditional(conditions)  # a missing null condition is reported before anything runs
    plan = Plan(
        source=source,
        trajectories=trajectories,
        shard_size=min(shard_size, trajectories),
        steps=(low, high),
        calls=tuple(number_of_calls(teacher.scheduler, n) for n in range(low, high + 1)),
        keep=keep,
        guidance_range=guidance_range,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        conditions=teacher.fingerprints(conditions),
        data=None if data is None else fingerprint({"samples": data[0], "rows": data[1]}),
        adapter=_identity_of_adapter(teacher) if source == "student" else None,
        **identity(teacher),
    )
    manifest = _read(directory, plan)
    missing = [shard for shard in plan.shards if shard.name not in manifest.files]
    if missing:
        with only_writer(directory):
            manifest = _read(directory, plan, manifest)
            missing = [shard for shard in plan.shards if shard.name not in manifest.files]
            _begin(manifest)
            _announce(plan, len(missing), directory, progress)
            with tqdm(total=sum(shard.calls for shard in missing), desc="collecting", disable=not progress) as bar:
                for shard in missing:
                    tensors, constants = _run_shard(teacher, conditions, shard, data, bar.update)
                    _require_finite(tensors, shard, teacher.dtype)
                    write_tensors(directory / shard.name, tensors, {"plan_id": plan.id, "constants": constants})
                    manifest.add(shard.name, len(tensors["omega"]))
    return Trajectories(directory, verify=False)  # every hash was compared or computed just now


def _require_source(teacher: Teacher, conditions: Conditions, source: Source, data: Data | None) -> None:
    """Raises: ValueError when the source is unknown or `data` does not go with it."""
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {get_args(Source)}, found {source!r}")
    if (source == "data") != (data is not None):
        raise ValueError(
            f"source='data' goes with data=(samples, condition rows); found source={source!r}, data {'given' if data else 'None'}"
        )
    if data is not None:
        require_data(data, conditions, teacher.sample_shape)


def identity(teacher: Teacher) -> dict[str, Any]:
    """The entries of a plan that identify the teacher, with a hash of its weights."""
    return {
        "sample_shape": teacher.sample_shape,
        "guided_channels": teacher.guided_channels or teacher.sample_shape[0],
        "prediction_type": teacher.prediction_type,
        "guidance": teacher.guidance_name,
        "model": {
            "name": teacher.name,
            "class": type(teacher.denoiser).__name__,
            "hash": fingerprint(teacher.denoiser.state_dict()),
        },
        "scheduler": {"class": type(teacher.scheduler).__name__, **_public(teacher.scheduler.config)},
        "null_condition": {c.argument: c.null for c in teacher.spec.conditions}
        | {n: fingerprint({n: v}) for n, v in teacher.null_condition.items()},
    }


def _identity_of_adapter(teacher: Teacher) -> dict[str, Any]:
    adapter = teacher.require_adapter("source='student'").adapter
    return {"config": adapter.config.to_dict(), "hash": adapter.hash}


def _public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _read(directory: Path, plan: Plan, before: Manifest | None = None) -> Manifest:
    """The folder's manifest, or a new one if it has no files yet. It lists only files that are whole; others are made again.

    before: the manifest as read without a lock: files in it were checked then, and another process may have added others.
    """
    manifest = Manifest.read(directory) if (directory / MANIFEST_NAME).is_file() else None
    if manifest is not None and manifest.files:
        manifest.require_plan(plan)
    else:
        manifest = Manifest(directory, plan.to_dict(), plan.id)
    damaged = []
    for name in list(manifest.files):
        if before is not None and manifest.files[name] == before.files.get(name):
            continue
        try:
            manifest.check_file(name)
        except ValueError as error:
            damaged.append(str(error))
            del manifest.files[name]
    manifest.check_foreign()
    for found in damaged if before is not None else ():  # with the lock, thus once
        warn(f"{found}; it is collected again")
    return manifest


def _begin(manifest: Manifest) -> None:
    """Claim the folder for this plan, and remove what a killed process left half-written there."""
    if manifest.path.is_file():
        remove_partial(manifest.directory)
    if not manifest.files:
        manifest.write()


def _announce(plan: Plan, missing: int, directory: Path, progress: bool) -> None:
    """Say how much is to be collected. Raises: OSError when the disk has no room for it."""
    share = missing / len(plan.shards)
    free = shutil.disk_usage(directory).free
    text = (
        f"collecting {plan.trajectories} trajectories, {plan.states:,} states, {plan.bytes / 2**20:.1f} MiB in "
        f"{len(plan.shards)} shards ({missing} to do) into {directory}"
    )
    (tqdm.write if progress else logger.info)(text)
    if plan.bytes * share > free:
        raise OSError(
            f"{directory} needs {plan.bytes * share / 2**20:.0f} MiB for trajectories, found {free / 2**20:.0f} MiB free"
        )


def _run_shard(
    teacher: Teacher, conditions: Conditions, shard: Shard, data: Data | None, progress: Callable[[], object]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one shard, on the CPU, and its other constants as text."""
    plan, generator, steps = shard.plan, shard.generator(1), shard.steps
    low, high = plan.guidance_range
    scales = torch.rand(1 if teacher.one_scale_a_run else shard.count, generator=generator)
    omega = (low + (high - low) * scales).expand(shard.count)  # [b]
    start = teacher.start(shard.count, generator)
    # of the steps that are run: image-to-image leaves out the first ones
    states = Reservoir(torch.rand(shard.count, shard.calls, generator=generator).argsort(dim=1), shard.kept)
    rows = torch.arange(shard.start, shard.start + shard.count) % len(next(iter(conditions.values())))
    if data is not None:
        chosen = torch.randint(len(data[0]), (shard.count,), generator=generator)
        start, rows = data[0][chosen], data[1][chosen]
    part = {name: value[rows].to(teacher.device) for name, value in conditions.items()}
    stored = getattr(torch, plan.dtype)
    table: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}

    def visit(state: State) -> Tensor:
        values = {
            "sample": state.sample,
            "timestep": state.timestep,
            "omega": omega,
            "condition": torch.arange(shard.count),
            "target": state.target,
            "step": torch.full((shard.count,), states.step, dtype=torch.int32),
        }
        states.add(values, {"sample": stored, "target": stored})
        if not table:
            table.update({name: value.cpu() for name, value in state.conditions.items()})
            constants.update(state.constants)
        progress()
        if plan.source == "student":
            return teacher.predict_agd(state.sample, state.timestep, state.arguments, omega)
        return state.target

    teacher.run(part, start, omega, steps, visit, generator=generator, noised=data is not None)
    return pack(states.tensors(), table, constants)


def _require_finite(tensors: dict[str, Tensor], shard: Shard, dtype: torch.dtype) -> None:
    """Check states as they are stored. dtype: the base's. Raises: FloatingPointError naming the first that is not finite."""
    bad = {name: ~is_finite(tensors[name]).flatten(1).all(dim=1) for name in ("sample", "target")}
    rows = (bad["sample"] | bad["target"]).nonzero()
    if not len(rows):
        return
    row, stored = int(rows[0]), getattr(torch, shard.plan.dtype)
    which, step, omega = "sample" if bad["sample"][row] else "target", int(tensors["step"][row]), float(tensors["omega"][row])
    advice = "expected finite numbers of the base: are its weights whole?"
    for one in (dtype, stored):
        if (most := torch.finfo(one).max) < torch.finfo(torch.bfloat16).max:
            advice = f"{one} ends at {most:g}: expected a base and a store_dtype of torch.bfloat16 or torch.float32"
    raise FloatingPointError(
        f"the {which} of a state of {shard.name}, at step {step} with ω = {omega:g}, is NaN or infinite in {stored}; {advice}"
    )
