"""Checks of a release: `python scripts/check_dist.py dist` (`make dist` builds it first).

The script checks the contents and the metadata of the wheel and the sdist. It installs each into an environment of its
own, outside the source tree, and runs a plain `yolo train ... optimizer=SophiaG` there. torch and the other
requirements of Ultralytics are shared from this interpreter's environment by a line in a .pth file; Ultralytics itself
is installed beside the package, for its `yolo` command.
"""

from __future__ import annotations

import argparse
import csv
import email
import os
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

NEEDED = {
    "yolo_sophia_autoload.pth",
    "yolo_sophia/autoload.py",
    *(f"yolo_sophia/report/templates/{name}" for name in ("report.html", "report.md", "style.css")),
    "yolo_sophia/configs/data/shapes.yaml",
    *(f"yolo_sophia/configs/presets/{name}.yaml" for name in ("detect-scratch", "detect-finetune", "detect-short")),
}
IN_SDIST = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "tests/conftest.py"}
FOREIGN = {"runs", "datasets", "data", ".venv", ".git", "__pycache__", ".pytest_cache", "dist"}
WEIGHTS = {".pt", ".pth", ".onnx", ".jpg", ".npy", ".cache"}
LARGEST = 8_000_000


def names_of(path: Path) -> set[str]:
    """Files in a wheel, or in an sdist without its top folder."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def check_contents(path: Path) -> None:
    """What must be there is there, and nothing that belongs to a machine."""
    names, wheel = names_of(path), path.suffix == ".whl"
    source = {"yolo_sophia/autoload.pth", *(n.replace("yolo_sophia/configs", "configs") for n in NEEDED if "/" in n)}
    missing = (NEEDED if wheel else IN_SDIST | source) - names
    assert not missing, f"{path.name} lacks {sorted(missing)}"
    for name in names:
        parts = Path(name).parts
        shipped = name.startswith(("yolo_sophia/configs/data", "configs/data"))
        assert not FOREIGN & set(parts) or shipped, f"{path.name} has {name}"
        assert Path(name).suffix not in WEIGHTS or name.endswith("autoload.pth"), f"{path.name} has {name}"
    if wheel:
        others = {name for name in names if Path(name).parts[0] != "yolo_sophia" and ".dist-info/" not in name}
        assert others == {"yolo_sophia_autoload.pth"}, f"{path.name} has {sorted(others)}"
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names), f"{path.name} lacks its licence"
        line = zipfile.ZipFile(path).read("yolo_sophia_autoload.pth").decode()
        assert line.startswith("import sys; ") and line.count("\n") == 1, line
    assert path.stat().st_size < LARGEST, f"{path.name} has {path.stat().st_size} bytes"
    print(f"{path.name}: {len(names)} files, {path.stat().st_size:,} bytes")


def check_metadata(path: Path) -> None:
    """Name, version, licence, requirements."""
    archive = zipfile.ZipFile(path)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    fields = email.message_from_bytes(archive.read(name))
    version = path.name.split("-")[1]
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == (
        "yolo-sophia",
        version,
        "AGPL-3.0-only",
    )
    required = [r.partition(";")[0].strip() for r in fields.get_all("Requires-Dist") if "extra ==" not in r]
    others = "filelock jinja2 markupsafe matplotlib numpy opencv-python psutil pyyaml torch"
    assert sorted(required) == [*others.split(), "ultralytics<9,>=8.3"], required
    print(
        f"metadata: {fields['Name']} {version}, {fields['License-Expression']}, requires {', '.join(sorted(required))}"
    )


class Place:
    """An environment of its own with a distribution in it, and an empty folder to work in."""

    def __init__(self, folder: Path, distribution: Path):
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        self.site = Path(self.run(self.bin / "python", "-c", "import site; print(site.getsitepackages()[0])").strip())
        ultralytics = f"ultralytics=={metadata.version('ultralytics')}"
        for what in (ultralytics, str(distribution.resolve())):
            self.run(
                self.bin / "python", "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", what
            )
        (self.site / "zz_shared.pth").write_text(f"{site.getsitepackages()[0]}\n")

    def run(self, *command: object) -> str:
        """Run a command in the working folder; its output."""
        own = {"YOLO_CONFIG_DIR": str(self.folder), "YOLO_OFFLINE": "true", "PATH": f"{self.bin}:{os.environ['PATH']}"}
        left_out = {"PYTHONPATH", "VIRTUAL_ENV", "YOLO_SOPHIA_AUTOLOAD"}
        inherited = {key: value for key, value in os.environ.items() if key not in left_out}
        done = subprocess.run(
            list(map(str, command)), cwd=self.work, env={**inherited, **own}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


def check_main_job(place: Place) -> None:
    """Plain `yolo` trains with SophiaG on the shipped data set."""
    where = place.run(place.bin / "python", "-c", "import yolo_sophia; print(yolo_sophia.__file__)").strip()
    assert Path(where).is_relative_to(place.site), f"found {where}, expected the installed package in {place.site}"
    said = place.run(place.bin / "yolo-sophia", "status")
    assert "autoload: on" in said and "state: ready" in said, said
    place.run(place.bin / "yolo", "settings", f"datasets_dir={place.folder / 'datasets'}")
    data = place.run(place.bin / "yolo-sophia", "path", "data/shapes.yaml").strip()
    assert Path(data).is_relative_to(place.site), data
    words = "model=yolov8n.yaml imgsz=64 epochs=1 batch=8 nbs=8 fraction=0.1 workers=0 device=cpu optimizer=SophiaG"
    said = place.run(place.bin / "yolo", "train", f"data={data}", *words.split(), f"project={place.work}", "name=run")
    rows = list(csv.DictReader((place.work / "run" / "results.csv").open(), skipinitialspace=True))
    assert len(rows) == 1 and float(rows[0]["sophia/refreshes"]) >= 1, rows
    assert "SophiaG(lr=" in said and (place.work / "run" / "sophia.png").is_file(), said
    print(f"  trained from {where}: {rows[0]['sophia/refreshes']} Hessian updates, mAP50 {rows[0]['metrics/mAP50(B)']}")


def check_removal(place: Place) -> None:
    """The .pth line is silent where the package was deleted by hand, and pip takes all of it away."""
    shutil.move(place.site / "yolo_sophia", place.folder / "aside")
    said = place.run(place.bin / "python", "-c", "import ultralytics; print('silent')")
    assert said == "silent\n", said
    shutil.move(place.folder / "aside", place.site / "yolo_sophia")
    place.run(place.bin / "python", "-m", "pip", "uninstall", "-q", "-y", "yolo-sophia")
    left = [path.name for path in place.site.glob("*sophia*")]
    assert not left, f"pip uninstall left {left}"
    print("  deleted by hand: silent; uninstalled: nothing left")


def main() -> int:
    """Check all distributions of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with one wheel and one sdist")
    folder = parser.parse_args().folder
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    for path in (wheel, sdist):
        check_contents(path)
    check_metadata(wheel)
    for path in (wheel, sdist):
        with tempfile.TemporaryDirectory() as scratch:
            print(f"{path.name}, installed on its own:")
            place = Place(Path(scratch).resolve(), path)
            check_main_job(place)
            check_removal(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
