"""Packages of the wheel: `agd_fast`, and `agd_fast_kernels` out of `kernels/`, which is laid out as Hugging Face's kernel builder
wants it.

`kernels/` has no `__init__.py`: at the repository root it would shadow Hugging Face's `kernels` package, which diffusers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["agd_fast", "agd_fast.*"]), "agd_fast_kernels"],
    package_dir={"agd_fast_kernels": "kernels/torch-ext/agd_fast_kernels"},
    package_data={
        "agd_fast": ["py.typed"],
        "agd_fast.datasets": ["assets/*", "assets/digits_teacher/*"],
        "agd_fast.reporting": ["*.jinja"],
    },
)
