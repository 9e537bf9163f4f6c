"""A griffe extension of mkdocstrings: the house's docstrings as Markdown.

Examples become blocks of code, aligned lists of arguments become lists, and the fields of a class with the
comments behind them a table.
"""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)  # from its prompt to the next empty line
ARGUMENT = re.compile(r"(\w[\w, ]*?) {2,}(\S.*)")  # mask        [T] bool, ...


def listed(text):
    """Lines of aligned arguments, with those indented below them, as the items of a list."""
    lines, inside = [], False
    for line in text.split("\n"):
        if found := ARGUMENT.fullmatch(line):
            lines += [] if inside else [""]
            line = f"- **{found[1]}**: {found[2]}"
        elif inside and line.startswith("  "):
            line = f"    {line.strip()}"
        inside = found is not None or inside and line.startswith("  ")
        lines.append(line)
    return "\n".join(lines)


def table(fields):
    """A row for each field of a class: its name, type, default, and the comment behind it."""
    rows = ["", "", "| field | type | default | |", "| --- | --- | --- | --- |"]
    for field in fields:
        comment = field.lines_collection[field.filepath][field.lineno - 1].partition("  # ")[2]
        cells = (f"`{field.name}`", f"`{field.annotation}`", f"`{field.value}`" if field.value is not None else "", comment)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring, and gives those of classes with fields a table of them."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            fenced = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
            obj.docstring.value = listed(fenced)

    def on_class(self, *, cls, **kwargs):
        fields = [a for a in cls.attributes.values() if a.annotation is not None and not a.name.startswith("_") and a.lineno]
        if cls.docstring and fields:
            cls.docstring.value += table(fields)
