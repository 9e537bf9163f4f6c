"""The page's HTML, with its script, which is put together here from the files in page/."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

PAGE = Path(__file__).parent / "page"
# in the order in which each finds what it imports
MODULES = (
    "credit", "text", "data", "state", "figure", "charts", "tables", "tokens", "rollout", "view", "divergent", "compare", "main",
)  # fmt: skip
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?:async )?(?:function|const) (\w+)", re.MULTILINE)


def run_page(manifest: dict[str, Any], packs: Mapping[str, bytes]) -> str:
    """A page complete in itself: nothing is asked of another host, nor of this one. packs: by `RUN/KEY`, gzipped."""
    data = {"manifest": gzip.compress(json.dumps(manifest).encode(), 9, mtime=0)} | {f"pack/{k}": v for k, v in packs.items()}
    return _page(manifest["title"], {name: base64.b64encode(content).decode() for name, content in data.items()}, "'none'")


def live_page() -> str:
    """The same page without data, which asks the host that it came from."""
    return _page("runs", {}, "'self'")


def _page(title: str, data: dict[str, str], connect: str) -> str:
    """What a model wrote stands in the page as base64 alone, and no script runs but those whose digest the policy names."""
    library, styles = (PAGE / "vendor" / "uPlot.iife.min.js").read_text(), [(PAGE / "vendor" / "uPlot.min.css").read_text()]
    styles.append((PAGE / "style.css").read_text())
    scripts = [library, script()]
    policy = (
        f"default-src 'none'; script-src {_digests(scripts)}; style-src {_digests(styles)}; img-src blob: data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    shell = jinja2.Environment(autoescape=True).from_string((PAGE.parent / "report.html.jinja").read_text())
    return shell.render(title=title, policy=policy, styles=styles, library=library, script=scripts[1], data=data)


def _digests(texts: list[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


@cache
def script() -> str:
    """The modules of page/ as one script: each is a function of its own, which gives what it exports; the last one runs."""
    parts: list[str] = []
    for place, name in enumerate(MODULES):
        text = (PAGE / f"{name}.js").read_text()
        unknown = {module for _, module in _IMPORT.findall(text)} - set(MODULES[:place])
        assert not unknown, f"page/{name}.js imports {unknown}, which MODULES does not name before it"
        exported = ", ".join(_EXPORT.findall(text))
        body = _IMPORT.sub(r"const \1 = $\2;\n", re.sub(r"^export ", "", text, flags=re.MULTILINE))
        parts.append(body if name == MODULES[-1] else f"const ${name} = (() => {{\n{body}return {{ {exported} }};\n}})();\n")
    return "".join(parts)
