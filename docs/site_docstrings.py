"""A griffe extension of mkdocstrings: examples in docstrings become blocks of code, where Markdown would quote them."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)  # from its prompt to the next empty line


class Examples(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
