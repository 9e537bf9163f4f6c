"""`python -m benchmarks.credit_truth.evidence [--write]`: scores the committed files anew and fails if a figure moved.

The files are benchmarks/results/credit_truth/*.parquet, the figures stand in a .json beside each. Synthetic trajectories, made
from their seed each time, are scored too: they show that the computation is what it was, and nothing about any method.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gear_trainer.audit.file import write
from gear_trainer.errors import ConfigError

from ..harness.environment import RESULTS, ROOT
from . import synthetic
from .__main__ import as_text, scored
from .foretold import scored_arms
from .methods import entries

FOLDER = RESULTS / "credit_truth"
SYNTHETIC = "synthetic"
STUDY, STUDY_START, STUDY_ARMS = ROOT / "examples" / "credit_study" / "study.yaml", "chains_spare", "credit_study_arms"
RESAMPLES = 200
TOLERANCE = 1e-4  # sums in another order move a figure by 1e-6 at most; printed are three digits


def figures(folder: Path, work: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The .json of the synthetic trajectories, of each file of the folder and of a study's arms, and what it should say."""
    made = work / f"{SYNTHETIC}.parquet"
    write(made, synthetic.columns(problems=12, turn=20), synthetic.ABOUT)
    for path in (made, *sorted(folder.glob("*.parquet"))):
        yield folder / f"{path.stem}.json", scored(path, entries([]), RESAMPLES)
    if (start := folder / f"{STUDY_START}.parquet").is_file():
        yield folder / f"{STUDY_ARMS}.json", scored_arms(STUDY, start, RESAMPLES)


def moved(then: Any, now: Any, where: str = "") -> list[str]:
    """A line for each place at which two figures' plain data differ: numbers by more than TOLERANCE, all else at all."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for key in {**then, **now} for line in moved(then.get(key), now.get(key), f"{where}/{key}")]
    if isinstance(then, list) and isinstance(now, list):
        return moved(_named(then), _named(now), where)
    numbers = all(isinstance(x, (int, float)) for x in (then, now))
    if abs(then - now) <= TOLERANCE if numbers else then == now:
        return []
    if isinstance(then or now, dict):  # a whole row
        return [f"{where}: {'new' if then is None else 'gone'}"]
    return [f"{where}: {then} then, {now} now"]


def _named(items: list[Any]) -> dict[str, Any]:
    """A list's items by name: a row of the table by its method and teacher, any other by its place."""
    return {f"{x['method']}, {x['teacher']}" if isinstance(x, dict) else str(i): x for i, x in enumerate(items)}


def check(folder: Path, found: Iterator[tuple[Path, dict[str, Any]]]) -> int:
    """Print what moved; 1 where something did, or a file has no figures."""
    lines = []
    for path, now in found:
        if not path.is_file():
            lines.append(f"{path.name}: not there: --write makes it")
            continue
        differing = moved(json.loads(path.read_text()), now)
        print(f"{path.name}: {len(now['rows'])} rows, {len(differing)} figures moved")
        lines += [f"{path.name}{line}" for line in differing]
    if not any(folder.glob("*.parquet")):
        print("no audited files yet: only the synthetic trajectories were scored, which measure nothing")
    print(*lines[:40], *([f"and {len(lines) - 40} more"] if len(lines) > 40 else []), sep="\n", end="")
    return 1 if lines else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the committed figures, or write them anew; 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.credit_truth.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the figures anew, for a commit that says why they moved")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where files and figures stand")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        try:
            found = figures(given.folder, Path(work))
            if not given.write:
                return check(given.folder, found)
            given.folder.mkdir(parents=True, exist_ok=True)
            for path, now in found:
                path.write_text(as_text(now))
                print(f"written: {path}")
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
