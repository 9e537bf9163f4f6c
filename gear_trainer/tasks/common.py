"""Small parts that task families share: teacher templates, and reading a number from an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gear_trainer.tasks.base import TaskError

SOLUTION = Path(__file__).with_name("solution.txt")  # a template with {prompt} and {answer}, where a family has none of its own

# A sign counts unless it stands behind a digit ("12-7" ends in 7); thousands commas are dropped; ASCII digits only.
_NUMBER = re.compile(r"(?<![0-9.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def last_number(text: str) -> str | None:
    """The last number written in a text, as text without thousands commas."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def same_number(text: str | None, truth: str) -> bool:
    """True where a number read by `last_number` equals the truth ("19.0" equals "19")."""
    return text is not None and float(text) == float(truth)


def load_template(path: str | None, default: Path, placeholders: Iterable[str]) -> str:
    """A prompt template: the user's file, or the shipped one; every placeholder must occur in it."""
    file = Path(path) if path else default
    try:
        text = file.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"template: cannot read {file} ({error}): give the path of a UTF-8 text file") from error
    missing = [f"{{{name}}}" for name in placeholders if f"{{{name}}}" not in text]
    if missing:
        raise TaskError(f"{file}: the placeholder {missing[0]} is missing: write it where its text shall stand")
    return text


def fill(template: str, **values: str) -> str:
    """Replace `{name}` by values in one pass, so braces in a problem's text (LaTeX) are never read as placeholders."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


def user(text: str) -> list[dict[str, str]]:
    """A chat of one user turn."""
    return [{"role": "user", "content": text}]


def taught(messages: list[dict[str, str]], template: str, answer: str) -> list[dict[str, str]]:
    """The chat with its last turn put into a template of {prompt} and {answer}: the teacher's view of it."""
    *head, last = messages
    return [*head, {**last, "content": fill(template, prompt=last["content"], answer=answer)}]
