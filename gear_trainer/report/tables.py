"""Tables of text, which a page, a Markdown file and the terminal show alike; and numbers as they stand in them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table: its title, the names of its columns, rows of as many texts each, and what is to be known of it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    said: str = ""


class Interval(NamedTuple):
    """A mean with its 95 % interval, None where there is none. sure: it stands apart from what it is held against."""

    name: str
    mean: float
    low: float | None
    high: float | None
    sure: bool = True


class Intervals(NamedTuple):
    """Intervals of one measure, drawn one under the other; around 0 where they are differences, else from 0 to 1."""

    title: str
    differences: bool
    rows: list[Interval]


def described(name: str, kind: str, **more: Any) -> dict[str, Any]:
    """A run, an audit, an evaluation or a study (`kind`) as a page is told of it: `more`, and nothing that only others have."""
    nothing = {
        "said": "", "credit": "", "method": None, "task": "", "state": kind, "why": "", "step": 0, "steps": 0, "series": {},
        "recorded": [], "config": "", "warnings": [], "tables": [], "intervals": [], "arms": [],
    }  # fmt: skip
    return {"name": name, "kind": kind} | nothing | more


def markdown(table: Table) -> str:
    """The table as Markdown, under its title."""
    return "\n\n".join(part for part in (f"## {table.title}", grid(table.head, table.rows), table.said) if part)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table's lines of Markdown."""
    plain = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *plain])


def number(value: float | None, digits: int = 3) -> str:
    """The number with so many digits behind the point; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def p_value(p: float | None) -> str:
    """A test's p; a dash where there was no test."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def with_interval(value: float | None, low: float | None, high: float | None, spec: str = ".3f", none: str = "-") -> str:
    """A figure with its interval, alone where it has no interval; `none` where there is no figure."""
    if value is None:
        return none
    return f"{value:{spec}}" if low is None or high is None else f"{value:{spec}} ({span(low, high, spec)})"


def span(low: float, high: float, spec: str = ".3f") -> str:
    """An interval by its ends."""
    return f"{low:{spec}} to {high:{spec}}"
