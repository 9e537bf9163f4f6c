"""A run as files and processes: its folder and lock, who ends it, and which rank was lost."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot go on. One line: what happened, and how to go on; the trainer exits with 1."""
