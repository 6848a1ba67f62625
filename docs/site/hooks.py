"""What the site shows beside ``docs``: pages of the repository's root, and links into the rest.

The pages are written to be read in the repository. Here the root's pages become pages of the site,
and links to files that are no page become links into the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

#: The root's pages, and the repository's index of docs, by their names on the site.
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releasing.md",
    "docs/README.md": "contents.md",
}

_LINK = re.compile(r"(\]\()([^)\s#]+)?(#[^)\s]*)?(\))")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in ``docs``."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    name = page.file.src_uri
    origin = next((source for source, target in PAGES.items() if target == name), f"docs/{name}")
    blob = f"{config.repo_url.rstrip('/')}/blob/main/"

    def rewrite(found: re.Match[str]) -> str:
        start, link, anchor, end = (part or "" for part in found.groups())
        if link.startswith(blob):
            target = link.removeprefix(blob)
        elif not link or re.match(r"[a-z]+:", link):
            return found[0]
        else:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
        place = PAGES.get(target) or target.removeprefix("docs/")
        if files.get_file_from_path(place) is not None:
            near = posixpath.relpath(place, posixpath.dirname(name) or ".")
            return f"{start}{near}{anchor}{end}"
        if not (ROOT / target).exists():
            return found[0]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{start}{config.repo_url.rstrip('/')}/{kind}/main/{target}{anchor}{end}"

    parts = _FENCE.split(markdown)
    # Every second part is a fenced block, which is shown as it is.
    return "".join(
        part if place % 2 else _LINK.sub(rewrite, part) for place, part in enumerate(parts)
    )
