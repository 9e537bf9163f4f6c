"""What stands in the teacher's prompt: the ground truth, a correct sibling, or a reference that a writer made of attempts."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
