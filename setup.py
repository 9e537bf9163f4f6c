"""Metadata is in pyproject.toml; this file hands CMakeLists.txt to the scikit-build-core plugin, and says what happens where the
compiled module cannot be built: a package without it, which computes in plain torch.
"""

import os
import shutil
import sys

from scikit_build_core.errors import FailedLiveProcessError, NotFoundError
from scikit_build_core.setuptools.build_cmake import BuildCMake
from setuptools import setup

COMPILERS = ("c++", "g++", "clang++")  # what CMake looks for, where CXX is not set


class OptionalModule(BuildCMake):
    """The compiled module where it can be built, else one line that says what is missing and a pure wheel.

    In an editable install, which is a developer's, sources that do not compile stay an error.
    """

    def run(self):
        try:
            super().run()
        except (FailedLiveProcessError, NotFoundError) as error:
            if self.editable_mode and str(error) != "CMake configuration failed":
                raise
            print(f"gear-kernels is built without its compiled CPU module ({missing(error)}): it computes in plain torch.")
            print("With a C++ compiler and Python's headers, install it again: pip install --no-cache-dir --force-reinstall")
            self.distribution.has_ext_modules = lambda: False
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True
            self.get_finalized_command("bdist_wheel").py_limited_api = False


def missing(error):
    """What the build lacks, in a few words."""
    if isinstance(error, NotFoundError):
        return str(error)
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))):
        return "no C++ compiler was found"
    return f"{error}; the lines above say why"


# One module for all Pythons from 3.12 on, by the stable ABI; 3.11, whose stable ABI lacks what nanobind needs, gets its own.
STABLE = {"bdist_wheel": {"py_limited_api": "cp312"}} if sys.version_info >= (3, 12) else {}

setup(cmake_source_dir=".", cmdclass={"build_cmake": OptionalModule}, options=STABLE)
