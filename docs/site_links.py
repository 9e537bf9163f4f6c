"""A hook of mkdocs: pages and links that leave docs/.

On the site, docs/ is the root, and the Markdown files that its pages link to stand beside it under their own paths. A link to
anything else in the repository, which a site does not hold, becomes its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/cpu_report.md",
         "benchmarks/results/credit_report.md", "benchmarks/results/compile_report.md")  # fmt: skip
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!https?:|#)[^)#]*)(#[^)]*)?\)")


def on_files(files, config):
    """Add the pages outside docs/ under the paths that they have in the repository."""
    for path in PAGES:
        files.append(File.generated(config, path, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's places: docs/x.md is x.md there."""
    here = page.file.src_uri
    source = here if here in PAGES else f"docs/{here}"

    def place(link):
        text, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = path.removeprefix("docs/")
        if files.get_file_from_path(there) is None and (ROOT / path).exists():
            return text
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(place, markdown)
