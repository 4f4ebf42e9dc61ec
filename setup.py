"""Maps the project's rooms into one import package, `penstock`, so that an install never claims a bare name.

The folders `kernels`, `conf` and `benchmarks` would be import names of their own if they were installed as they lie;
a user's environment may already hold others under these names (Hugging Face's `kernels`, for one).
"""

from setuptools import find_namespace_packages, setup

ROOMS = ("lightning_modules", "datamodules", "kernels", "conf", "benchmarks")

setup(
    packages=[
        f"penstock.{p}"
        for room in ROOMS
        for p in (room, *(f"{room}.{s}" for s in find_namespace_packages(room, exclude=["results"])))
    ],
    package_dir={f"penstock.{room}": room for room in ROOMS},
    package_data={"": ["*.yaml"]},
)
