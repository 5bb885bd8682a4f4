"""Others in the same process: packages that replace the same, threads, a second trainer, loggers, xdist, notebooks.

Functions named `child_*` run in fresh interpreters (fixture `fresh`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


# Packages that replace what we replace --------------------------------------------------------------------------------


class Theirs:
    """A package that wraps methods of Ultralytics and counts their calls.

    Args:
        polite: Whether it says what it has wrapped, as functools.wraps does.
    """

    def __init__(self, polite: bool = True):
        self.calls: Counter[str] = Counter()
        self.polite, self.saved, self.put = polite, {}, {}

    def install(self) -> None:
        import ultralytics.engine.trainer as module

        for name in ("check_resume", "build_optimizer", "optimizer_step", "save_model", "final_eval"):
            self.wrap(module.BaseTrainer, name)
        for name in ("convert_optimizer_state_dict_to_fp16", "strip_optimizer"):
            self.wrap(module, name)

    def wrap(self, owner: Any, name: str) -> None:
        original = owner.__dict__[name]

        def counted(*args, **kwargs):
            self.calls[name] += 1
            return original(*args, **kwargs)

        replacement = functools.wraps(original)(counted) if self.polite else counted
        self.saved[owner, name], self.put[owner, name] = original, replacement
        setattr(owner, name, replacement)

    def uninstall(self) -> None:
        for (owner, name), original in self.saved.items():
            setattr(owner, name, original)

    def in_place(self) -> bool:
        return all(owner.__dict__[name] is put for (owner, name), put in self.put.items())


def trained(run: dict[str, Any], optimizer: str) -> str:
    """The class of the optimizer that trained, or the error."""
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    said: list[str] = []

    def listen(record):
        said.append(str(record.msg))
        return True

    LOGGER.addFilter(listen)
    try:
        model = YOLO(run["model"])
        model.train(**{**run, "epochs": 1, "name": optimizer, "optimizer": optimizer, "exist_ok": True})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        LOGGER.removeFilter(listen)
    chosen = sum("chosen for a training from scratch" in line for line in said)
    return f"{type(model.trainer.optimizer).__name__}, {chosen} announced"


def child_patchers(order: str, run: dict[str, Any]) -> dict[str, Any]:
    from yolo_sophia import autoload

    theirs, said = Theirs(polite="rude" not in order), []

    def ours() -> None:
        try:
            autoload.install()
        except RuntimeError as error:
            said.append(str(error))

    for step in order.split():
        {
            "ours": ours,
            "off": autoload.uninstall,
            "theirs": theirs.install,
            "rude": theirs.install,
            "theirs-off": theirs.uninstall,
        }[step]()
    report = {"install": said, "SophiaG": trained(run, "SophiaG"), "calls": dict(theirs.calls)}
    theirs.calls.clear()
    autoload.uninstall()
    report |= {"after": trained(run, "SophiaG"), "AdamW": trained(run, "AdamW"), "in place": theirs.in_place()}
    return report | {"calls after": dict(theirs.calls)}


@pytest.mark.compat
@pytest.mark.parametrize("order", ["theirs ours off ours", "ours theirs off ours", "ours rude"])
def test_packages_that_replace_the_same(order, fresh, tiny_run):
    report = fresh(child_patchers, order, tiny_run)
    assert report["SophiaG"] == "SophiaG, 1 announced"
    calls = report["calls"]
    assert calls.pop("strip_optimizer") == 2
    assert calls.pop("optimizer_step") == 4
    calls.pop("convert_optimizer_state_dict_to_fp16", 0)  # which ours does not call for Sophia
    assert calls == dict.fromkeys(["check_resume", "build_optimizer", "save_model", "final_eval"], 1)
    # Uninstalled, also beneath them: theirs is what it was, and Ultralytics knows no SophiaG.
    assert report["in place"]
    # Some versions name None for what they do not know.
    assert re.match(r"NotImplementedError: Optimizer '(SophiaG|None)' not found in list of avail", report["after"])
    assert report["AdamW"] == "AdamW, 0 announced"
    assert report["calls after"]["build_optimizer"] == 2 and report["calls after"]["optimizer_step"] == 4


@pytest.mark.parametrize("order", ["rude ours", "theirs ours theirs-off"])
def test_what_cannot_work_is_an_error(order, fresh, tiny_run):
    """They do not say what they have wrapped, or put Ultralytics' own methods back over ours."""
    report = fresh(child_patchers, order, tiny_run)
    assert report["SophiaG"].startswith("NotImplementedError: Optimizer 'SophiaG' not found in list of available optim")
    assert report["AdamW"] == "AdamW, 0 announced"
    assert len(report["install"]) == (order == "rude ours")
    assert all("BaseTrainer.check_resume takes ('args', 'kwargs'), expected" in said for said in report["install"])


