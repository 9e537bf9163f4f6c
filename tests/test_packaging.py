"""What is installed: what an import loads, what a build needs, and the package that is made where nothing can be compiled."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIST = (ROOT / "requirements" / "cpu.txt").read_text()
PINNED = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", LIST, re.M)}

LOADS = """
import json, sys
import gear_kernels
lazy = [name for name in ("triton", "transformers", "deepspeed", "vllm", "trl", "gear_kernels._native") if name in sys.modules]
import torch
gear_kernels.token_stats(torch.zeros(2, 9000), stats=("entropy",))
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
pools = sorted({line.split()[-1] for line in maps.splitlines() if "libgomp" in line})
print(json.dumps([lazy, pools, gear_kernels.__version__]))
"""


def test_an_import_loads_torch_alone_and_the_compiled_module_brings_no_second_openmp():
    """In a process of its own, without the variable that makes tests load Triton."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOADS], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lazy, pools, version = json.loads(done.stdout.splitlines()[-1])
    assert lazy == [] and len(pools) <= 1 and re.match(r"\d+\.\d+", version)


def test_a_build_needs_no_torch_and_only_what_the_tested_set_pins():
    """`make venv` builds without isolation, so all that the build requires has to stand in the list."""
    needed = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in PROJECT["build-system"]["requires"]}
    assert "torch" not in needed and needed <= PINNED


def test_classifiers_name_the_pythons_that_the_workflow_builds_for():
    versions = [c.split(" :: ")[-1] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert versions[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    built = re.findall(r"cp3(\d+)-", PROJECT["tool"]["cibuildwheel"]["build"])
    assert [f"3.{minor}" for minor in built] == versions[: len(built)]  # the last of them serves all that follow


BUILD = "import sys; from scikit_build_core.setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_and_says_what_is_missing(tmp_path):
    """Outside of git too: the version is then the fallback."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in ("gear_kernels", "gear_trainer"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "PYTHONPATH")}
    env |= {"PATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "without its compiled CPU module (no C++ compiler was found)" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "gear_kernels-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("gear_kernels/py.typed", "gear_trainer/configs/mathapi_cpu.yaml", "gear_trainer/report/report.html.jinja"):
        assert name in names
    page = ROOT / "gear_trainer" / "report" / "page"
    assert {path.relative_to(ROOT).as_posix() for path in page.rglob("*") if path.is_file()} <= set(names)
    sources = (path for package in ("gear_kernels", "gear_trainer") for path in (ROOT / package).rglob("*.py"))
    shipped = {path.relative_to(ROOT).as_posix() for path in sources}
    assert shipped <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs")) or "csrc" in name or ".so" in name]
