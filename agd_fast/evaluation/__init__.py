"""Measuring an adapter: likeness to the data, fidelity to CFG, speed."""

from agd_fast.evaluation.evaluate import Evaluation, Reference, evaluate
from agd_fast.evaluation.explained import Explained, States, guidance_explained
from agd_fast.evaluation.frechet import frechet_distance
from agd_fast.evaluation.precision_recall import precision_recall

__all__ = [
    "Evaluation",
    "Explained",
    "Reference",
    "States",
    "evaluate",
    "frechet_distance",
    "guidance_explained",
    "precision_recall",
]
