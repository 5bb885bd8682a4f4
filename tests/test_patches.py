"""The source patches: they apply to the pinned wheel, and the patched tree trains as the autoload does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def version_of(patch: Path) -> str:
    return patch.stem.removeprefix("ultralytics-")


PATCHES = sorted((ROOT / "patches").glob("*.patch"), key=lambda patch: Version(version_of(patch)))

spec = importlib.util.spec_from_file_location("make_patches", ROOT / "scripts" / "make_patches.py")
make_patches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_patches)

TRAIN = """
import sys, json
from ultralytics import YOLO
arguments = json.loads(sys.argv[1])
YOLO(arguments.pop("model")).train(optimizer="SophiaG", **arguments)
"""


def test_there_are_patches_for_the_oldest_a_late_and_the_newest_version():
    assert version_of(PATCHES[0]) == "8.3.0"
    assert Version("8.3.200") < Version(version_of(PATCHES[1])) < Version("8.4") < Version(version_of(PATCHES[-1]))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_only_adds_our_lines(patch):
    for line in patch.read_text().splitlines():
        assert line.startswith(("--- a/ultralytics/", "+++ b/ultralytics/", "@@ -", "+")), line
        if line.startswith("+") and not line.startswith("+++"):
            assert line == "+" or "patch_module" in line, line


def missing(tree: Path) -> list[str]:
    """What an unpacked wheel requires and this environment lacks."""
    (folder,) = tree.glob("ultralytics-*.dist-info")
    lines = metadata.PathDistribution(folder).requires or []
    needed = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{r} (found {found})" for r in needed if not r.specifier.contains(found := installed(r.name) or "0")]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch",
    [
        *(pytest.param(patch, marks=[pytest.mark.long, pytest.mark.compat], id=patch.stem) for patch in PATCHES[:-1]),
        pytest.param(PATCHES[-1], id=PATCHES[-1].stem),
    ],
)
def test_patched_tree_trains_with_the_autoload_off(patch, tmp_path, tiny_run, python):
    version = version_of(patch)
    try:
        tree = make_patches.fetch(version, tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot fetch ultralytics {version}: {error.stderr[-200:]!r}")
    if lacking := missing(tree):
        pytest.skip(f"ultralytics {version} does not run here: it needs {', '.join(lacking)}")
    assert make_patches.make_patch(tree) == patch.read_text(), "the patch is not what the script makes"
    elsewhere = os.environ.get("PYTHONPATH", "")

    def train(name: str, path: str, autoload: str, check: bool = True) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [path, elsewhere]))
        arguments = json.dumps({**tiny_run, "name": name})
        return python("-c", TRAIN, arguments, PYTHONPATH=path, YOLO_SOPHIA_AUTOLOAD=autoload, check=check)

    train("autoload", str(tree), "1")
    plain = train("plain", str(tree), "0", check=False)
    assert "NotImplementedError" in plain.stderr  # without patch and autoload there is no SophiaG
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tree, check=True)
    done = train("patched", str(tree), "0")
    assert "SophiaG" in done.stdout + done.stderr
    assert f"Ultralytics {version} " in done.stdout + done.stderr
    weights = [
        torch.load(Path(tiny_run["project"]) / name / "weights" / "last.pt", weights_only=False)["model"].state_dict()
        for name in ("autoload", "patched")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# What is expected of Ultralytics --------------------------------------------------------------------------------------


@pytest.mark.compat
def test_the_installed_version_has_what_is_expected():
    from yolo_sophia.integration.contract import CONTRACT, differences

    assert differences() == {}
    assert len({symbol.place for symbol in CONTRACT}) == len(CONTRACT)


@pytest.mark.compat
def test_everything_that_is_patched_wrapped_or_recorded_is_expected():
    from yolo_sophia.integration import criteria
    from yolo_sophia.integration.contract import CONTRACT

    by_use = {use: [symbol for symbol in CONTRACT if symbol.use == use] for use in ("wrapped", "recorded")}
    source = (ROOT / "yolo_sophia" / "integration" / "session.py").read_text()
    wrapped = set(re.findall(r'Binding\((?:self\.)?trainer, "(\w+)"', source))
    assert {symbol.place.rpartition(".")[2] for symbol in by_use["wrapped"]} == wrapped
    kinds, recorded = [criteria.Recorder], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        recorded |= set(kind.recorded_callables)
    assert {symbol.attribute for symbol in by_use["recorded"]} == recorded - {"bcedice_loss.dice"}
