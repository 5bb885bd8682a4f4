"""HTML and Markdown from a document.

Blocks hold plain text. It is escaped in one place, when a template prints it; only the SVG of pictures is markup.
"""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from yolo_sophia.atomic import atomic_write
from yolo_sophia.report.document import Document, pictures
from yolo_sophia.report.figure_style import PALETTE

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


def write_document(document: Document, out: Path) -> Path:
    """Write report.html, report.md and figures/*.png atomically.

    Returns:
        Path of report.html.
    """
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    for picture in pictures(document.sections):
        atomic_write(out / FIGURES / f"{picture.name}.png", picture.png)
    atomic_write(out / MARKDOWN, to_markdown(document, FIGURES))
    atomic_write(out / HTML, to_html(document))
    return out / HTML


def to_html(document: Document) -> str:
    """Render a self-contained page without scripts; its content security policy forbids loading anything."""
    themes = [";".join(f"--{name}:{pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1)]
    return _template("report.html").render(document=document, light=themes[0], dark=themes[1])


def to_markdown(document: Document, folder: str) -> str:
    """Render Markdown; `folder` is where the PNGs are."""
    return _template("report.md").render(document=document, folder=folder).rstrip() + "\n"


def clean(text: str) -> str:
    """Remove terminal colors and replace control characters."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(text))
    return re.sub(
        r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text
    )


def _escape_html(text: object) -> Markup:
    return Markup(html.escape(clean(text)))


def _escape_markdown(text: object) -> Markup:
    """Escape what Markdown, and HTML inside it, would interpret as markup."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(clean(text), quote=False))
    return Markup(escaped.replace("\n", "<br>"))


def _fence(text: str) -> Markup:
    """A fenced code block whose fence is longer than any inside the text."""
    text = clean(text).rstrip("\n")
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{ticks}\n{text}\n{ticks}")


@cache
def _template(name: str) -> Template:
    escape = _escape_html if name.endswith(".html") else _escape_markdown
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fence=_fence, html=_escape_html, kind=lambda block: type(block).__name__)
    return environment.get_template(name)
