"""Matplotlib without a screen."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """The module matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
