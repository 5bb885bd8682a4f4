"""The documents name what exists: linked files, paths in code font, and the tests in two tables of promises.

`make docs` checks the links between pages of the site. These tests also cover the documents outside docs/.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "patches").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = "yolo_sophia|integration|optim|curvature|compare|tune|runs|report|scripts|tests|configs|patches|docs"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*\w\.(?:py|md|yaml|csv|png|patch)")
HISTORY = [ROOT / "CHANGELOG.md", *(ROOT / "docs/studies").rglob("*"), *(ROOT / "docs/benchmarks").rglob("*")]


def text(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=identifier)
def test_links(path):
    targets = [link.partition("#")[0] for link in LINK.findall(text(path)) if not link.startswith(("http", "#"))]
    assert [t for t in targets if not (path.parent / t).exists()] == []


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if d not in HISTORY], ids=identifier)
def test_paths(path):
    named = {name for code in CODE.findall(text(path)) for name in PATH.findall(code)}
    assert sorted(name for name in named if not any((r / name).exists() for r in (ROOT, ROOT / "yolo_sophia"))) == []


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if d in HISTORY[1:]], ids=identifier)
def test_deleted_scripts(path):
    """Studies and benchmarks may cite a script that is gone, followed by the commit at which it exists."""
    cited = re.findall(r"`(scripts/\w+\.py)`(?!,?\s+\(?commit\s[0-9a-f]{7})", text(path))
    assert [name for name in cited if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["RELIABILITY.md", "TASKS.md"])
def test_tests(name):
    """Every test that is named exists; `::test_x` belongs to the file named before it, `test_x_...` is a prefix."""
    missing, file = [], ""
    for named, colons, function in re.findall(
        r"(?:(test_\w+\.py))?(::)?(?<![\w/])(test_\w+)\b(?!\.py)", (ROOT / "docs" / name).read_text(encoding="utf-8")
    ):
        file = named or file
        known = functions().get(file, set()) if colons else {f for found in functions().values() for f in found}
        if function not in known and not (function.endswith("_") and any(f.startswith(function) for f in known)):
            missing.append(f"{file}::{function}")
    assert missing == []


@cache
def functions() -> dict[str, set[str]]:
    """Names of the tests by file."""
    return {
        path.name: {n.name for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)}
        for path in (ROOT / "tests").glob("test_*.py")
    }


@pytest.mark.parametrize(("name", "lines"), [("README.md", 120), ("docs/ARCHITECTURE.md", 120)])
def test_length(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_training_loops_of_the_guide_run():
    names: dict = {}
    for block in blocks(ROOT / "docs/guide/own-pytorch-loop.md", "python"):
        if "accelerator" not in block:  # needs a package of its own
            exec(block, names)
            state = names["optimizer"].state[next(names["model"].parameters())]
            assert state["hessian"].abs().sum() > 0


def commands() -> list[str]:
    """Every `yolo` and `yolo-sophia` command of README and docs, as one line each."""
    text = "\n".join(block for path in DOCUMENTS for block in blocks(path, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(("yolo train", "yolo-sophia"))]


@pytest.mark.parametrize("line", commands())
def test_arguments_of_commands_exist(line):
    ultralytics = pytest.importorskip("ultralytics.utils")
    from yolo_sophia.compare.plan import KEYS as COMPARE
    from yolo_sophia.tune.plan import KEYS as TUNE

    keys = set(re.findall(r"(?:^|\s)(\w+)=", line))
    own = {"compare": COMPARE, "tune": TUNE}.get(line.split()[1], {})
    assert keys <= {*ultralytics.DEFAULT_CFG_DICT, *own}


def test_every_page_is_in_the_navigation():
    """`make docs` fails otherwise, but only where MkDocs is installed."""
    named = re.findall(r"(\S+\.md)$", (ROOT / ".ci/mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)
