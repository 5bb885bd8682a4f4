"""Shared fixtures: tiny data, tiny models, subprocesses, and a watch that no test leaves Ultralytics patched."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
os.environ.setdefault("OMP_NUM_THREADS", "1" if WORKER else "2")
if WORKER:  # Ultralytics' settings file would be written by several processes at once
    _folder = Path(os.environ.get("YOLO_CONFIG_DIR", Path(tempfile.gettempdir()) / f"yolo-sophia-tests-{os.getuid()}"))
    (_folder / WORKER).mkdir(parents=True, exist_ok=True)
    os.environ["YOLO_CONFIG_DIR"] = str(_folder / WORKER)
# Nothing here may reach for the network: Ultralytics asks GitHub and PyPI for news at import and at training start.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

# `pytest` draws few inputs, always the same; `pytest --hypothesis-profile=long` draws others each time.
settings.register_profile(
    "default", max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("default"), max_examples=1500, derandomize=False)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a skipped test fails, unless it is marked `cuda`")


def pytest_collection_modifyitems(config, items):
    """Deselect the tests marked `long`, unless `-m` names them, and those whose requirement is not met."""
    long = "long" in config.option.markexpr
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("long") and not long)
        or not all(mark.args[0] for mark in item.iter_markers("requires"))
    ]
    config.hook.pytest_deselected(items=left_out)
    left_out = set(left_out)
    items[:] = [item for item in items if item not in left_out]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # files that take long begin first: two processes end together


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With --no-skips, turn a skip into a failure: a test that nothing runs shows nothing."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.option.no_skips:
        if not item.get_closest_marker("cuda"):
            report.outcome, report.longrepr = "failed", f"skipped under --no-skips: {report.longrepr[-1]}"
    return report


@pytest.fixture(autouse=True)
def _nothing_left_patched():
    """Every test leaves the patches as it found them."""
    from yolo_sophia import installed
    from yolo_sophia.integration.patches import PATCHES

    before = installed(), {(id(r.owner), r.name) for r in PATCHES.replaced}
    yield
    after = installed(), {(id(r.owner), r.name) for r in PATCHES.replaced}
    assert after[0] == before[0], "the test changed whether the hooks are installed"
    assert before[1] <= after[1], "the test removed patches and did not apply them again"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """data.yaml of a generated set: 16 training and 8 validation images, 64 px."""
    from yolo_sophia.shapes import generate

    root = generate(tmp_path_factory.mktemp("data") / "tiny", train=16, val=8, size=64)
    path = root.parent / "tiny.yaml"
    names = "".join(f"  {i}: c{i}\n" for i in range(6))
    path.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """YAML of a YOLOv8 with the real head and loss and 1/16 of the width (the n is in its name: scale n)."""
    import yaml
    from ultralytics.utils import ROOT as ULTRALYTICS

    content = yaml.safe_load((ULTRALYTICS / "cfg/models/v8/yolov8.yaml").read_text())
    content |= {"scales": {"n": [0.33, 0.0625, 256]}, "nc": 6}
    path = tmp_path_factory.mktemp("model") / "yolov8n-tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """YAML of a detector of four convolutions and YOLOv8's head: quick to compile."""
    import yaml

    layout = {"nc": 6, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4, "head": [[[2, 3], 1, "Detect", ["nc"]]]}
    path = tmp_path_factory.mktemp("model") / "small.yaml"
    path.write_text(yaml.safe_dump(layout))
    return path


@pytest.fixture(scope="session")
def four_classes(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint of the tiny model with statistics as after a training, of four classes that the data lacks."""
    import torch
    import yaml
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("weights")
    layout = folder / "yolov8n-four.yaml"
    layout.write_text(yaml.safe_dump(yaml.safe_load(tiny_model.read_text()) | {"nc": 4}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YOLO(layout).model
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean)
    model.names = dict(enumerate(("cat", "dog", "person", "tree")))
    torch.save({"model": model}, folder / "four.pt")
    return folder / "four.pt"


@pytest.fixture
def tiny_run(tiny_data, tiny_model, tmp_path) -> dict:
    """Arguments of a training of about a second: 2 epochs of 4 batches of 4 images, one optimizer step per batch."""
    return {
        "model": str(tiny_model),
        "data": str(tiny_data),
        "imgsz": 64,
        "epochs": 2,
        "batch": 4,
        "nbs": 4,
        "workers": 0,
        "device": "cpu",
        "plots": False,
        "val": False,
        "project": str(tmp_path / "runs"),
        "name": "run",
        "seed": 0,
    }


@pytest.fixture(scope="session")
def python():
    """Run `python *arguments` in a fresh interpreter and return the finished process, its output as text."""

    def run(*arguments: str, check: bool = True, cwd: Path | None = None, **environment: str):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **environment},
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real images at {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def fresh():
    """Call a function of a test module in a fresh interpreter: hooks off, torch imported, Ultralytics not.

    One interpreter does the slow imports, and each call gets a fork of it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver on this platform")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", "matplotlib", "torch", "torchvision", "yaml"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_SOPHIA_AUTOLOAD", "0")
        pool = context.Pool(1, maxtasksperchild=1)
    with pool:
        yield lambda function, *arguments: pool.apply(function, arguments)
