"""Write the tables of the documentation that follow from the code: `python scripts/make_tables.py`."""

from __future__ import annotations

from pathlib import Path

from yolo_sophia.options import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
START, END = "<!-- made by scripts/make_tables.py from yolo_sophia/options.py -->\n", "<!-- end -->\n"


def with_table(text: str) -> str:
    """The text of docs/arguments.md with the current table."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    page = DOCS / "arguments.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