# Threads, and several trainers ----------------------------------------------------------------------------------------


def together(*functions: Any) -> list[Any]:
    """Results of functions called in a thread each, at once; an error is a result."""
    results, gate = [None] * len(functions), threading.Barrier(len(functions))

    def call(i: int) -> None:
        gate.wait()
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def child_threads(run: dict[str, Any]) -> dict[str, Any]:
    from yolo_sophia import autoload

    def arrive() -> str:
        autoload.install()
        from ultralytics.engine.trainer import BaseTrainer

        autoload.install()
        method = BaseTrainer.build_optimizer
        return f"{hasattr(method, '__wrapped__')} {hasattr(method.__wrapped__, '__wrapped__')}"

    arrived = together(*[arrive] * 8)
    pair = together(lambda: trained(run, "SophiaG"), lambda: trained(run, "AdamW"))
    return {"arrived": arrived, "pair": pair}


def test_threads(fresh, tiny_run):
    report = fresh(child_threads, tiny_run)
    assert report["arrived"] == ["True False"] * 8
    assert [shown.split(",")[0] for shown in report["pair"]] == ["SophiaG", "AdamW"]
    project = Path(tiny_run["project"])
    rows = [(project / name / "results.csv").read_text() for name in ("SophiaG", "AdamW")]
    assert ["sophia/rho" in text for text in rows] == [True, False]
    assert all(len(text.splitlines()) == 2 for text in rows)


def child_pair(run: dict[str, Any], first: str, installed: bool) -> list[float]:
    """Weights of an AdamW training that was set up beside another one, and trained after it."""
    import torch
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.utils.torch_utils import init_seeds

    from yolo_sophia import autoload

    if installed:
        autoload.install()
    other, adamw = (
        DetectionTrainer(overrides={**run, "name": name, "optimizer": optimizer, "exist_ok": True, "epochs": 1})
        for name, optimizer in (("other", first), ("adamw", "AdamW"))
    )
    other.train()
    init_seeds(0)
    adamw.train()
    assert type(other.optimizer).__name__ == first and type(adamw.optimizer).__name__ == "AdamW"
    return torch.cat([p.detach().flatten() for p in adamw.model.parameters()]).tolist()


def test_two_trainers_in_one_process(fresh, tiny_run):
    beside_sophia = fresh(child_pair, tiny_run, "SophiaG", True)
    assert beside_sophia == fresh(child_pair, tiny_run, "SGD", False)


# Loggers --------------------------------------------------------------------------------------------------------------

OPTIONAL = {"mlflow", "wandb"}  # in .venv-extras
LOGGERS = {  # logger: package, and what reads back what was logged for sophia/rho
    "tensorboard": (
        "tensorboard",
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n"
        "e = E(str(save_dir)); e.Reload(); print('LOGGED', [s.value for s in e.Scalars('sophia/rho')])\n"
        "names = 'clip_fraction rho grad_norm momentum_norm hessian_norm update_norm refreshes'.split()\n"
        "assert all([s.step for s in e.Scalars(f'sophia/{name}')] == [1, 2] for name in names)",
    ),
    "mlflow": (
        "mlflow",
        "import mlflow; client = mlflow.MlflowClient()\n"
        "run, = client.search_runs([e.experiment_id for e in client.search_experiments()])\n"
        "print('LOGGED', [m.value for m in client.get_metric_history(run.info.run_id, 'sophia/rho')])\n"
        "assert (run.data.params['optimizer'], run.data.params['lr0']) == ('SophiaG', '0.004')",
    ),
    "wandb": (
        "wandb",
        "file, = save_dir.rglob('*.wandb'); data = file.read_bytes()\n"
        "print('LOGGED', [0.25] * min(2, data.count(b'sophia/rho')))",
    ),
}
TRAIN = """
import json, os, sys
from pathlib import Path
from ultralytics import YOLO, settings
settings.update({name: name == sys.argv[2] for name in ("tensorboard", "mlflow", "wandb")})
arguments = json.loads(sys.argv[1])
model = YOLO(arguments.pop("model"))
def show_configuration(trainer):
    run = getattr(sys.modules.get("wandb"), "run", None)
    print("CONFIGURATION", trainer.args.lr0, run and run.config["lr0"])

model.add_callback("on_train_start", show_configuration)
model.train(optimizer="SophiaG", rho=0.25, **arguments)
save_dir = model.trainer.save_dir
"""


