"""From arms to rows: counts, times, memory, and what is derived from them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from agd_fast import AdapterConfig
from agd_fast.evaluation.speed import Timing, interleaved_rounds
from speed.arms import ARMS
from speed.hardware import roofline_ms

Row = dict[str, Any]
Run = Callable[[], Tensor]  # the last prediction, or samples
Keep = Callable[[list[Row]], None]  # takes the rows so far, whenever there are more

AGREEMENT = 0.1  # relative difference that another order of rounding may cause in a deep network in 16 bit


@dataclass
class Measured:
    """One arm at one batch, over one run of a schedule; None where it was not measured.

    nfe: denoiser evaluations per sample. flops, launches: of the run. device_seconds: of the run's kernels, without pauses
    between them. peak_memory: in bytes, while the arm is made and first run. timing: of the last `timed_steps`; None: of all.
    error: of the result, relative to the arm that it should agree with. adapter: how ours was configured, where there is one.
    note: what a reader must know. failed: whether it could not run or gave a wrong result; the note says why.
    """

    nfe: float | None = None
    flops: float | None = None
    launches: float | None = None
    device_seconds: float | None = None
    weight_bytes: int | None = None
    peak_memory: int | None = None
    timing: Timing | None = None
    timed_steps: int | None = None
    error: float | None = None
    adapter: AdapterConfig | None = None
    note: str | None = None
    failed: bool = False


def attempt(one: Measured, action: Callable[[Measured], None]) -> None:
    """Runs an action for one arm. If it fails, for want of memory say, only this arm's figures are lost; its note says why."""
    try:
        if not one.failed:
            action(one)
    except Exception as error:
        one.failed, one.note = True, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def rows_of(
    measured: Mapping[str, Measured], *, model: str, batch: int, steps: int, dtype: torch.dtype, device: str
) -> list[Row]:
    """One row per arm, for JSON. device: name of the card."""
    timed = {name: one.timed_steps or steps for name, one in measured.items()}
    timings = {name: one.timing for name, one in measured.items() if one.timing is not None}

    def ratio(key: str, over: str, under: str) -> Row:
        found = timings[over].over(timings[under]) if over in timings and under in timings else None
        return _spread(found, key, timed.get(under, steps) / timed.get(over, steps))

    rows = []
    for name, one in measured.items():
        flops = None if one.flops is None else one.flops / steps
        least = None if flops is None or one.weight_bytes is None else roofline_ms(device, dtype, flops, one.weight_bytes)
        rows.append(
            {
                "model": model,
                "batch": batch,
                "steps": steps,
                "dtype": str(dtype).removeprefix("torch."),
                "arm": name,
                "nfe": one.nfe,
                "timed_steps": timed[name],
                **_spread(one.timing, "ms_per_step", 1e3 / timed[name]),
                **_spread(one.timing, "ms_per_image", 1e3 / batch * steps / timed[name]),
                "device_ms_per_step": None if one.device_seconds is None else one.device_seconds / steps * 1e3,
                "launches_per_step": None if one.launches is None else one.launches / steps,
                "flops_per_step": flops,
                "peak_memory_bytes": one.peak_memory,
                **ratio("ratio_to_unguided", name, "unguided"),
                **ratio("ratio_to_unguided_engine", name, "unguided_engine"),
                **ratio("speedup_over_cfg", "cfg", name),
                **ratio("speedup_over_cfg_compiled", "cfg_compiled", name),
                "relative_error": one.error,
                "roofline_ms": least,
                "seconds": None if one.timing is None else asdict(one.timing),
                "adapter": None if one.adapter is None else one.adapter.to_dict(),
                "note": one.note,
            }
        )
    return rows


def time_runs(
    runs: Mapping[str, Callable[[], Any]],
    measured: Mapping[str, Measured],
    rounds: int,
    device: torch.device,
    keep: Callable[[], None],
) -> None:
    """Interleaved times of the given runs, into `measured`; none for arms that have failed. keep: called every round."""
    sound = {name: run for name, run in runs.items() if not measured[name].failed}
    if sound:
        for timings in interleaved_rounds(sound, rounds=rounds, warmup=1, device=device, progress=True):
            for name, timing in timings.items():
                measured[name].timing = timing
            keep()


def compare(outputs: Mapping[str, Tensor], measured: Mapping[str, Measured]) -> None:
    """Marks arms as failed that do not agree with their plain arm. outputs: float32."""
    for name in outputs:
        plain = ARMS[name].plain
        if plain in outputs:
            one, own, expected = measured[name], outputs[name], outputs[plain]
            one.error = float((own - expected).norm() / expected.norm())
            if not one.error <= AGREEMENT:
                one.failed, one.note = True, f"not timed: it differs from {plain} by {one.error:.2g} of what that gives"


class Kernels(NamedTuple):
    """CUDA kernels of one call. longest: name, count and seconds of those that take the most time, longest first."""

    launches: int
    seconds: float
    longest: list[tuple[str, int, float]]


def kernels(run: Run, shown: int = 12) -> Kernels:
    """CUDA kernels of one call, including those of a replayed graph, as the profiler sees them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    assert profiler.profiler is not None
    counts, seconds = Counter[str](), dict[str, float]()
    for event in filter(_is_kernel, profiler.profiler.kineto_results.events()):
        counts[event.name()] += 1
        seconds[event.name()] = seconds.get(event.name(), 0.0) + event.duration_ns() / 1e9
    longest = [(name, counts[name], seconds[name]) for name in heapq.nlargest(shown, seconds, key=seconds.__getitem__)]
    return Kernels(counts.total(), sum(seconds.values()), longest)


def _is_kernel(event: Any) -> bool:
    on_device = event.device_type() == torch.autograd.DeviceType.CUDA
    return on_device and not event.is_user_annotation() and not event.name().startswith(("Memcpy", "Memset"))


def _spread(timing: Timing | None, name: str, factor: float) -> Row:
    values = (None, None, None) if timing is None else (timing.median * factor, timing.p20 * factor, timing.p80 * factor)
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))
