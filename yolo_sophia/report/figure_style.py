"""The style of all figures: panels, line styles, and conversion to SVG for a page and to PNG.

Lines differ in dash and marker as well as in color. Colors are placeholders that become CSS variables in the SVG, so
that one figure serves the light and the dark theme.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from yolo_sophia.report.document import Picture

PALETTE = {  # CSS variable -> color in the light theme (and in PNGs), color in the dark theme; color-blind safe
    "ink": ("#1d2531", "#e8ebf0"),  # text, and line 0
    "muted": ("#5b6472", "#a3acba"),
    "grid": ("#dfe2e7", "#333a45"),
    "arm1": ("#0067a8", "#5cb8f5"),
    "arm2": ("#c24a00", "#ff9147"),
    "arm3": ("#00805c", "#35cf9f"),
    "arm4": ("#a83d80", "#f08cc4"),
    "arm5": ("#8c6a00", "#e8c63d"),
    "arm6": ("#6a4fc4", "#b3a1ff"),
}
INK, MUTED, GRID, *COLORS = (light for light, _ in PALETTE.values())
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2)))
MARKERS = "osD^vPX*<>"
WIDTH, HEIGHT = 4.3, 2.5  # inches; the height covers the axes and their labels
PER_LINE = 0.19  # inches per line of text


@dataclass(frozen=True)
class Style:
    """Name, color, dash and marker of a line; number 0 has the color of the text."""

    name: str
    number: int

    @property
    def color(self) -> str:
        """The color in the light theme, a placeholder in SVG."""
        return COLORS[(self.number - 1) % len(COLORS)] if self.number else INK

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        dash, marker = DASHES[self.number % len(DASHES)], MARKERS[self.number % len(MARKERS)]
        return {"color": self.color, "linestyle": dash, "marker": marker, "markersize": 4, "linewidth": 1.5}


def short(name: str, length: int = 24) -> str:
    """Shorten a name in the middle."""
    return name if len(name) <= length else f"{name[: length - 9]}\N{HORIZONTAL ELLIPSIS}{name[-8:]}"


def plain(text: str) -> str:
    """Escape text that matplotlib would interpret as mathematics."""
    return text.replace("$", r"\$")


def panel(title: str, styles: Sequence[Style], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """A panel with title, legend and axes from top to bottom, laid out in inches: the page's fonts are unknown here.

    Args:
        title: Title.
        styles: The lines of the legend.
        axes: Axes to turn into the panel; new ones by default.
    """
    columns = 2 if any(len(style.name) > 11 for style in styles) else 3
    above = 0.34 + PER_LINE * math.ceil(len(styles) / columns)
    figure, axes = _framed(title, HEIGHT + above, 0.62, 0.48, above, axes)
    handles = [Line2D([], [], **style.line) for style in styles]
    names = [plain(short(style.name)) for style in styles]
    top = 1 - 0.25 / figure.get_figheight()
    figure.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0.06 / WIDTH, top), ncols=columns, frameon=False,
        fontsize=8.5, labelcolor=INK, handlelength=3, columnspacing=1.2, labelspacing=0.25, borderaxespad=0,
    )  # fmt: skip
    return figure, axes


def row_panel(title: str, names: Sequence[str], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """A panel with a row per name, the first on top."""
    names = [short(name) for name in names]
    left = 0.25 + 0.072 * max((len(name) for name in names), default=0)
    figure, axes = _framed(title, 0.9 + 0.3 * max(len(names), 2), left, 0.48, 0.36, axes)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_yticklabels(map(plain, names), color=INK)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _framed(
    title: str, height: float, left: float, bottom: float, above: float, axes: Axes | None
) -> tuple[Figure, Axes]:
    axes = axes or Figure().add_axes((0, 0, 1, 1))
    figure = axes.get_figure()
    figure.set_size_inches(WIDTH, height)
    figure.text(0.06 / WIDTH, 1 - 0.06 / height, plain(title), va="top", fontsize=9.5, color=INK,
                fontweight="bold")  # fmt: skip
    axes.set_position((left / WIDTH, bottom / height, 1 - (left + 0.14) / WIDTH, 1 - (bottom + above) / height))
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=MUTED, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=MUTED, fontsize=8.5)
    axes.yaxis.label.set(color=MUTED, fontsize=8.5)
    return figure, axes


def picture(name: str, figure: Figure, alt: str) -> Picture:
    """The figure for a report, under a name that is valid as a file name and as an id."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    return Picture(name, alt, to_svg(figure, alt, name.replace(".", "-")), to_png(figure))


def to_png(figure: Figure) -> bytes:
    """The figure on a white background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, alt: str, prefix: str) -> str:
    """The figure as an SVG element without size, fonts and namespaces, for a page that defines `PALETTE`'s variables.

    Args:
        figure: The figure.
        alt: Text alternative.
        prefix: Prefix that makes the ids unique in the page.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "yolo-sophia"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    box = re.search(r'viewBox="[^"]+"', text)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r"<[^>]*>", lambda tag: _slim(tag[0], used, prefix), text[text.index(">") + 1 :])
    text = re.sub(r">\s+<", "><", text).replace("<g></g>", "").strip()
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(alt, quote=True)}">{text}'


def _slim(tag: str, used: set[str], prefix: str) -> str:
    """Shorten a tag and adapt it to the page; text between tags is left unchanged."""
    tag = " ".join(tag.replace("xlink:href", "href").split())
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", tag)
    # Remove the font family, in the notation of any matplotlib version; keep weight and size.
    tag = re.sub(r"font: (?:(bold|\d00) )?([\d.]+px)[^;\"]*", r"font-weight: \1; font-size: \2", tag)
    tag = re.sub(r"font-weight: ; |font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", tag)
    for name, (light, _) in PALETTE.items():
        tag = tag.replace(light, f"var(--{name})")
    tag = re.sub(r' [dxy]="[^"]*"', lambda place: re.sub(r"(\.\d)\d+", r"\1", place[0]), tag)
    # A path of straight lines needs no "L"; drop paths that are not painted.
    tag = tag if re.search(r' d="[^"]*[CQ]', tag) else tag.replace(" L ", " ")
    return "" if tag.startswith("<path") and tag.endswith('style="fill: none"/>') else tag
