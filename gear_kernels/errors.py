"""The one exception type of the package, and the checks that raise it."""

from __future__ import annotations

import math


class GearKernelsError(ValueError):
    """Bad input. The message says what was given, what was expected, and how to mend it."""


def bad_input(given: str, expected: str, mend: str) -> GearKernelsError:
    """Build the exception from its three parts: `given`, `expected` and `mend` are short clauses without a full stop."""
    return GearKernelsError(f"{given}; expected {expected}. To mend: {mend}.")


def require(condition: bool, given: str, expected: str, mend: str) -> None:
    """Raise `bad_input` unless the condition holds."""
    if not condition:
        raise bad_input(given, expected, mend)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    require(value in choices, f"{name}: given {value!r}", f"one of {', '.join(choices)}", "correct the name")


def check_number(name: str, value: object, allowed, expected: str) -> None:
    """Raise unless the value is a finite number that `allowed` (a predicate) lets pass."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(number and allowed(value), f"{name}: given {value!r}", f"a finite number {expected}", "change it")


def check_integer(name: str, value: object, least: int, mend: str = "change it") -> None:
    """Raise unless the value is an integer of at least `least`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(fits, f"{name}: given {value!r}", f"an integer of at least {least}", mend)
