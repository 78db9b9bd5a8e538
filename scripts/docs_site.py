"""Hooks that mkdocs calls while it builds the site (``hooks`` in mkdocs.yml).

Pages in docs/ link to other files of the repository by paths such as ``../benchmarks/held_out.png``. The hooks copy
these files into the site and adapt the links. They also generate the configuration reference at every build.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")  # a link to a file beside docs/
MARK = "<!-- settings -->"


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that the navigation names or that a page links to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    linked = {path for page in pages for path in OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    named = set(re.findall(r"'([^']+\.md)'", str(config["nav"]))) - {file.src_uri for file in files}
    for path in sorted(linked | named):
        files.append(File(path, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Adapt a page's links to the site, and insert the settings at MARK."""
    if MARK in markdown:
        sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
        from config_reference import reference

        markdown = markdown.replace(MARK, reference())
    if Path(page.file.abs_src_path).parent == Path(config["docs_dir"]):
        return OUTSIDE.sub(r"](\1", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)  # a page beside docs/, as CONTRIBUTING.md
