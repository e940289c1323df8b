"""Memory-efficient backward pass through frozen weights."""

from agd_fast.memory.estimate import MemoryEstimate, MemoryRow, estimate_memory
from agd_fast.memory.frozen_backward import frozen_backward
from agd_fast.memory.modes import MODES, Mode

__all__ = ["MODES", "MemoryEstimate", "MemoryRow", "Mode", "estimate_memory", "frozen_backward"]
