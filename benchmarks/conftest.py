"""Options and the table of the pytest benchmarks: `python -m pytest benchmarks [--compiled] [--benchmark-json=FILE]`."""

import pytest
from rich.console import Console
from rich.table import Table

_COLUMNS = ("median ms", "quartiles ms", "MB moved", "GB/s", "extra MiB", "worst output error", "worst gradient error")


def pytest_addoption(parser):
    parser.addoption("--compiled", action="store_true", help="also the peers that compile at their first call (minutes)")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark's own table leaves out: bytes moved, peak memory and error beside the times."""
    session = getattr(config, "_benchmarksession", None)
    found = [one for one in session.benchmarks if one.extra_info] if session else []
    shown = Table("", *_COLUMNS, title="benchmarks on this machine's CPU")
    for group in dict.fromkeys(one.group for one in found):
        shown.add_row(group, style="bold")
        for one in (one for one in found if one.group == group):
            shown.add_row(*_cells(one))
    if found:
        Console(file=terminalreporter._tw, width=160).print(shown)


def _cells(one) -> list[str]:
    info, times = one.extra_info, one.stats
    grads = [error for name, error in info["errors"].items() if name.startswith("grad")]
    values = [error for name, error in info["errors"].items() if not name.startswith("grad")]
    memory = "" if info["extra_mib"] is None else f"{info['extra_mib']:.1f}"
    spread = f"{times.q1 * 1e3:.3g}-{times.q3 * 1e3:.3g}"
    errors = [f"{max(e):.1e}" if e else "" for e in (values, grads)]
    return [
        f"  {info['name']}",
        f"{times.median * 1e3:.4g}",
        spread,
        f"{info['bytes'] / 1e6:.1f}",
        f"{info['gb_s']:.2f}",
        memory,
        *errors,
    ]
