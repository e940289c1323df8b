"""How a training run saves memory: a context around its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from agd_fast.distillation.residency import moved
from agd_fast.memory.base_weights import PackedBase, packed_base
from agd_fast.memory.blocks import checkpointing
from agd_fast.memory.choose import Choice
from agd_fast.memory.frozen_backward import frozen_backward
from agd_fast.warning import warn


class Economy:
    """A context: inside, the first way decides what the denoiser keeps for backward and how its weights are kept.

    choice: the ways that may be tried, the chosen one first. device: where the denoiser is moved from host memory inside;
    None leaves it where it is.
    """

    def __init__(self, denoiser: nn.Module, choice: Choice, device: torch.device | None = None) -> None:
        self.denoiser, self.way, self.reason, self.device = denoiser, choice.ways[0], choice.reason, device
        self._further = choice.ways[1:2]  # a second try, no third
        self._base: PackedBase | None = None
        self._before: dict[str, str] | None = None
        self._around_base, self._around_forward = ExitStack(), ExitStack()

    def __enter__(self) -> Economy:
        try:
            self._enter_base()
            self._enter_forward()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._around_forward.close()
        self._base = None
        self._around_base.close()

    def _enter_base(self) -> None:
        if self.way.base_weights is not None:
            self._base = self._around_base.enter_context(packed_base(self.denoiser, self.way.base_weights, self.device))
        elif self.device is not None:
            self._around_base.enter_context(moved([self.denoiser], self.device))

    def _enter_forward(self) -> None:
        if self.way.blocks:
            self._around_forward.enter_context(checkpointing(self.denoiser))
        if self.way.kept is not None:
            self._around_forward.enter_context(frozen_backward(self.denoiser, activations=self.way.kept))

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint stores: the way, without the number of states per forward, which makes no difference."""
        return {"way": str(replace(self.way, micro_batch_size=None))}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self._before = state

    def goes_on_at(self, step: int) -> bool:
        """Whether the steps so far, those of a checkpoint, were done in another way; `reason` then says so."""
        other = self._before not in (None, self.state_dict())
        if other and self._before:
            self.reason = f"{self.way}, after {self._before['way']} until step {step}"
        return other

    def fall(self, step: int) -> bool:
        """Go on in the next way, with a warning; False if there is none left."""
        if not self._further:
            return False
        before, (self.way,) = self.way, self._further
        self._further = ()
        self.reason = f"{self.way}, after {before} ran out of memory at step {step}"
        warn(f"memory='auto': {before} ran out of memory at step {step}; going on with {self.way}")
        self._around_forward.close()
        if self.way.base_weights != before.base_weights:
            self._around_base.close()
            self._enter_base()
        self._enter_forward()
        return True

    @contextmanager
    def base_restored(self) -> Iterator[None]:
        """Inside, the base has its original weights: what is measured is what a user gets."""
        if self._base is None:
            yield
            return
        with self._base.restored():
            yield
