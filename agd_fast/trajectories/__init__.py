"""States of the teacher's guided trajectories on disk: safetensors shards and a manifest."""

from agd_fast.trajectories.collect import Source, collect
from agd_fast.trajectories.dataset import Batch, Trajectories

__all__ = ["Batch", "Source", "Trajectories", "collect"]
