"""How `make test` runs the tests side by side: `pytest -n 2`, by pytest-xdist.

A file's tests stay in one worker, because they share what its fixtures made. Files are begun longest first, so that no long one
is left to the end. Each worker computes on its share of the cores: threads that wait for one another while a neighbour holds a
core cost more than they bring.
"""

import os

# The files above half a minute by their processor seconds on two cores, what a test starts included, longest first. The order
# alone counts; a file that is not here is begun after these, in its place in the alphabet.
LONGEST = (
    "test_drills.py", "test_end_to_end.py", "test_stats.py", "test_credit.py", "test_methods.py", "test_trainer.py",
    "test_compile_report.py", "test_benchmarks.py", "test_compile.py", "test_teacher.py", "test_config.py",
    "test_extending.py",
)  # fmt: skip


def share_cores():
    """In a worker, before torch is loaded: this process, and what it starts, takes its share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def is_controller(config) -> bool:
    """Whether this process runs no test itself: it hands them to workers."""
    return config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")


def longest_first(items):
    """Sorts tests in place by what their file costs; tests of one file keep their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
