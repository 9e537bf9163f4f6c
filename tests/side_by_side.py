"""How `make test` runs the tests side by side: `pytest -n 2`, by pytest-xdist.

A file's tests stay in one worker, because they share what its fixtures made. Files are begun longest first, so that no long one
is left to the end. Each worker computes on its share of the cores: threads that wait for one another while a neighbour holds a
core cost more than they bring.
"""

import os

# The files that are begun first, by processor seconds, most first; one that is not here comes after these, in its place in the
# alphabet. The first makes the demo's warm start, which others that launch runs would wait for: until then three run that do not.
LONGEST = (
    "test_end_to_end.py", "test_stats.py", "test_credit.py", "test_benchmarks.py", "test_drills.py", "test_vllm_server.py",
    "test_two_hosts.py", "test_lora.py", "test_agent_rollouts.py", "test_gpu_report.py", "test_compile.py",
    "test_resharding.py", "test_config.py", "test_gates.py", "test_teacher.py", "test_performance_page.py",
    "test_where_models_live.py", "test_extending.py", "test_foreign_text.py", "test_compile_report.py", "test_sandbox.py",
    "test_integrations_trl.py", "test_math.py", "test_step_beside_trl.py", "test_warm_start.py", "test_oracle.py",
    "test_methods.py", "test_study.py",
)  # fmt: skip

# `slow` as a whole, beside what is marked so: about the instruments (benchmarks, gates, compile tables) or about torch.compile.
SLOW = (
    "test_benchmarks.py", "test_compile.py", "test_compile_report.py", "test_gates.py", "test_gpu_report.py",
    "test_parallel.py", "test_performance_page.py",
)  # fmt: skip
SLOW_TESTS = ("test_fuzz",)


def share_cores():
    """In a worker, before torch is loaded: this process, and what it starts, takes its share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def is_controller(config) -> bool:
    """Whether this process runs no test itself: it hands them to workers."""
    return config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")


def arrange(items):
    """Mark what is slow, and sort tests in place by what their file costs; tests of one file keep their order."""
    for item in items:
        if item.path.name in SLOW or getattr(item, "originalname", "") in SLOW_TESTS:
            item.add_marker("slow")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
