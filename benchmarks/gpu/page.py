"""The GPU report as files: figures beside floors and goals, what failed, a table per phase, and a line for each item at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..harness.tables import finite, markdown_table
from .speed import UPDATE_LABEL

# milliseconds: what is aimed at, and the GEMMs alone at cuBLAS' 790 TFLOP/s (docs/architecture.md, Goals on a GPU)
GOALS = {
    ("default", "forward"): (28.5, 25.8),
    ("default", "forward+backward"): (85.0, 77.4),
    (UPDATE_LABEL, "forward+backward"): (55.0, 51.6),
}
GOAL_MIB = 0.3 * 1024  # beside the results
_UNSHOWN = ("floor_flops", "floor_bytes", "label", "passes")  # what floors and goals are found by
JOURNAL = "items.jsonl"


class Journal:
    """JOURNAL in a folder: a line for each outcome, on the disk before the next item begins."""

    def __init__(self, folder: Path, date: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._date = (folder / JOURNAL).open("a"), date

    def add(self, phase: str, outcome: dict) -> None:
        """Append an outcome, with its phase and the run's date."""
        self._file.write(json.dumps(finite({"run": self._date, "phase": phase, **outcome})) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def with_floors(report: dict) -> None:
    """Add to every time what the measured ceilings and the goals make of it, in place."""
    items = [item for result in report["phases"].values() for item in result["items"] if "figures" in item]
    tflop_s, gb_s = (_best(report, unit) for unit in ("tflop_s", "gb_s"))
    for figures in (item["figures"] for item in items if "ms" in item["figures"]):
        flops, moved = figures.get("floor_flops"), figures.get("floor_bytes")
        floor = flops / tflop_s / 1e9 if flops and tflop_s else moved / gb_s / 1e6 if moved and gb_s else None
        if floor:
            figures |= {"floor_ms": floor, "of_roofline": floor / figures["ms"]}
        goal = GOALS.get((figures.get("label"), figures.get("passes")))
        if goal and not report["self_test"]:
            figures |= {"goal_ms": goal[0], "design_floor_ms": goal[1], "goal_met": figures["ms"] <= goal[0]}
            figures |= {"goal_mib": GOAL_MIB, "memory_met": figures["beside_results_mib"] <= GOAL_MIB}


def _best(report: dict, unit: str) -> float | None:
    found = [i.get("figures", {}) for phase in ("card", "ceilings") for i in report["phases"].get(phase, {}).get("items", [])]
    return max((figures[unit] for figures in found if unit in figures), default=None)


def failures(report: dict) -> list[str]:
    """A line for each item that failed, and for each strict phase that was cut short."""
    found = []
    for phase, result in report["phases"].items():
        found += [f"{phase}: {i['name']}: {i['reason']}" for i in result["items"] if i["status"] == "failed"]
        if result["missed"] and result["strict"]:
            found.append(f"{phase}: {result['missed']} items were not reached")
    return found


LEGEND = (
    "ms: median (low, high: quartiles) of a warm call on the device. clock: below 1 ms a CUDA graph of many calls, divided; "
    "above, events around calls that were enqueued behind a busy device. host_us: until a call returns, apart; where it is the "
    "longer, callers wait for the host. alone_ms: one call on an idle device, its start included. first_s: the first call, with "
    "its compiling. extra_mib: peak memory above what was held; beside_results_mib: without the gradients. error: against "
    "float64, in nats, the largest of the outputs named on 32 rows. floor_ms: the GEMMs (jsd: made twice) or the bytes that must "
    "be moved, at the best ceiling above; of_roofline: floor / time. A peer that gives less is held against the same floor."
)
_TIMED = ("card", "ceilings", "headline", "speed", "shapes", "overheads", "peers", "tiles", "blocks", "scan")


def markdown(report: dict) -> str:
    """The whole report; a table per phase."""
    head = f"{report['date']}, {report['seconds']:.0f} s." + (" Self-test: figures mean nothing." if report["self_test"] else "")
    lines = ["# GPU report", "", head, ""]
    wrong = failures(report)
    lines += ["**Failures**", "", *[f"- {_plain_text(line)}" for line in wrong]] if wrong else ["No failures."]
    for phase, result in report["phases"].items():
        counts = {s: sum(i["status"] == s for i in result["items"]) for s in ("passed", "failed", "skipped")}
        lines += ["", f"## {phase}", "", ", ".join(f"{n} {s}" for s, n in counts.items()) + f", {result['missed']} not reached"]
        lines += ["", LEGEND] if phase in _TIMED and not any(line == LEGEND for line in lines) else []
        for item in (i for i in result["items"] if "traceback" in i and result["vital"]):
            lines += ["", f"{item['name']}:", "", "```", item["traceback"].rstrip(), "```"]
        lines += ["", *(_machine_lines(result) if phase == "machine" else _table(result["items"]))]
    return "\n".join(lines) + "\n"


def _machine_lines(result: dict) -> list[str]:
    return [f"- {k}: {_cell(v)}" for i in result["items"] for k, v in i.get("figures", {}).items()]


def _table(items: list[dict]) -> list[str]:
    heads = list(dict.fromkeys(name for item in items for name in item.get("figures", {}) if name not in _UNSHOWN))
    rows = []
    for item in items:
        cells = [_cell(item.get("figures", {}).get(name)) for name in heads]
        status = item["status"] + (f": {_plain_text(item['reason'])}" if "reason" in item else "")
        rows.append([item["name"], status, *cells, _cell(item["seconds"])])
    return markdown_table(["item", "status", *heads, "s"], rows)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _plain_text(str(value))


def _plain_text(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


def line(outcome: dict) -> str:
    """An item's outcome in a line of the terminal."""
    wanted = ("ms", "host_us", "gb_s", "tflop_s", "error", "gradient_error")
    figures = {k: v for k, v in outcome.get("figures", {}).items() if k in wanted}
    shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
    return f"{outcome['name']}: {outcome['status']} {shown}{outcome.get('reason', '')}"


def write(report: dict, folder: Path) -> Path:
    """gpu_<device>_<date>.json and .md, with the call's name if it has one; the path of the latter."""
    figures = next((i["figures"] for i in report["phases"]["machine"]["items"] if "figures" in i), {"device": "unknown"})
    device = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    path = folder / f"gpu_{device}_{report['date'][:10]}{'_call' * bool(report['call'])}{report['call']}.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(finite(report), indent=1) + "\n")
    path.write_text(markdown(report))
    return path
