"""What a training run reports: sums on the device, and a file with one entry per line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from agd_fast.files import append_text, write_text

LOG_NAME = "log.jsonl"


class Meter:
    """Sums on the device, read only when something is logged or a checkpoint is written, then over all processes."""

    def __init__(self, accelerator: Accelerator, checkpoint: Path) -> None:
        self.accelerator, self.device, self.checkpoint = accelerator, accelerator.device, checkpoint
        self.bad_step = torch.full((), -1, dtype=torch.long, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.start()

    def start(self) -> None:
        self.total, self.count = torch.zeros((), device=self.device), 0
        self.timed, self.since = 0, time.perf_counter()  # steps of this process; after a resume, the sums are over more

    def add(self, loss: Tensor, norm: Tensor, step: int) -> None:
        self.total += loss
        self.count += 1
        self.timed += 1
        self.norm = norm.detach()
        watched = loss if self.accelerator.scaler else loss + self.norm  # a scaler skips steps whose gradient overflows
        bad = ~torch.isfinite(watched) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, torch.full_like(self.bad_step, step + 1), self.bad_step)

    def read(self, step: int, learning_rate: float, batch_size: int) -> dict[str, float]:
        self.require_finite()
        seconds = time.perf_counter() - self.since
        entry = {
            "step": step,
            "loss": float(self.accelerator.reduce(self.total, "mean")) / self.count,
            "grad_norm": float(self.norm),
            "learning_rate": learning_rate,
            "samples_per_second": self.timed * batch_size / seconds,
        }
        self.start()
        return entry

    def settle(self) -> None:
        """Gather what a checkpoint keeps, in all processes. Raises: FloatingPointError, as `require_finite`."""
        self.require_finite()
        self.totals = self.accelerator.gather(self.total).reshape(-1).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The sums as `settle` gathered them."""
        return {"totals": self.totals, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = torch.tensor(state["totals"][self.accelerator.process_index], device=self.device), state["count"]

    def require_finite(self) -> None:
        step = int(self.accelerator.gather(self.bad_step).max())
        if step >= 0:
            kept = self.checkpoint if self.checkpoint.is_file() else "none was written yet"
            raise FloatingPointError(
                f"the loss or its gradient became NaN or infinite at step {step}; training stopped, "
                f"the last good checkpoint: {kept}. Expected finite values: try a lower learning_rate or mixed_precision='bf16'"
            )


class Log:
    """One JSON object per line, and TensorBoard on request; a resumed run continues after the steps it keeps."""

    def __init__(self, directory: Path, done: int, tensorboard: bool, main: bool) -> None:
        self.last_loss, self.path, self.board = float("nan"), directory / LOG_NAME if main else None, None
        self.kept: list[dict[str, Any]] = []
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if done and self.path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= done]
        self.kept = [json.loads(line) for line in kept]
        losses = [entry["loss"] for entry in self.kept if "loss" in entry]
        if losses:
            self.last_loss = losses[-1]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

    def holds(self, name: str, step: int) -> bool:
        """Whether the previous run had logged it."""
        return any(name in entry and entry["step"] == step for entry in self.kept)

    def write(self, entry: dict[str, Any]) -> None:
        self.last_loss = entry.get("loss", self.last_loss)
        if self.path is not None:
            append_text(self.path, json.dumps(entry) + "\n")
        if self.board is not None:
            for name, value in entry.items():
                if name not in ("step", "memory"):
                    self.board.add_scalar(f"distill/{name}", value, int(entry["step"]))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short
