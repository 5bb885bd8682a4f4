"""Dependencies point one way, and only the integration knows Ultralytics."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

PACKAGE = Path(__file__).parent.parent / "yolo_sophia"
ALLOWED = {  # room -> rooms of this package that it may import
    "optim": {"options", "optim", "curvature"},
    "curvature": {"curvature"},
    "atomic": set(),
    "options": set(),
    "yaml_io": set(),
    "presets": {"options", "yaml_io"},
    "switch": set(),
    "autoload": {"switch", "integration"},
    "bootstrap": {"autoload"},
    "shapes": set(),
    "integration": {
        "options",
        "atomic",
        "optim",
        "curvature",
        "presets",
        "autoload",
        "switch",
        "shapes",
        "integration",
    },
    "search_space": {"options"},
    "runs": {"options", "atomic", "presets", "yaml_io", "integration", "runs"},
    "report": {"atomic", "runs", "report"},
    "compare": {"options", "atomic", "presets", "integration", "runs", "report", "search_space", "tune", "compare"},
    "tune": {"options", "atomic", "presets", "integration", "runs", "report", "search_space", "tune"},
    "cli": {"options", "optim", "curvature", "presets", "autoload", "integration", "runs", "compare", "tune", ""},
    "": {"optim", "autoload", "tune"},  # __init__.py
}
EXTRAS = {  # room -> extras of pyproject.toml whose packages it may import; any other room has the dependencies alone
    "runs": {"compare", "tune", "ray", "test-extras"},  # pycocotools is taken where faster-coco-eval is missing
    "report": {"compare", "tune"},
    "compare": {"compare"},
    "tune": {"tune", "ray"},
}
DISTRIBUTIONS = {"triton": "torch", "cv2": "opencv-python", "yaml": "pyyaml", "faster_coco_eval": "faster-coco-eval"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def test_the_list_is_not_empty():
    assert {room(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "yolo_sophia":
            target = parts[1] if len(parts) > 1 else ""
            target = "" if target in {"__version__"} else target
            # `from yolo_sophia import autoload` names the package first, then the room.
            assert target in ALLOWED[room(path)] or target == "", f"{path} imports {name}"
        elif parts[0] == "ultralytics":
            assert room(path) == "integration", f"{path} imports {name}; only integration/ knows Ultralytics"
        elif parts[0] == "torch":
            assert room(path) in {"optim", "curvature", "integration"}, f"{path} imports {name}"


def module(path: Path) -> str:
    parts = ["yolo_sophia", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def test_no_circle_of_imports():
    """Of modules, those under TYPE_CHECKING and inside functions included. `from yolo_sophia import x` counts as x."""
    modules = {module(path): path for path in FILES}
    edges = {name: imports(path) & modules.keys() - {name, "yolo_sophia"} for name, path in modules.items()}
    checked: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in checked:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            checked.add(name)

    for name in sorted(modules):
        visit(name, ())


def declared() -> dict[str, set[str]]:
    """Names of the distributions by extra; the dependencies are those of the extra ""."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {re.match(r"[\w.-]+", line)[0].lower() for line in lines} for extra, lines in lists.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_imported_is_declared(path):
    there, extras = declared(), EXTRAS.get(room(path), set())
    allowed = set.union(*(there[extra] for extra in {"", *extras}))
    names = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"yolo_sophia"}
    missing = {name for name in names if DISTRIBUTIONS.get(name, name) not in allowed}
    assert not missing, f"{path} imports {missing}, which pyproject.toml does not declare in dependencies or {extras}"
