"""The templates of the pages."""

from __future__ import annotations

from pathlib import Path

import jinja2


def template(name: str) -> jinja2.Template:
    """The template NAME.html.jinja of this folder; what it is given is escaped."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=folder, autoescape=True).get_template(f"{name}.html.jinja")
