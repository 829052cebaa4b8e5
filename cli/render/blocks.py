"""The end of the first block in unfinished Markdown."""

from markdown_it import MarkdownIt
from markdown_it.token import Token

from .wrap import lines_of

ONE_LINE_BLOCKS = ("heading_open", "hr")


def make_parser() -> MarkdownIt:
    """Markdown in which raw HTML, link definitions and images stay visible as text."""
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])


def first_block_end(parser: MarkdownIt, text: str) -> int:
    """The length of the first block in whole lines of `text`; 0 while later text could still change it."""
    tokens = parser.parse(text)
    starts = _block_starts(tokens)
    if len(starts) > 1:
        return _offset(text, starts[1])
    return len(text) if _is_finished(tokens, text) else 0


def _block_starts(tokens: list[Token]) -> list[int]:
    """Lines at which a block, or an item of a list, begins."""
    starts = set()
    for token in tokens:
        is_item = token.type == "list_item_open" and token.level == 1
        is_block = token.level == 0 and token.nesting >= 0
        if (is_item or is_block) and token.map is not None:
            starts.add(token.map[0])
    return sorted(starts)


def _is_finished(tokens: list[Token], text: str) -> bool:
    if not tokens:
        return text.endswith("\n\n") and not text.strip()
    if tokens[0].type in ONE_LINE_BLOCKS:
        return True
    return tokens[0].type in ("paragraph_open", "table_open") and text.endswith("\n\n")


def _offset(text: str, line: int) -> int:
    return len("".join(lines_of(text)[:line]))
