"""`python -m benchmarks.credit_truth FILE... [--method module:Class]... [--out DIR]`: score credit methods on audited files.

Prints a table of each file and writes it as FILE's name with .json, with pictures beside it. Files are scored one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gear_trainer.audit.file import UNKNOWN_DEVIATION
from gear_trainer.errors import ConfigError

from .measures import MEASURES
from .methods import LEFT_OUT, Entry, entries
from .pictures import draw
from .rollouts import Rollouts, load
from .scoring import as_json, score, teaching
from .sweeps import sweep

RESAMPLES = 1000


def scored(path: Path, methods: list[Entry], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All that is said of one file, as plain data: what is in it, the table's rows, the sweeps. Raises ConfigError."""
    everything, about = load(path)
    rollouts = teaching(everything)
    swept = next(iter(rollouts.teachers), None)
    return {
        "file": path.name,
        "about": about,
        "resamples": resamples,
        "seed": seed,
        "trajectories": len(everything),
        **_counts(rollouts),
        "left_out": LEFT_OUT,
        "rows": as_json(score(rollouts, methods, resamples, seed)),
        "swept": swept,
        "sweeps": sweep(rollouts, swept) if swept else {},
    }


def as_text(found: dict[str, Any]) -> str:
    """The JSON with a line for each row: what moved shows in a diff."""
    lines = {key: json.dumps(value) for key, value in found.items()}
    lines["rows"] = "[\n" + ",\n".join(json.dumps(row) for row in found["rows"]) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in lines.items()) + "\n}\n"


def _counts(r: Rollouts) -> dict[str, int | float]:
    against = (r.truth * r.over_tokens(r.rows["advantage"]) < 0)[r.decided]
    return {
        "teaching": len(r),
        "policy_tokens": int(r.lengths.sum()),
        "decided_tokens": int(r.decided.sum()),
        "decided_of_other_sign": round(float(against.mean()), 6) if len(against) else 0.0,
        "deviated": int((r.deviation >= 0).sum()),
        "deviation_unknown": int((r.rows["deviation"] == UNKNOWN_DEVIATION).sum()),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print a file's table: values with their intervals; a star where the difference from grpo's is surely not 0."""
    table = Table(title=_heading(found), title_justify="left", caption=_LEGEND, caption_justify="left")
    for head in ("method", "teacher", "n"):
        table.add_column(head, no_wrap=True)
    for name in MEASURES:
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in found["rows"]:
        if last and row["method"] != last:
            table.add_section()
        last = row["method"]
        cells = [_cell(row["figures"][name], row["over_grpo"][name]) for name in MEASURES]
        table.add_row(row["method"], row["teacher"], str(row["trajectories"]), *cells)
    # wider than most terminals; squeezed into one, figures would be cut
    wanted = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.width = max(console.width, wanted)
    console.print(table)
    for name, why in found["left_out"].items():
        console.print(f"{name}: not scored: it {why}")


_LEGEND = (
    "±: half of the 95 % interval by bootstrap over trajectories, of alignment and snr over problems. *: the interval of the "
    "difference from grpo's, by the same draws, leaves out 0. An empty cell: nothing to measure. What each column asks and what "
    "it is blind to: docs/credit_truth.md."
)


def _heading(found: dict[str, Any]) -> str:
    about = found["about"]
    return (
        f"{found['file']}: {about.get('task')}, {about.get('model')}. {found['trajectories']} trajectories, {found['teaching']} "
        f"with an advantage; {found['decided_tokens']} of their {found['policy_tokens']} policy tokens are decided, "
        f"{found['decided_of_other_sign']:.1%} of these against the advantage's sign; {found['deviated']} deviated"
        + (f", of {found['deviation_unknown']} it is not known" if found["deviation_unknown"] else "")
    )


def _cell(figure: Sequence[float | None], over: Sequence[float | None]) -> str:
    value, low, high = figure
    if value is None:
        return ""
    text = f"{value:.3f}" if low is None or high is None else f"{value:.3f} ±{(high - low) / 2:.3f}"
    differs = over[1] is not None and over[2] is not None and (over[1] > 0 or over[2] < 0)
    return f"{text}*" if differs else f"{text} "


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the files that are named; 2 where one of them cannot be read or a method cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.credit_truth", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Parquet files of `gear-trainer audit`")
    parser.add_argument("--method", action="append", default=[], metavar="module:Class", help="a method of your own, too")
    parser.add_argument("--out", type=Path, default=Path("build/credit_truth"), help="folder of JSON and pictures")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="draws behind an interval")
    parser.add_argument("--seed", type=int, default=0, help="of these draws")
    given = parser.parse_args(arguments)
    if given.resamples < 1:
        parser.error(f"--resamples {given.resamples}: give at least 1")
    console = Console()
    try:
        methods = entries(given.method)
        for path in given.files:
            found = scored(path, methods, given.resamples, given.seed)
            show(found, console)
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{path.stem}.json").write_text(as_text(found))
            pictures = draw(found, given.out / path.stem)
            console.print(f"written: {', '.join(str(p) for p in (given.out / f'{path.stem}.json', *pictures))}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
