"""A report's blocks as Markdown; the rule is that of `page.py`: text is escaped here, whatever it says."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import singledispatch

from yolo_sophia.report.document import (
    PLUS_MINUS,
    Block,
    Cell,
    Code,
    Document,
    Fold,
    Gallery,
    Section,
    Split,
    Table,
    Text,
    Verdict,
    clean,
)


def to_markdown(document: Document, folder: str) -> str:
    """Return the report as Markdown; `folder` is where its PNGs are."""
    parts = [f"# {_m(document.title)}", *([" · ".join(map(_m, document.badges))] if document.badges else [])]
    parts += [_markdown(section, folder) for section in document.sections if section.blocks]
    return "\n\n".join(parts) + "\n"


def _m(text: str) -> str:
    """Escape what Markdown, and the HTML in it, would take for markup."""
    text = html.escape(clean(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text).replace("\n", "<br>")


@singledispatch
def _markdown(block: Block, folder: str) -> str:
    raise TypeError(f"{type(block).__name__} is no block.")


@_markdown.register
def _(block: Section, folder: str) -> str:
    return "\n\n".join([f"## {_m(block.title)}", *(_markdown(one, folder) for one in block.blocks)])


@_markdown.register
def _(block: Text, folder: str) -> str:
    return f"**{_m(block.text)}**" if block.kind == "warning" else _m(block.text)


@_markdown.register
def _(block: Verdict, folder: str) -> str:
    return "\n".join([f"### {_m(block.arm)}: {_m(block.badge)}", "", *(f"- {_m(one)}" for one in block.sentences)])


@_markdown.register
def _(block: Table, folder: str) -> str:
    def row(cells: Sequence[Cell]) -> str:
        pairs = ((cell, "") if isinstance(cell, str) else cell for cell in cells)
        texts = (
            f"{main}{' ' if small.startswith(PLUS_MINUS) else ', '}{small}" if small else main for main, small in pairs
        )
        return f"| {' | '.join(map(_m, texts))} |"

    align = "--:" if block.numbers else "---"
    rule = f"| {' | '.join(['---', *[align] * (len(block.head) - 1)])} |"
    return "\n".join([_m(block.caption) + ":", "", row(block.head), rule, *map(row, block.rows)])


@_markdown.register
def _(block: Gallery, folder: str) -> str:
    drawn = "\n".join(f"![{_m(one.alt)}]({folder}/{one.name}.png)" for one in block.pictures)
    return drawn + (f"\n\n{_m(block.caption)}" if block.caption else "")


@_markdown.register
def _(block: Code, folder: str) -> str:
    text = clean(block.text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{_m(block.label)}:\n\n{fence}\n{text}\n{fence}"


@_markdown.register
def _(block: Fold, folder: str) -> str:
    inside = "\n\n".join(_markdown(one, folder) for one in block.blocks)
    return f"<details><summary>{html.escape(clean(block.title))}</summary>\n\n{inside}\n\n</details>"


@_markdown.register
def _(block: Split, folder: str) -> str:
    return "\n\n".join(_markdown(one, folder) for one in (*block.left, *block.right))
