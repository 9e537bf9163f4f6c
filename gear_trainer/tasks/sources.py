"""Rows of data files and hub data sets, each with the place that an error names: .jsonl, .json, .csv, .parquet, or owner/name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import DataAway, TaskError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Rows = Iterator[tuple[str, Any]]  # the place, as `data.jsonl, line 3`, and what stands there


def source(path: str, subset: str | None = None, split: str = "train") -> Rows:
    """The rows of a file, or of a hub data set's subset and split; each is what its format holds, mostly a dict.

    Raises TaskError where there is no such file, or at its first broken line; DataAway where the hub is out of reach.
    """
    file = Path(path).expanduser()
    if file.suffix not in FILES and not file.exists() and _HUB_NAME.fullmatch(path):
        return _hub_rows(path, subset, split)
    if file.is_dir():
        raise TaskError(f"data file {path} is a directory: give the path of a .jsonl or .parquet file in it")
    if not file.is_file():
        raise TaskError(f"data file {path} does not exist: give the path of a .jsonl or .parquet file, or a hub name owner/set")
    if file.suffix not in FILES:
        raise TaskError(f"data file {path} must be a .jsonl or .parquet file (or one of {', '.join(FILES)})")
    return FILES[file.suffix](file)


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where} is not valid JSON ({error}): mend or delete that line") from error


def _json_array(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise TaskError(f"{path} is not valid JSON ({error}): mend it") from error
    if not isinstance(rows, list):
        raise TaskError(f"{path} holds no JSON array: give a list of objects, or a .jsonl with one object a line")
    yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise TaskError(f"{where} has another number of fields than the header: mend or delete that line")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise TaskError(
                f"{path}, line {reader.reader.line_num} is not valid CSV in UTF-8 ({error}): mend or delete it"
            ) from error


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{path}: reading parquet needs the package pyarrow: pip install pyarrow, or give a .jsonl") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise TaskError(f"{path} is not a readable parquet file ({error}): copy it again") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
    ".json": _json_array,
    ".csv": _csv_rows,
}


def _hub_rows(name: str, subset: str | None, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DataAway(
            f"{name!r} is no file, so it is read as a hub data set, which needs the package datasets: pip install datasets, "
            "or give the path of a .jsonl or .parquet file"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises a family of its own for every network and name problem
        kind = DataAway if isinstance(error, ConnectionError) else TaskError
        raise kind(f"hub data set {name!r} (subset {subset!r}, split {split!r}) cannot be loaded: {error}") from error
    return ((f"{name}, {split}, row {number}", row) for number, row in enumerate(rows, 1))
