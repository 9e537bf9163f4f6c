"""Hints that the teacher's prompt shows: the ground truth, a correct sibling, or a reference that a writer made of attempts."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
