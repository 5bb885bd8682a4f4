"""A report as data: blocks, and the HTML page made of them; `markdown.py` makes Markdown.

The rule: blocks hold plain text; whatever it says, it is escaped here and nowhere else. Only pictures bring markup,
made by `canvas.to_svg`. The page runs no script and loads nothing: its content security policy forbids both.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from string import Template

from yolo_sophia.report.figure_style import PALETTE

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
Cell = str | tuple[str, str]
"""Text of a table's cell, perhaps with a second, smaller line."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "plain", "note" or "warning"."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Verdict:
    """What is said of one arm; `tone` is "better", "worse" or "open", perhaps with "hint", and `badge` its words."""

    arm: str
    badge: str
    tone: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: Cells.
        numbers: Whether the cells are numbers (set to the right) or text.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """A figure: its name (that of the PNG's file), text alternative, SVG and PNG."""

    name: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Gallery:
    """Pictures that belong together, with a common caption."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it is; `label` says what it is."""

    text: str
    label: str


@dataclass(frozen=True)
class Fold:
    """Blocks under a line that opens and closes them."""

    title: str
    blocks: Sequence[Block]
    opened: bool = False


@dataclass(frozen=True)
class Split:
    """Blocks side by side where there is room: what is read, and what is looked at with it."""

    left: Sequence[Block]
    right: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `name` is its address in the page."""

    name: str
    title: str
    blocks: Sequence[Block]


Block = Text | Verdict | Table | Gallery | Code | Fold | Split | Section


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: Title.
        badges: Short facts under the title.
        sections: Sections; those without blocks are left out.
    """

    title: str
    badges: Sequence[str]
    sections: Sequence[Section]


def pictures(blocks: Iterable[Block]) -> Iterator[Picture]:
    """All pictures of these blocks."""
    for block in blocks:
        if isinstance(block, Gallery):
            yield from block.pictures
        elif isinstance(block, (Section, Fold)):
            yield from pictures(block.blocks)
        elif isinstance(block, Split):
            yield from pictures([*block.left, *block.right])


def to_html(document: Document) -> str:
    """Return the report as one self-contained page."""
    sections = [section for section in document.sections if section.blocks]
    links = "".join(f'<li><a href="#{_e(s.name)}">{_e(s.title)}</a></li>' for s in sections)
    palettes = [";".join(f"--{name}:{pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1)]
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=_e(document.title),
        badges="".join(f"<li>{_e(badge)}</li>" for badge in document.badges),
        links=links,
        light=palettes[0],
        dark=palettes[1],
        body="\n".join(map(_html, sections)),
    )


def clean(text: str) -> str:
    """Leave out terminal colours and control characters."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(text))
    return re.sub(
        r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text
    )


def _e(text: str) -> str:
    return html.escape(clean(text), quote=True)


@singledispatch
def _html(block: Block) -> str:
    raise TypeError(f"{type(block).__name__} is no block.")


@_html.register
def _(block: Section) -> str:
    inside = "\n".join(map(_html, block.blocks))
    return f'<section id="{_e(block.name)}">\n<h2>{_e(block.title)}</h2>\n{inside}\n</section>'


@_html.register
def _(block: Text) -> str:
    return f'<p class="{_e(block.kind)}">{_e(block.text)}</p>'


@_html.register
def _(block: Verdict) -> str:
    first, *others = block.sentences or ("",)
    more = "".join(f"<li>{_e(sentence)}</li>" for sentence in others)
    return (
        f'<article class="verdict {_e(block.tone)}"><header><h3>{_e(block.arm)}</h3>'
        f'<span class="badge">{_e(block.badge)}</span></header>'
        f'<p class="lead">{_e(first)}</p>' + (f"<ul>{more}</ul>" if more else "") + "</article>"
    )


@_html.register
def _(block: Table) -> str:
    def cell(value: Cell) -> str:
        main, small = (value, "") if isinstance(value, str) else value
        return _e(main) + (f"<small>{_e(small)}</small>" if small else "")

    head = "".join(f'<th scope="col">{cell(name)}</th>' for name in block.head)
    rows = "\n".join(
        f'<tr><th scope="row">{cell(first)}</th>' + "".join(f"<td>{cell(value)}</td>" for value in rest) + "</tr>"
        for first, *rest in block.rows
    )
    kind = "numbers" if block.numbers else "texts"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_e(block.caption)}">'
        f'<table class="{kind}"><caption><span>{_e(block.caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


@_html.register
def _(block: Gallery) -> str:
    drawn = "".join(f"<div>{picture.svg}</div>\n" for picture in block.pictures)
    caption = f"<figcaption>{_e(block.caption)}</figcaption>" if block.caption else ""
    return f'<figure><div class="gallery">{drawn}</div>{caption}</figure>'


@_html.register
def _(block: Code) -> str:
    text = f'<pre tabindex="0" role="region" aria-label="{_e(block.label)}">{_e(block.text)}</pre>'
    return f'<p class="label">{_e(block.label)}</p>{text}'


@_html.register
def _(block: Fold) -> str:
    inside = "\n".join(map(_html, block.blocks))
    opening = "<details open>" if block.opened else "<details>"
    return f"{opening}<summary>{_e(block.title)}</summary>\n{inside}\n</details>"


@_html.register
def _(block: Split) -> str:
    left, right = ("\n".join(map(_html, blocks)) for blocks in (block.left, block.right))
    return f'<div class="split"><div>{left}</div><div>{right}</div></div>'
