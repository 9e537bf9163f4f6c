"""Data files of a task: JSON lines, with the file and the line of what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import TaskError


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file of JSON lines, with the words "file, line n". Raises TaskError that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"data file {path} cannot be read ({error}): give the path of a UTF-8 file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{where} is not valid JSON ({error}): mend or delete that line") from error
        if not isinstance(row, dict):
            raise TaskError(f"{where} is not a JSON object: mend or delete that line")
        yield where, row
