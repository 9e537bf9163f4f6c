"""The paths that model code may read: an interpreter, its standard library, named libraries; nothing of the run or the data.

site-packages is not among them: a benchmark's package keeps its answers there. Libraries are found through a folder of links.
"""

from __future__ import annotations

import glob
import sys
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("sympy", "mpmath", "numpy", "scipy")  # those of them that are installed
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_OTHERS = ("site-packages", "dist-packages")


def interpreter() -> str:
    """The path of this Python's own binary, behind a virtual environment's link."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _own_files() -> list[str]:
    """The interpreter with its shared and its standard library, without the folders of installed packages."""
    libraries = Path(sysconfig.get_config_var("LIBDIR") or Path(sys.base_prefix) / "lib").resolve()
    standard = Path(sysconfig.get_path("stdlib")).resolve()  # as the interpreter finds it from its own resolved path
    found = [interpreter(), *glob.glob(f"{libraries}/lib*.so*")]
    return found + [str(path) for path in standard.iterdir() if path.name not in _OTHERS]


def package_paths(name: str) -> list[Path]:
    """The folder (or file) of an installed package, and the folder of shared libraries that a wheel keeps beside it."""
    spec = find_spec(name)
    if spec is None or not spec.origin:
        return []
    origin = Path(spec.origin)
    package = origin.parent if spec.submodule_search_locations else origin
    beside = package.parent / f"{name}.libs"
    return [package, beside] if beside.is_dir() else [package]


def readable(library: Path, names: Iterable[str]) -> list[str]:
    """Fill the empty folder `library` with links to the packages, and list all that their user has to read, itself included."""
    found = [str(library), *(path for path in _SYSTEM if Path(path).exists()), *_own_files()]
    for name in names:
        for path in package_paths(name):
            (library / path.name).symlink_to(path.resolve())
            found.append(str(path.resolve()))
    covered = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")
    return [path for path in dict.fromkeys(found) if not path.startswith(covered)]
