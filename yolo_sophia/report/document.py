"""A report as data: a document of sections, made of blocks that hold plain text and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Cell = str | tuple[str, str]
"""Text of a table cell, optionally with a second, smaller line."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "plain", "note" or "warning"."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Verdict:
    """What is concluded about an arm; `tone` is "better", "worse" or "open", optionally followed by "hint"."""

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
        numbers: Whether the cells are numbers (aligned right) or text.
    """

    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """A figure: file name of its PNG without extension, text alternative, SVG and PNG."""

    name: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Gallery:
    """Pictures with a common caption."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Preformatted text with a label."""

    text: str
    label: str


@dataclass(frozen=True)
class Fold:
    """Blocks that can be collapsed under a title."""

    title: str
    blocks: Sequence[Block]
    opened: bool = False


@dataclass(frozen=True)
class Split:
    """Two columns of blocks, stacked on narrow screens."""

    left: Sequence[Block]
    right: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `name` is the anchor. A section without blocks is not rendered."""

    name: str
    title: str
    blocks: Sequence[Block]


Block = Text | Verdict | Table | Gallery | Code | Fold | Split


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: Title.
        badges: Short facts below the title.
        sections: Sections.
    """

    title: str
    badges: Sequence[str]
    sections: Sequence[Section]


def pictures(blocks: Iterable[Block | Section]) -> Iterator[Picture]:
    """All pictures of these blocks."""
    for block in blocks:
        if isinstance(block, Gallery):
            yield from block.pictures
        elif isinstance(block, (Section, Fold)):
            yield from pictures(block.blocks)
        elif isinstance(block, Split):
            yield from pictures([*block.left, *block.right])