@pytest.mark.parametrize(
    "logger", [pytest.param(name, marks=pytest.mark.extras if name in OPTIONAL else ()) for name in LOGGERS]
)
def test_loggers(logger, tiny_run, tmp_path, monkeypatch, python):
    """Ultralytics' own integrations, which patch and listen in their ways, get our columns, and training goes on."""
    package, read = LOGGERS[logger]
    pytest.importorskip(package)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # Ultralytics logs nothing while it is there
    folder = tmp_path / "logs"
    folder.mkdir()
    environment = {
        "YOLO_CONFIG_DIR": str(tmp_path / "config"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
    }
    done = python("-c", TRAIN + read, json.dumps(tiny_run), logger, cwd=folder, **environment)
    assert "LOGGED [0.25, 0.25" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    # The preset's rate, and not Ultralytics' default.
    assert f"CONFIGURATION 0.004 {0.004 if logger == 'wandb' else None}" in done.stdout


# pytest-xdist, and notebooks ------------------------------------------------------------------------------------------

XDIST = """
import pytest
from ultralytics import YOLO

@pytest.mark.parametrize("optimizer", ["SophiaG", "AdamW", "SophiaG", "SGD"])
def test_train(optimizer, tmp_path):
    model = YOLO({model!r})
    model.train(optimizer=optimizer, project=str(tmp_path), **{run!r})
    assert type(model.trainer.optimizer).__name__ == optimizer
    assert ("sophia/rho" in (tmp_path / "run" / "results.csv").read_text()) == (optimizer == "SophiaG")
"""


@pytest.mark.long
def test_under_xdist(tiny_run, tmp_path):
    run = {key: value for key, value in tiny_run.items() if key not in {"model", "project"}}
    (tmp_path / "test_it.py").write_text(XDIST.format(model=tiny_run["model"], run=run))
    line = [sys.executable, "-m", "pytest", "-q", "-n", "2", "test_it.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert "4 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.long
@pytest.mark.extras
def test_notebook(tiny_run, tmp_path):
    """Train, plot and compare in the cells of a notebook whose kernel is this interpreter."""
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    NotebookClient = pytest.importorskip("nbclient").NotebookClient

    words = [f"data={tiny_run['data']}", f"model={tiny_run['model']}", "imgsz=64", "batch=4", "nbs=4", "epochs=2"]
    words += ["device=cpu", "optimizers=SophiaG,AdamW", "seeds=1", "workers=1", "out=out"]
    cells = [
        f"from ultralytics import YOLO\nrun = {tiny_run!r}\nmodel = YOLO(run.pop('model'))\n"
        "results = model.train(optimizer='SophiaG', **run)\nprint(type(model.trainer.optimizer).__name__)",
        "from yolo_sophia.integration.plotting import plot_sophia\nfrom IPython.display import Image, display\n"
        "display(Image(plot_sophia(model.trainer.csv)))",
        f"!{sys.executable} -m yolo_sophia.cli compare {' '.join(words)}",
        f"from yolo_sophia.cli import main\nprint('code', main(['compare', *{words!r}]))",  # inline; all is there
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = tmp_path / "kernels" / "this"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "this", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path))
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "config"))
        patch.setenv("WANDB_MODE", "offline")  # Ultralytics' integration is on where the package is there
        patch.delenv("PYTEST_CURRENT_TEST")  # the kernel is none of pytest's
        NotebookClient(book, timeout=500, kernel_name="this", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(out.get("text", "") for out in cell.outputs) for cell in book.cells]
    assert "SophiaG" in shown[0].splitlines()
    assert any("image/png" in out.get("data", {}) for out in book.cells[1].outputs)
    assert "code 0" in shown[3] and (tmp_path / "out" / "report.html").is_file()
