"""Hooks of the documentation site: pages that are made from files which GitHub shows as they are.

The files in ``docs/`` are read on GitHub too, so their links are those of the repository; here they become links of
the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "quickstart.ipynb"
# Source in the repository -> page of the site.
MADE = {"README.md": "index.md", "docs/README.md": "pages.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?https?://[^\s>]+")
ROLE = re.compile(r":(?:class|func|mod|meth|attr|exc):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made."""
    for source, page in MADE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text, folder=(ROOT / source).parent)))
    text, resources = MarkdownExporter().from_filename(str(ROOT / "docs" / NOTEBOOK))
    files.append(File.generated(config, "notebook.md", content=without_indented_html(text)))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of pages that are no made ones."""
    del config, files
    return site_links(markdown, folder=(ROOT / "docs" / page.file.src_uri).parent)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """References in docstrings, ``:class:`~gcml_ray.records.Edge` ``, as the bare name."""
    del page, config, files
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses what a hospital's machine without internet could not show."""
    del config
    found = FOREIGN.findall(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another server: {found[0]}")
    return output


def site_links(text: str, *, folder: Path) -> str:
    """Links of a file of the repository as links of the site; to what is no page of it, as plain text."""

    def replace(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if not (folder / target).exists():
            return match[0]  # of a made page, or broken: then mkdocs says so
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        if path in MADE:
            return f"[{words}]({MADE[path]}{anchor})"
        if path == f"docs/{NOTEBOOK}":
            return f"[{words}](notebook.md)"
        inside = path.startswith("docs/")
        return f"[{words}]({path.removeprefix('docs/')}{anchor})" if inside else words

    return LINK.sub(replace, text)


def without_indented_html(text: str) -> str:
    """Tables of a notebook's outputs, which Markdown would take for code where they are indented."""
    return re.sub(r"^ +(?=</?(?:div|table|thead|tbody|tr|td|th)\b)", "", text, flags=re.MULTILINE)
