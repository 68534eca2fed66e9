"""MkDocs calls these while it builds the site; ``pages.py`` does the work."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.docs import pages

NUMBERS = ("science/gain.md", "science/kl.md", "science/returns.md", "science/settings.md", "benchmarks-cpu/report.md")
"""Pages of tables, which would fill the results of a search."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for file, page in pages.OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(pages.ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the site's pages, and fill in what programs say of their options."""
    if page.file.src_uri in NUMBERS:
        page.meta["search"] = {"exclude": True}
    outside = {uri: file for file, uri in pages.OUTSIDE.items()}
    file = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return pages.with_options(pages.with_site_links(markdown, file))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the formulas, and keep short code in one line."""
    return pages.with_whole_options(pages.with_formulas(html))
