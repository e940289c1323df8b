"""Sampling at the speed of an unguided model: what does not move with x_t computed ahead, the rest as one graph a step."""

from agd_fast.engine.config import EngineConfig
from agd_fast.engine.optimize import engine_of, optimize

__all__ = ["EngineConfig", "engine_of", "optimize"]
