"""What the site takes from outside `docs`: raw results, changelog and pages of the repository.

Documents link to files of the repository, so that they read well there too. On the site a raw
result is a download beside them, and what has a page of its own is that page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
CHANGELOG = "CHANGELOG.md"
PAGES = {
    CHANGELOG: "changelog.md",
    "README.md": "index.md",
    RESULTS: "benchmarks.md",
    "sparsesam_jax/methods": "reference/methods.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the raw results, and the changelog as a page."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    changelog = str(ROOT / CHANGELOG)
    files.append(File.generated(config, PAGES[CHANGELOG], abs_src_path=changelog))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files of the repository at what the site has of them."""
    source = page.file.src_uri
    here = posixpath.dirname(source)
    folder = "" if source == PAGES[CHANGELOG] else posixpath.join("docs", here)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))  # in the repository
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif not target.startswith(f"{RESULTS}/"):
            return match[0]
        return f"]({posixpath.relpath(target, here or '.')}{match[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", link, markdown)
