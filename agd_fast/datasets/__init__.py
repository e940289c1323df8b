"""Data and models that ship with the package, and readers of prompts and inputs."""

from agd_fast.datasets.captions import captions
from agd_fast.datasets.digits import digits_classifier, digits_images, digits_teacher
from agd_fast.datasets.rows import read_inputs, read_prompts

__all__ = ["captions", "digits_classifier", "digits_images", "digits_teacher", "read_inputs", "read_prompts"]
