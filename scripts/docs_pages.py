"""Pages of the site that are not in docs/: those of the root, and the list of decisions. A hook of mkdocs."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README": "index", "CHANGELOG": "changelog", "CONTRIBUTING": "contributing", "SECURITY": "security"}
DECISIONS = "# Decisions\n\nWhat a newcomer would question: context, choice, what was rejected, what was measured.\n"
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# Where Python-Markdown differs from CommonMark: the last line of a paragraph that a list or a table follows, and
# paragraphs and tables of a list item, which it expects to be indented by four spaces.
INTERRUPTED = re.compile(r"^(?![-|#\s]|\d+\. ).+\n(?=- |1\. |\|.*\n\|[-|: ]+\|$)", re.MULTILINE)
ITEM = re.compile(r"^- .*(?:\n  .*|\n(?=\n*  ))+", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors as GitHub names them
    config.nav.append({"Decisions": ["decisions/index.md", *(f"decisions/{path.name}" for path in _decisions())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in ROOT_PAGES.items():
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        text = text.replace("](docs/decisions/)", "](decisions/index.md)").replace("](docs/", "](")
        files.append(File.generated(config, f"{page}.md", content=_renamed("", text)))
    files.append(File.generated(config, "decisions/index.md", content=_list(_decisions())))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    parts = CODE.split(_renamed("../", markdown))
    parts[::2] = [_as_python_markdown(part) for part in parts[::2]]
    return "".join(parts)


def _as_python_markdown(text: str) -> str:
    text = INTERRUPTED.sub(r"\g<0>\n", text)
    return ITEM.sub(lambda item: item[0].replace("\n  ", "\n    "), text)


def _renamed(folder: str, text: str) -> str:
    """The text with its links to pages of the root as the site names these."""
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({folder}{name}.md", f"]({page}.md")
    return text


def _decisions() -> list[Path]:
    return sorted((ROOT / "docs" / "decisions").glob("*.md"))


def _list(pages: list[Path]) -> str:
    titles = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in pages]
    items = [f"- [{title}]({page.name})\n" for title, page in zip(titles, pages, strict=True)]
    return f"{DECISIONS}\n{''.join(items)}"
