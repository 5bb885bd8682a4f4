"""Write patches/ultralytics-VERSION.patch: the integration as source lines, for forks of Ultralytics.

A patch only adds lines of this project at the end of the patched modules. It has no context lines, so it contains
nothing of Ultralytics and applies with `git apply --unidiff-zero`.

Usage: python scripts/make_patches.py VERSION [VERSION ...]     (downloads each wheel with pip)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from yolo_sophia.autoload import TARGETS

PATCHES = Path(__file__).parent.parent / "patches"


def fetch(version: str, folder: Path) -> Path:
    """Download the wheel of a version with pip and unpack it into the folder; returns the folder of the tree."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"ultralytics=={version}"]
    subprocess.run(pip, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("ultralytics-*.whl"))) as wheel:
        wheel.extractall(folder / "tree")
    return folder / "tree"


def make_patch(tree: Path) -> str:
    """The patch for an unpacked wheel."""
    parts = []
    for name in TARGETS:
        path = f"{name.replace('.', '/')}.py"
        if not (tree / path).is_file():
            path = f"{name.replace('.', '/')}/__init__.py"
        text = (tree / path).read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError(f"{path} does not end with a newline; a patch without context lines cannot append to it.")
        end = text.count("\n")
        added = ("", "from yolo_sophia.autoload import patch_module  # noqa: E402", "", f'patch_module("{name}")')
        parts += [f"--- a/{path}", f"+++ b/{path}", f"@@ -{end},0 +{end + 1},{len(added)} @@"]
        parts += [f"+{line}" for line in added]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write a patch for each version named on the command line."""
    for version in sys.argv[1:] or sys.exit(__doc__):
        with tempfile.TemporaryDirectory() as folder:
            target = PATCHES / f"ultralytics-{version}.patch"
            target.write_text(make_patch(fetch(version, Path(folder))), encoding="utf-8")
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
