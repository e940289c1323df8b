"""The training loop: only the adapter changes, nothing waits for the device, and a run that was killed can be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import InitProcessGroupKwargs
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from agd_fast.distillation.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
from agd_fast.distillation.config import TrainConfig
from agd_fast.distillation.economy import Economy
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.log import Log, Meter
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.student import Student
from agd_fast.freezing import differentiable
from agd_fast.memory.base_weights import PackedWeight
from agd_fast.memory.choose import Choice, Memory, ways_of
from agd_fast.memory.optimizer import HostAdamW
from agd_fast.teacher import Teacher
from agd_fast.trajectories import Batch, Trajectories
from agd_fast.warning import first_line


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The Accelerator of devices and processes. A precision chosen earlier in this process is replaced by the new one."""
    if is_initialized() and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the others wait for the process that collects
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[waiting])


def batch_rows(step: int, batch_size: int, states: int, seed: int) -> Tensor:
    """Rows of step `step` in an endless sequence of shuffled epochs: a function of the position alone. [batch_size]"""
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // states, (stop - 1) // states + 1)
    order = torch.cat([_shuffled(states, seed, epoch) for epoch in epochs])
    return order[start - epochs[0] * states :][:batch_size]


@lru_cache(maxsize=2)
def _shuffled(states: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(states, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train(
    teacher: Teacher,
    trajectories: Trajectories,
    config: TrainConfig,
    directory: Path,
    accelerator: Accelerator,
    *,
    run: dict[str, Any],
    resume: bool = True,
    tensorboard: bool = False,
    progress: bool = True,
    economy: Economy | None = None,
    passes: Passes | None = None,
    host: bool = False,
    validate: Callable[[int], float] | None = None,
    validate_every: int | None = None,
) -> float:
    """Train the attached adapter of a frozen teacher in place and return the last logged loss.

    directory: for the checkpoint, `log.jsonl` and, on request, TensorBoard's events. run: settings a checkpoint must match.
    economy: saves memory, already entered; None saves none. passes: runs passes, already entered; None runs them without graphs.
    host: whether the optimizer's state and the average of the weights lie in host memory. validate: called with the number of
    steps done after every `validate_every`, with the weights that would be saved then; what it returns is logged.
    Raises: ValueError when the processes cannot share a batch evenly; FloatingPointError naming the step when the loss is
    not finite (the last good checkpoint is kept); OSError naming what cannot be written; torch.OutOfMemoryError naming what may
    help, when `economy` has no other way left.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.batch_size % world:
        raise ValueError(f"batch_size must be a multiple of the {world} processes, found {config.batch_size}")
    student = Student(teacher)
    adapter = student.adapter
    assert config.learning_rate is not None
    assert config.seed is not None
    economy = economy or Economy(teacher.denoiser, Choice(ways_of(None, None, config.micro_batch_size), ""))
    settings: Any = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer: Optimizer = (HostAdamW if host else torch.optim.AdamW)(adapter.parameters(), **settings)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * config.steps), config.steps)
    average = deepcopy(adapter).requires_grad_(False).to("cpu" if host else accelerator.device) if config.ema else None
    _leave_packed_weights(student)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    modules: dict[str, nn.Module] = {"adapter": adapter}
    if average is not None:
        modules["average"] = average
    checkpoint = directory / CHECKPOINT_NAME
    meter = Meter(accelerator, checkpoint)
    others = {"schedule": schedule, "economy": economy, "meter": meter}
    others |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    if not resume and accelerator.is_main_process:
        checkpoint.unlink(missing_ok=True)
    done = load_checkpoint(checkpoint, run, modules, optimizer, others) if resume and checkpoint.is_file() else 0
    with (
        closing(Log(directory, done, tensorboard, accelerator.is_main_process)) as log,
        tqdm(total=config.steps, initial=done, desc="distilling", disable=not (progress and accelerator.is_main_process)) as bar,
    ):

        def measure(step: int) -> None:
            """Validate, if it is time to."""
            if validate is None or validate_every is None or step % validate_every or not accelerator.is_main_process:
                return
            if passes is not None:
                passes.release()
            with nullcontext() if average is None else _replaced(adapter, average):
                log.write({"step": step, "guidance_explained": validate(step)})

        if done and not log.holds("guidance_explained", done):  # the run was killed before it
            measure(done)
        if economy.goes_on_at(done) and done < config.steps:
            log.write({"step": done, "memory": economy.reason})
            if not bar.disable:
                bar.write(f"going on with {economy.reason}")
        for step in range(done, config.steps):
            rows = batch_rows(step, config.batch_size, len(trajectories), config.seed)[rank::world]
            states = trajectories.batches(rows)
            gradients = partial(_gradients, wrapped, states, config, accelerator, passes=passes)
            with differentiable(teacher.denoiser, teacher.spec):
                loss = _in_memory(gradients, economy, optimizer, step + 1, alone=world == 1, passes=passes)
            norm = accelerator.clip_grad_norm_(adapter.parameters(), config.max_grad_norm)
            optimizer.step()
            learning_rate = float(schedule.get_last_lr()[0])
            schedule.step()
            optimizer.zero_grad()
            if average is not None and config.ema:
                _update_average(average, adapter, config.ema, step)
            meter.add(loss.detach(), norm, step)
            bar.update()
            last = step + 1 == config.steps
            if last or (step + 1) % config.log_every == 0:
                entry = meter.read(step + 1, learning_rate, config.batch_size)
                log.write(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4g}")
            if last or (step + 1) % config.checkpoint_every == 0:
                meter.settle()
                if accelerator.is_main_process:
                    save_checkpoint(checkpoint, step + 1, run, modules, optimizer, others)
            measure(step + 1)
    if average is not None:
        adapter.load_state_dict(average.state_dict())
    for parameter in adapter.parameters():
        parameter.grad = None
    accelerator.free_memory()
    return log.last_loss


def _gradients(
    wrapped: nn.Module,
    states: list[Batch],
    config: TrainConfig,
    accelerator: Accelerator,
    micro_batch_size: int | None,
    passes: Passes | None = None,
) -> Tensor:
    """Add a batch's gradients to the adapter's, one micro-batch after another; returns its loss, a scalar without history.

    states: one batch per shape.
    """
    passes = passes or Passes([], accelerator.device, "not asked for")
    count = sum(map(len, states))
    parts = [part for batch in states for part in batch.split(micro_batch_size or count)]
    total = torch.zeros((), device=accelerator.device)
    run = partial(_pass, wrapped, config, accelerator, count)
    for index, part in enumerate(parts):
        with nullcontext() if index + 1 == len(parts) else accelerator.no_sync(wrapped):
            total += passes(run, vars(part), key=count)
    passes.end_batch()
    return total


def _pass(wrapped: nn.Module, config: TrainConfig, accelerator: Accelerator, count: int, fields: Mapping[str, Any]) -> Tensor:
    """Forward, loss and backward; returns its part of the loss over `count` states. fields: of a Batch, on the device."""
    batch = Batch(**fields)
    with accelerator.autocast():
        prediction = wrapped(batch)
    loss = distillation_loss(prediction, batch.target, batch.omega, config.loss, config.weighting) * len(batch) / count
    accelerator.backward(loss)
    return loss.detach()


def _in_memory(
    gradients: Callable[[int | None], Tensor],
    economy: Economy,
    optimizer: Any,
    step: int,
    *,
    alone: bool,
    passes: Passes | None = None,
) -> Tensor:
    """What `gradients` gives for the economy's micro-batch size. If memory runs out, it is called again without CUDA graphs, then
    in the economy's next way: the adapter has not changed by then.

    alone: whether this is the only process: others would wait for one that runs a further forward.
    Raises: torch.OutOfMemoryError naming what may help.
    """
    while True:
        try:
            return gradients(economy.way.micro_batch_size)
        except torch.OutOfMemoryError as error:
            found = first_line(error)
        optimizer.zero_grad()  # out here, where no traceback holds the tensors of what failed
        graphs = passes is not None and passes.held
        if passes is not None:
            passes.release(refused=True)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if passes is not None and graphs:
            passes.stop(f"memory ran out beside them at step {step} ({found})")
            continue
        if not (alone and economy.fall(step)):
            modes = ", ".join(repr(one) for one in get_args(Memory) if one != "auto")
            raise torch.OutOfMemoryError(
                f"training ran out of memory at step {step} with {economy.way} ({found}); expected one of "
                f"memory={modes} that keeps less, base_weights='int8', or a smaller "
                "TrainConfig(micro_batch_size=...), with which the same output_dir goes on; agd_fast.estimate_memory tells what "
                "each takes"
            )


def _leave_packed_weights(student: Student) -> None:
    """Keep DDP from sending packed weights around: frozen codes are the same in every process."""
    packed = [name for name, value in student.named_parameters() if isinstance(value, PackedWeight)]
    student._ddp_params_and_buffers_to_ignore = packed  # type: ignore[assignment]


@contextmanager
def _replaced(adapter: nn.Module, average: nn.Module) -> Iterator[None]:
    """Inside, the adapter has the weights of its average."""
    own = {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.load_state_dict(average.state_dict())
    try:
        yield
    finally:
        adapter.load_state_dict(own)


def _update_average(average: nn.Module, adapter: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; a shorter one over the first steps, so that the zero start is forgotten."""
    update = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    device, there = next(average.parameters()).device, next(adapter.parameters()).device
    weights = [parameter.detach().to(device, non_blocking=True) for parameter in adapter.parameters()]
    if device.type == "cpu" and there.type == "cuda":
        torch.cuda.current_stream(there).synchronize()  # once for all copies, which go to memory that torch pinned
    update(list(average.parameters()), weights, step)
