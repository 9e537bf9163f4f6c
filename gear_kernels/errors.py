"""The one exception type of the package."""

from __future__ import annotations


class GearKernelsError(ValueError):
    """Bad input. The message says what was given, what was expected, and how to mend it."""


def bad_input(given: str, expected: str, mend: str) -> GearKernelsError:
    """Build the exception from its three parts: `given`, `expected` and `mend` are short clauses without a full stop."""
    return GearKernelsError(f"{given}; expected {expected}. To mend: {mend}.")
