"""What must be equal bit for bit from process to process, and what a checkpoint is to somebody without this package."""

from __future__ import annotations

import pickletools
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from ultralytics.utils.patches import torch_load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from verify_bit_identity import largest_difference

SCRIPTS = Path(__file__).parents[1] / "scripts"

pytestmark = pytest.mark.slow

WITHOUT_PACKAGE = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "yolo_sophia"]:
    del sys.modules[name]  # the line in site-packages has imported the autoload, which found itself switched off
class Blocker:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "yolo_sophia":
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker)
"""


@pytest.fixture(scope="module")
def words(tiny_data, tiny_model) -> list[str]:
    """`key=value` words of a training of a second."""
    return [f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=4", "nbs=8", "device=cpu", "plots=False"]


def test_other_optimizers_train_as_without_the_package(python, words):
    done = python(SCRIPTS / "verify_bit_identity.py", *words, "epochs=2")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["SGD", "AdamW", "MuSGD", "auto"]
    for line in lines:
        found = re.search(r"max abs difference 0 over (\d+) tensors, results.csv equal, args.yaml equal", line)
        assert found, line
        assert int(found[1]) > 1000


@pytest.fixture(scope="module")
def commands(python, words, tmp_path_factory) -> list[Path]:
    """Run folders of one `yolo train optimizer=SophiaG` command, run twice."""
    project = tmp_path_factory.mktemp("commands")
    entry = "from ultralytics.cfg import entrypoint; entrypoint()"
    settings = ["optimizer=SophiaG", "epochs=3", "hessian_interval=2", "save_period=1", f"project={project}"]
    for name in ("one", "two"):
        python("-c", entry, "train", *words, *settings, f"name={name}")
    return [project / "one", project / "two"]


def test_same_command_gives_the_same_weights(commands):
    # epoch2.pt is the last checkpoint before Ultralytics strips the optimizer off.
    one, two = (torch_load(folder / "weights" / "epoch2.pt", map_location="cpu") for folder in commands)
    for key, least in (("optimizer", 500), ("ema", 300)):
        states = [ckpt[key] if key == "optimizer" else ckpt[key].state_dict() for ckpt in (one, two)]
        tensors, difference = largest_difference(*states)
        assert difference == 0
        assert tensors > least
    finals = [torch_load(folder / "weights" / "best.pt", map_location="cpu")["model"] for folder in commands]
    assert largest_difference(*(model.state_dict() for model in finals))[1] == 0


SERVE = """
import onnx, sys, torch, ultralytics
from ultralytics import YOLO
results, data, *paths = sys.argv[1:]
folder = dict(project=results + ".runs", device="cpu")
image, found = ultralytics.ASSETS / "bus.jpg", {}

def boxes(task):
    results = getattr(YOLO(path), task)(image, imgsz=64, conf=1e-6, verbose=False, **folder)
    return [result.boxes.data for result in results]

for path in paths:
    script = torch.jit.load(YOLO(path).export(format="torchscript", imgsz=64))
    graph = onnx.load(YOLO(path).export(format="onnx", imgsz=64, simplify=False)).graph
    found[path] = {
        "predict": boxes("predict"),
        "track": boxes("track"),
        "val": [torch.tensor(list(YOLO(path).val(data=data, imgsz=64, plots=False, **folder).results_dict.values()))],
        "torchscript": [script(torch.ones(1, 3, 64, 64))],
        "onnx": [torch.tensor(list(graph.SerializeToString()))],
    }
torch.save(found, results)
assert bool([name for name in sys.modules if "yolo_sophia" in name]) == PRESENT
for path in paths if not PRESENT else ():
    YOLO(path).train(data=data, imgsz=64, batch=8, epochs=1, optimizer="AdamW", plots=False, **folder)
"""


def test_checkpoints_serve_with_and_without_the_package(commands, python, words, tmp_path):
    """Predict, track, validate, export, equally; without the package also fine-tune.

    Without it, a checkpoint of the middle of the run serves as well as the final best.pt.
    """
    pytest.importorskip("onnx")
    pytest.importorskip("lap")  # of the trackers
    files = [commands[0] / "weights" / name for name in ("best.pt", "epoch0.pt")]
    assert torch_load(files[1], map_location="cpu")["optimizer"]["state"]
    assert torch_load(files[0], map_location="cpu")["optimizer"] is None
    data, found = words[0].partition("=")[2], []
    for present, before in ((True, "import yolo_sophia"), (False, WITHOUT_PACKAGE)):
        given = files[: 1 if present else 2]
        code = f"{before}\nPRESENT = {present}\n{SERVE}"
        python("-c", code, tmp_path / f"{present}.pt", data, *given, YOLO_SOPHIA_AUTOLOAD=str(int(present)))
        found.append(torch.load(tmp_path / f"{present}.pt"))
    best = str(files[0])
    assert [*found[1]] == [*map(str, files)] and found[0][best]["predict"][0].numel() > 0
    for use, tensors in found[0][best].items():
        assert all(map(torch.equal, tensors, found[1][best][use])), use


@pytest.mark.parametrize("name", ["epoch0.pt", "last.pt", "best.pt"])
def test_nothing_of_ours_is_pickled(commands, name):
    with zipfile.ZipFile(commands[0] / "weights" / name) as file:
        (member,) = [entry for entry in file.namelist() if entry.endswith("/data.pkl")]
        found = list(pickletools.genops(file.read(member)))
    assert not [op for op, _, _ in found if op.name in {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}]  # names only by GLOBAL
    classes = {argument for op, argument, _ in found if op.name == "GLOBAL"}
    assert any(x.startswith("ultralytics.nn.tasks ") for x in classes)
    assert not [x for x in classes if "sophia" in x.lower()]


def test_resume_goes_on_from_the_very_state(python, words, tmp_path):
    # 4 steps an epoch: refreshes at steps 0, 3, 6, 9
    knobs = ["nbs=4", "sophia=published", "rho=0.3", "hessian_interval=3", "beta2=0.9"]
    done = python(SCRIPTS / "verify_resume.py", *words, *knobs, "epochs=3", f"output={tmp_path}")
    *equal, saved, loaded, end, kinds = done.stdout.splitlines()
    assert len(equal) == 4
    assert [int(re.search(r": (\d+) tensors, max abs diff 0$", line)[1]) > 500 for line in equal] == [True] * 4
    assert "optimizer state equal: 549 tensors, max abs diff 0" in equal
    clock = "rho=0.3, hessian_interval=3, hessian_age={}, refresh_index={}, hessian_updates={}, hessian_dropped=0"
    assert saved == "saved: " + clock.format(1, 2, 2)
    assert loaded == "loaded: " + clock.format(1, 2, 2)
    assert end == "end: " + clock.format(3, 4, 4)
    assert kinds == "h in last.pt: torch.float32"
    groups = torch_load(tmp_path / "first.pt", map_location="cpu")["loaded"]["param_groups"]
    assert all(group["betas"][1] == 0.9 for group in groups)
    log = (tmp_path / "first.log").read_text()
    assert "beta2=0.9 (explicit)" in log
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]
