"""Errors that a person at the terminal reads: one line each, what happened and how to go on."""

from __future__ import annotations


class ConfigError(ValueError):
    """A run that cannot start. The message names the file and the key (or line), and says how to mend it; exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on. One line: what happened, and how to go on; the trainer exits with 1."""
