"""A database that an episode may change, without copying what it never touches."""

from __future__ import annotations

import copy
import json
from typing import Any


class Copies(dict[str, Any]):
    """A table whose rows are copied when they are first asked for by key; `values` and `items` show rows, and change none.

    Taking the table costs its length in pointers, a copy only the rows that a tool names.
    """

    def __init__(self, rows: dict[str, Any]):
        super().__init__(rows)
        self._rows, self._own = rows, set()

    def __getitem__(self, key: str) -> Any:
        if key not in self._own:
            super().__setitem__(key, copy.deepcopy(super().__getitem__(key)))
            self._own.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, row: Any) -> None:
        self._own.add(key)
        super().__setitem__(key, row)

    def get(self, key: str, default: Any = None) -> Any:
        """The row, an own copy."""
        return self[key] if key in self else default  # noqa: SIM401  (this is that method)

    def changed(self) -> dict[str, str | None]:
        """The rows that differ from the table's, as JSON; None for one that is gone."""
        gone: dict[str, str | None] = {key: None for key in self._rows.keys() - self.keys()}
        now = {key: as_json(super(Copies, self).__getitem__(key)) for key in sorted(self._own & self.keys())}
        return gone | {key: row for key, row in now.items() if key not in self._rows or row != as_json(self._rows[key])}


def as_json(row: Any) -> str:
    """A row as the official hash of the database reads it."""
    return json.dumps(row.model_dump() if hasattr(row, "model_dump") else row, sort_keys=True, default=str)
