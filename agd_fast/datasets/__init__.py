"""Data and models that ship with the package."""

from agd_fast.datasets.digits import digits_classifier, digits_images, digits_teacher

__all__ = ["digits_classifier", "digits_images", "digits_teacher"]
