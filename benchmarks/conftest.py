"""Options and the table of the pytest benchmarks: `python -m pytest benchmarks [--full] [--benchmark-json=FILE]`."""

import pytest
from rich.console import Console
from rich.table import Table

from .harness.peers import OURS
from .harness.tables import is_wrong

_COLUMNS = (
    "median ms",
    "quartiles ms",
    "time / ours",
    "MB to move",
    "GB/s",
    "TFLOP/s",
    "extra MiB",
    "output error",
    "gradient error",
)
_WIDTH = 160
LEGEND = (
    "time / ours: of the medians. MB to move: what cannot be saved; GB/s and TFLOP/s: that, and the products that cannot be "
    "saved, over the median. Errors: the largest against float64; outputs in nats, gradients relative to their largest entry."
)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="also peers that compile at their first call, and Qwen3's heads (minutes)"
    )


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table has neither ratios to ours nor memory nor errors; the JSON file has all


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """A table beside pytest-benchmark's own, of what that leaves out: ratios, what must move, peak memory and error."""
    session = getattr(config, "_benchmarksession", None)
    found = [one for one in session.benchmarks if one.extra_info] if session else []
    shown = Table("", *_COLUMNS, title="benchmarks on this machine's CPU")
    for group in dict.fromkeys(one.group for one in found):
        shown.add_row(group, style="bold")
        rows = [one for one in found if one.group == group]
        ours = next((one.stats.median for one in rows if one.extra_info["name"] == OURS), None)
        for one in rows:
            shown.add_row(*_cells(one, ours), style="red" if _wrong(one) else None)
    if found:
        console = Console(file=terminalreporter._tw, width=_WIDTH)
        console.print(shown)
        console.print(LEGEND)


def _wrong(one) -> bool:
    return any(is_wrong(name, error) for name, error in one.extra_info["errors"].items())


def _cells(one, ours: float | None) -> list[str]:
    info, times = one.extra_info, one.stats
    grads = {name: error for name, error in info["errors"].items() if name.startswith("grad")}
    values = {name: error for name, error in info["errors"].items() if name not in grads}
    return [
        f"  {info['name']}",
        f"{times.median * 1e3:.4g}",
        f"{times.q1 * 1e3:.3g}-{times.q3 * 1e3:.3g}",
        f"{times.median / ours:.2f}" if ours else "",
        f"{info['bytes'] / 1e6:.1f}",
        f"{info['gb_s']:.2f}",
        f"{info['tflop_s']:.3f}" if info["tflop_s"] else "",
        "" if info["extra_mib"] is None else f"{info['extra_mib']:.1f}",
        *(_worst(errors) for errors in (values, grads)),
    ]


def _worst(errors: dict[str, float]) -> str:
    if not errors:
        return ""
    return f"{'WRONG ' if any(is_wrong(*one) for one in errors.items()) else ''}{max(errors.values()):.1e}"
