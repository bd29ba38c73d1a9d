"""Hooks of mkdocs.yml: pages of the repository that are not in docs/, and links between them.

A page's links are those that work in the repository. Here a link to a file that is a page of the
site becomes a link to that page; one to any other file, a link into the repository.
"""

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository -> page of the site; those of docs/ keep their names
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "configs/README.md": "configs.md",
    "configs/real/README.md": "real.md",
    "bench/PROTOCOL.md": "protocol.md",
    "bench/LOG.md": "log.md",
    "docs/first_hour.ipynb": "first_hour.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        path = ROOT / source
        text = from_notebook(path) if path.suffix == ".ipynb" else path.read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    name = page.file.src_uri
    source = SOURCES.get(name, f"docs/{name}")
    parts = FENCE.split(markdown)  # every other one is a fence
    parts[::2] = [_site_links(part, source, name, config["repo_url"]) for part in parts[::2]]
    return "".join(parts)


def _site_links(text: str, source: str, page: str, repository: str) -> str:
    def target(match: re.Match) -> str:
        before, link, anchor, behind = match[1], match[2], match[3] or "", match[4]
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        return f"{before}{_address(file, page, repository)}{anchor}{behind}"

    return LINK.sub(target, text)


def _address(file: str, page: str, repository: str) -> str:
    """Of a file of the repository, from a page of the site."""
    inside = file.startswith("docs/") and not file.endswith((".py", ".ipynb", ".txt"))
    name = PAGES.get(file) or (file.removeprefix("docs/") if inside else "")
    if name:
        return os.path.relpath(name, posixpath.dirname(page) or ".")
    kind = "tree" if (ROOT / file).is_dir() else "blob"
    return f"{repository}/{kind}/main/{file}"


def from_notebook(path: Path) -> str:
    """Its text, code and what it showed, as Markdown; pictures inside the page."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if png := output.get("data", {}).get("image/png"):
                data = "".join(png).replace("\n", "")
                parts.append(f'<img alt="what the cell shows" src="data:image/png;base64,{data}">')
            elif text := "".join(output.get("text", ())):
                parts.append(f"~~~text\n{text.rstrip()}\n~~~")
    return "\n\n".join(parts) + "\n"
