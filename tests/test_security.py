"""What SECURITY.md promises: the .pth line and the current directory, checkpoints, names, and what a report shows."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yolo_sophia.report.document import Code, Document, Fold, Section, Split, Table, Text, Verdict
from yolo_sophia.report.render import to_html, to_markdown

ROOT = Path(__file__).parent.parent
PTH = ROOT / "yolo_sophia" / "autoload.pth"
TRAP = "from pathlib import Path; Path(__file__).with_name('imported').touch()\n"


# The .pth line --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Start Python in an environment that has a copy of the package and its .pth line, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=os.name != "nt")
    program = next(folder.glob("[bS]*/python*"))

    def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "YOLO_SOPHIA"))}
        return subprocess.run(
            [program, *arguments], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=60
        )

    python.site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    shutil.copy(PTH, python.site / "yolo_sophia_autoload.pth")
    shutil.copytree(ROOT / "yolo_sophia", python.site / "yolo_sophia", ignore=shutil.ignore_patterns("__pycache__"))
    return python


@pytest.fixture
def traps(tmp_path) -> Path:
    """A folder with packages of our names and of what we import, which leave a file when they are imported."""
    for name in ("yolo_sophia", "ultralytics", "torch", "yaml"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(TRAP)
        (package / "autoload.py").write_text(TRAP)
        (package / "utils.py").write_text("")
    return tmp_path


HOOKS = "import sys; print([f.__module__ for f in sys.meta_path if f.__name__ == '_PostImportFinder'])"
HOOK = "['yolo_sophia.autoload']\n"


@pytest.mark.parametrize("how", [["-c", HOOKS], ["script.py"], ["-m", "script"]], ids=["-c", "script", "-m"])
def test_nothing_is_imported_from_the_current_directory(installed, traps, how):
    (traps / "script.py").write_text(HOOKS)
    done = installed(*how, cwd=traps)
    assert (done.stdout, done.stderr, done.returncode) == (HOOK, "", 0)
    assert not list(traps.rglob("imported"))


def test_the_package_stays_the_installed_one(installed, traps):
    done = installed("-c", "import yolo_sophia.optim._step; print(yolo_sophia.optim._step.__file__)", cwd=traps)
    shown = done.stdout.strip() or re.findall(r'File "([^"]+)"', done.stderr)[-1]  # it may miss the real torch
    assert Path(shown).is_relative_to(installed.site / "yolo_sophia"), done.stderr
    assert not (traps / "yolo_sophia" / "imported").exists()


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a folder without autoload.py"])
def test_a_stale_line_is_silent(installed, traps, left):
    package = installed.site / "yolo_sophia"
    aside = package.with_name("aside")
    package.rename(aside)
    try:
        if left != "nothing":
            package.mkdir()
        if left.startswith("a folder"):
            (package / "__init__.py").touch()
        done = installed("-c", HOOKS, cwd=traps)
        assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
        assert not list(traps.rglob("imported"))
    finally:
        shutil.rmtree(package, ignore_errors=True)
        aside.rename(package)


@pytest.mark.parametrize(("words", "environment"), [([], {"YOLO_SOPHIA_AUTOLOAD": "0"}), (["-S"], {})], ids=["0", "-S"])
def test_it_is_switched_off(installed, tmp_path, words, environment):
    assert installed(*words, "-c", HOOKS, cwd=tmp_path, **environment).stdout == "[]\n"


def test_the_line_imports_the_standard_library_only(installed, tmp_path):
    done = installed("-c", "import sys; print(*sorted(sys.modules))", cwd=tmp_path)
    off = installed("-c", "import sys; print(*sorted(sys.modules))", cwd=tmp_path, YOLO_SOPHIA_AUTOLOAD="0")
    assert set(done.stdout.split()) == set(off.stdout.split())  # the switch is read in the package
    bare = installed("-S", "-c", "import sys; print(*sorted(sys.modules))", cwd=tmp_path)
    third = {
        name
        for name in set(done.stdout.split()) - set(bare.stdout.split())
        if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert third <= {"yolo_sophia", "yolo_sophia.autoload", "yolo_sophia.switch", "sitecustomize", "usercustomize"}


# Checkpoints and code -------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "unsafe_load",
    "full_load",
}
EXPECTED = {  # file: what is there on purpose
    "integration/external_optimizer.py": {"import_module"},
    "integration/contract.py": {"import_module"},  # Ultralytics' modules, by the names in its table
    "integration/status.py": {"import_module"},
    "bootstrap/sitecustomize.py": {"import_module"},
    "cli.py": {"import_module"},
    "autoload.py": {"import_module"},  # of what is imported already
    "__init__.py": {"import_module"},
}


def called(path: Path) -> set[str]:
    """Names that a module loads code or objects by, where it calls or imports one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            target = node.func
            name = (
                target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else ""
            )
            owner = target.value.id if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) else ""
            if name == "load" and owner in {"torch", "yaml", "pickle", "joblib", "np", "numpy", "hub"}:
                found.add(f"{owner}.load")
            if name in {"import_module", "torch_load", "torch_safe_load", "load_checkpoint", "attempt_load_one_weight"}:
                found.add(name)
            if isinstance(target, ast.Name) and name in FORBIDDEN:
                found.add(name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found |= {part for name in names for part in name.split(".")} & FORBIDDEN
    return found


def test_nothing_is_unpickled_and_no_code_is_run_by_us():
    files = sorted((ROOT / "yolo_sophia").rglob("*.py"))
    assert len(files) > 50
    found = {str(path.relative_to(ROOT / "yolo_sophia")): called(path) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == EXPECTED


# Reports --------------------------------------------------------------------------------------------------------------

NASTY = '<script>alert("x")</script>'
text = st.text(max_size=30) | st.sampled_from(
    [NASTY, "</td></table>", '" onload="alert(1)', "<!--", "]]>", "&lt;", "`````", "a|b\n\n# c", "$title"]
)
cell = text | st.tuples(text, text)
rows = st.integers(1, 3).flatmap(
    lambda n: st.tuples(
        st.lists(cell, min_size=n, max_size=n), st.lists(st.lists(cell, min_size=n, max_size=n), max_size=3)
    )
)
leaf = st.one_of(
    st.builds(Text, text, st.sampled_from(["plain", "note", "warning"])),
    st.builds(Verdict, text, text, st.sampled_from(["better", "worse hint", "open"]), st.lists(text, max_size=3)),
    st.builds(lambda caption, table, numbers: Table(caption, *table, numbers), text, rows, st.booleans()),
    st.builds(Code, text, text),
)
leaves = st.lists(leaf, max_size=3)
block = st.one_of(leaf, st.builds(Fold, text, leaves), st.builds(Split, leaves, leaves))
documents = st.builds(
    lambda title, badges, blocks: Document(title, badges, [Section("one", title, blocks)]),
    text,
    st.lists(text, max_size=3),
    st.lists(block, min_size=1, max_size=4),
)


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: set[tuple[str, tuple[str, ...]]] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.add((tag, tuple(sorted(key for key, _ in attributes))))


KNOWN = {
    ("p", ("class",)), ("article", ("class",)), ("header", ()), ("h3", ()), ("span", ("class",)), ("span", ()),
    ("ul", ()), ("li", ()), ("div", ("aria-label", "class", "role", "tabindex")), ("div", ("class",)), ("div", ()),
    ("table", ("class",)), ("caption", ()), ("thead", ()), ("tbody", ()), ("tr", ()), ("th", ("scope",)), ("td", ()),
    ("small", ()), ("pre", ("aria-label", "role", "tabindex")), ("details", ()), ("summary", ()), ("section", ("id",)),
    ("h2", ()), ("a", ("href",)),
}  # fmt: skip
FRAME = Tags(to_html(Document("", [], []))).found


@given(documents)
@example(
    Document(
        NASTY, [NASTY], [Section("one", NASTY, [Text(NASTY), Code(NASTY, NASTY), Table(NASTY, [NASTY], [[NASTY]])])]
    )
)
def test_no_text_becomes_markup(document):
    page = to_html(document)
    assert Tags(page).found <= FRAME | KNOWN
    markdown = to_markdown(document, "figures")
    assert not re.search(
        r"<(?!br>|/?details>|/?summary>)[a-zA-Z!/]", re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.S | re.M)
    )
