"""What mkdocs calls while it builds the site (``hooks`` in mkdocs.yml).

Pages in docs/ link to files of the repository as ``../benchmarks/held_out.png``, which works in the repository. Such
files become part of the site, and the links follow. The configuration reference is generated at every build.
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
    """Add the files beside docs/ that the navigation names or a page links to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    linked = {path for page in pages for path in OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    named = set(re.findall(r"'([^']+\.md)'", str(config["nav"]))) - {file.src_uri for file in files}
    for path in sorted(linked | named):
        files.append(File(path, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are on the site; the settings where they belong."""
    if MARK in markdown:
        sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
        from config_reference import reference

        markdown = markdown.replace(MARK, reference())
    if Path(page.file.abs_src_path).parent == Path(config["docs_dir"]):
        return OUTSIDE.sub(r"](\1", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)  # a page beside docs/, as CONTRIBUTING.md
