"""All metadata is in pyproject.toml; this file only hands CMakeLists.txt to the scikit-build-core plugin."""

from setuptools import setup

setup(cmake_source_dir=".")
