"""Write the tables of the documentation that follow from the code: `python scripts/make_tables.py`."""

from __future__ import annotations

from pathlib import Path

from yolo_sophia.integration.contract import CONTRACT
from yolo_sophia.options import OPTIONS, ULTRALYTICS_ARGS

DOCS = Path(__file__).resolve().parent.parent / "docs"
START, END = "<!-- made by scripts/make_tables.py from yolo_sophia/{} -->\n", "<!-- end -->\n"


def options() -> str:
    """Every option, for docs/arguments.md."""
    rows = ["| argument | values | default | description |", "|---|---|---|---|"]
    rows += [f"| `{o.name}` | {o.expected} | `{o.default}` | {o.doc} |" for o in OPTIONS.values()]
    rows += [f"| `{o.name}` | {o.expected} | Ultralytics' | {o.doc} |" for o in ULTRALYTICS_ARGS.values()]
    return "\n".join(rows) + "\n"


def contract() -> str:
    """Every symbol of Ultralytics that the package depends on, for docs/VERSIONS.md."""
    rows = ["| Symbol of Ultralytics | Use | Parameters | For | Versions |", "|---|---|---|---|---|"]
    for symbol in CONTRACT:
        place = f"`{symbol.place.removeprefix('ultralytics.')}`"
        place += f" (`.{symbol.attribute}`)" if symbol.attribute else ""
        parameters = ", ".join(symbol.parameters) if symbol.parameters else "-"
        rows.append(f"| {place} | {symbol.use} | {parameters} | {symbol.why} | {symbol.versions} |")
    return "\n".join(rows) + "\n"


TABLES = {
    "arguments.md": ("options.py", options),
    "VERSIONS.md": ("integration/contract.py", contract),
}
"""By page: the file that the table is made from, and the function that makes it."""


def with_table(page: str) -> str:
    """The text of a page with its current table."""
    source, make = TABLES[page]
    start = START.format(source)
    before, _, rest = (DOCS / page).read_text(encoding="utf-8").partition(start)
    return f"{before}{start}\n{make()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(with_table(page), encoding="utf-8")
