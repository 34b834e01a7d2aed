"""Only what pyproject.toml cannot say: the kernels live in a source root of their own."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fastattn", "fastattn.*"]) + find_packages("kernels"),
    package_dir={"fastattn_kernels": "kernels/fastattn_kernels"},
)
