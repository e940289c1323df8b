"""Sampling at the speed of an unguided model: work that does not depend on x_t is done ahead, a step runs as one graph."""

from agd_fast.engine.config import EngineConfig
from agd_fast.engine.optimize import engine_of, optimize

__all__ = ["EngineConfig", "engine_of", "optimize"]
