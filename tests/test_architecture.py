"""Dependencies point one way, and only the integration knows Ultralytics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "yolo_sophia"
ALLOWED = {  # room -> rooms of this package that it may import
    "optim": {"optim", "curvature"},
    "curvature": {"curvature"},
    "atomic": set(),
    "yaml_io": set(),
    "presets": {"curvature", "yaml_io"},
    "autoload": {"integration"},
    "shapes": set(),
    "integration": {"atomic", "optim", "curvature", "presets", "autoload", "shapes", "integration"},
    "search_space": set(),
    "runs": {"atomic", "presets", "yaml_io", "integration", "runs"},
    "report": {"atomic", "runs", "report"},
    "compare": {"atomic", "presets", "integration", "runs", "report", "search_space", "yaml_io", "compare"},
    "tune": {"atomic", "presets", "integration", "runs", "report", "search_space", "compare", "tune"},
    "cli": {"optim", "curvature", "presets", "autoload", "integration", "compare", "tune", ""},
    "": {"optim", "autoload", "tune"},  # __init__.py
}
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
