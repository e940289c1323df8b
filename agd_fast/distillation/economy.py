"""The way in which a training run saves memory, around its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from agd_fast.memory.base_weights import PackedBase, packed_base
from agd_fast.memory.blocks import checkpointing
from agd_fast.memory.choose import Choice
from agd_fast.memory.frozen_backward import frozen_backward
from agd_fast.warning import warn


class Economy:
    """A context: inside, the denoiser keeps for backward, and its weights are, what the first way says.

    choice: the ways that may be tried, the chosen one first.
    """

    def __init__(self, denoiser: nn.Module, choice: Choice) -> None:
        self.denoiser, self.way, self.reason = denoiser, choice.ways[0], choice.reason
        self._further = choice.ways[1:2]  # a second try, no third
        self._base: PackedBase | None = None
        self._around_base, self._around_forward = ExitStack(), ExitStack()

    def __enter__(self) -> Economy:
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._around_forward.close()
        self._base = None
        self._around_base.close()

    def _enter(self) -> None:
        kind, mode = self.way.base_weights, self.way.kept
        if kind is not None and self._base is None:
            self._base = self._around_base.enter_context(packed_base(self.denoiser, kind))
        if self.way.blocks:
            self._around_forward.enter_context(checkpointing(self.denoiser))
        if mode is not None:
            self._around_forward.enter_context(frozen_backward(self.denoiser, activations=mode))

    def fall(self, step: int) -> bool:
        """Go on in the next way, saying so; False where there is none left."""
        if not self._further:
            return False
        before, (self.way,) = self.way, self._further
        self._further = ()
        self.reason = f"{self.way}, after {before} ran out of memory at step {step}"
        warn(f"memory='auto': {before} ran out of memory at step {step}; going on with {self.way}")
        self._around_forward.close()
        self._enter()
        return True

    @contextmanager
    def base_restored(self) -> Iterator[None]:
        """Inside, the base has its own weights: what is measured is what a user gets."""
        if self._base is None:
            yield
            return
        with self._base.restored():
            yield
