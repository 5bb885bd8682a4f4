"""The trainings of `yolo-sophia status --check`: does the installed Ultralytics train as it should?

They run on generated images in a process with settings of its own, so neither the user's settings nor loggers change.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_sophia import autoload

TIMEOUT = 600
"""Seconds after which the trainings hang; they take about 20 on one core."""
ANSWERS = "answers.jsonl"
STEPS = 4
RUN = dict(imgsz=64, epochs=2, batch=4, nbs=4, workers=0, device="cpu", exist_ok=True, verbose=False, seed=0)
ENVIRONMENT = {
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "MPLBACKEND": "agg",
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
}
LOGGERS = ("wandb", "comet", "clearml", "mlflow", "neptune", "raytune", "tensorboard", "hub", "dvc")


@dataclass(frozen=True)
class Answer:
    """One question and what came of it.

    Attributes:
        question: What was tried, in a word or two.
        result: "ok", "failed", or "not run" where an earlier failure leaves nothing to look at.
        found: What was found, or why it failed.
    """

    question: str
    result: str
    found: str


class NotRunError(Exception):
    """What the question is about is missing, because an earlier one failed."""


def check() -> list[Answer]:
    """Try the installed Ultralytics in a process of its own, and return an answer to each question."""
    with tempfile.TemporaryDirectory(prefix="yolo-sophia-check-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, **ENVIRONMENT, "YOLO_CONFIG_DIR": folder}
        command = [sys.executable, "-m", "yolo_sophia.integration.smoke_test", folder]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, env=environment, timeout=TIMEOUT, **streams)
            ended, output = f"ended with exit code {done.returncode}", done.stdout
        except subprocess.TimeoutExpired as error:
            ended, output = f"was stopped after {TIMEOUT} s", error.stdout or b""
        path = Path(folder, ANSWERS)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    answers = [Answer(**json.loads(line)) for line in lines]
    if missing := list(QUESTIONS)[len(answers) :]:
        last = output.decode("utf-8", errors="replace").strip().rpartition("\n")[2].strip() or "nothing"
        answers.append(Answer(missing[0], "failed", f"the process {ended}; its last output: {last}"))
        answers += [Answer(name, "not run", "see above") for name in missing[1:]]
    return answers


def table(answers: list[Answer]) -> str:
    """The answers as lines of three columns."""
    width = max(len(answer.question) for answer in answers)
    return "\n".join(f"  {a.question:<{width}}  {a.result:<7}  {a.found}" for a in answers)


class Trials:
    """The trainings and what they left behind.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log: list[str] = []
        self.interrupted: Any = None

    @property
    def trainer(self) -> Any:
        """The trainer of the interrupted training.

        Raises:
            NotRunError: The training failed.
        """
        if self.interrupted is None:
            raise NotRunError
        return self.interrupted

    def prepare(self) -> None:
        """Generate images, and reduce the YOLOv8 of the installed Ultralytics to 1/16 of its width; once."""
        import yaml
        from ultralytics.utils import ROOT

        from yolo_sophia.shapes import NAMES, generate

        if (self.folder / "data.yaml").is_file():
            return
        images = generate(self.folder / "shapes", train=4 * STEPS, val=4, size=64)
        layout = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text(encoding="utf-8"))
        layout |= {"scales": {"n": [0.33, 0.0625, 256]}, "nc": len(NAMES)}
        (self.folder / "yolov8n.yaml").write_text(yaml.safe_dump(layout), encoding="utf-8")
        data = {"path": str(images), "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
        (self.folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")

    def train(self, name: str, callbacks: Mapping[str, Callable] = MappingProxyType({}), **settings: Any) -> Any:
        """Train from the start; returns the trainer."""
        from ultralytics import YOLO

        self.prepare()
        model = YOLO(self.folder / "yolov8n.yaml")
        for event, function in callbacks.items():
            model.add_callback(event, function)
        place = {"data": str(self.folder / "data.yaml"), "project": str(self.folder), "name": name}
        model.train(**{**RUN, **place, **settings})
        return model.trainer


QUESTIONS: dict[str, Callable[[Trials], str]] = {}
"""In the order in which they are asked; each returns what it found, or raises."""


def _question(name: str) -> Callable[[Callable], Callable]:
    return lambda function: QUESTIONS.setdefault(name, function)


def _expect(found: str, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"found {found}, expected {expected}")


@_question("patches")
def patches(trials: Trials) -> str:
    """Every symbol that this package depends on has the expected form."""
    from yolo_sophia.integration.contract import CONTRACT
    from yolo_sophia.integration.patches import PATCHES
    from yolo_sophia.integration.status import patch_report

    _, problems = patch_report()
    if problems:
        raise ValueError("; ".join(problems))
    autoload.install()
    return f"{len(CONTRACT)} symbols as expected, {len(PATCHES.replaced)} attributes replaced"


@_question("training")
def training(trials: Trials) -> str:
    """SophiaG trains, with an estimate at each step, until it is interrupted after the first of two epochs."""

    def keep(trainer: Any) -> None:
        if trainer.epoch == 0:  # the final one is stripped of what resuming needs
            (trials.folder / "checkpoint.pt").write_bytes(Path(trainer.last).read_bytes())

    def interrupt(trainer: Any) -> None:
        trainer.stop = trainer.epoch == 0

    callbacks = {"on_train_epoch_end": interrupt, "on_model_save": keep}
    trials.interrupted = trials.train("sophia", callbacks, optimizer="SophiaG", hessian_interval=1, val=False)
    return f"{STEPS} steps of {type(trials.interrupted.optimizer).__name__}"


@_question("curvature")
def curvature(trials: Trials) -> str:
    """H is updated at each step, from the likelihoods of the loss, and is positive wherever there is a momentum."""
    optimizer = trials.trainer.optimizer
    updates, dropped = (optimizer.param_groups[0][key] for key in ("hessian_updates", "hessian_dropped"))
    _expect(f"{updates} Hessian updates, {dropped} dropped", updates == STEPS and not dropped, f"{STEPS} and none")
    states = optimizer.state.values()
    flat = [state for state in states if state["exp_avg"].any() and not state["hessian"].any()]
    _expect(f"{len(flat)} of {len(states)} tensors have a momentum and no curvature", not flat, "none")
    unknown = [line for line in trials.log if "is not known here" in line]
    _expect(" ".join(unknown), not unknown, "the detection loss to be known")
    return f"{updates} Hessian updates of {len(states)} tensors"


@_question("results.csv")
def columns(trials: Trials) -> str:
    """results.csv has Sophia's columns beside Ultralytics' own, with numbers in them."""
    path = Path(trials.trainer.save_dir, "results.csv")
    header, row = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    figures = {key.strip(): value for key, value in zip(header, row) if key.strip().startswith("sophia/")}
    _expect(f"columns {sorted(figures)}", {"sophia/rho", "sophia/clip_fraction"} <= set(figures), "those of the guide")
    _expect(f"rho={figures['sophia/rho']}", float(figures["sophia/rho"]) > 0, "a number > 0")
    return f"{len(figures)} columns of Sophia's among {len(header)}"


@_question("sophia.png")
def picture(trials: Trials) -> str:
    """sophia.png is drawn."""
    path = Path(trials.trainer.save_dir, "sophia.png")
    size = path.stat().st_size if path.is_file() else 0
    _expect(f"{path.name} of {size} bytes", size > 0, "a picture")
    return f"{path.name}, {size // 1024} KiB"


@_question("resume")
def resume(trials: Trials) -> str:
    """An interrupted training resumes with its curvature, in full precision, and its counters."""
    from ultralytics import YOLO

    before = trials.trainer.optimizer.param_groups[0]["hessian_updates"]
    found: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        found["dtypes"] = {str(state["hessian"].dtype) for state in trainer.optimizer.state.values()}
        found["updates"] = trainer.optimizer.param_groups[0]["hessian_updates"]

    model = YOLO(trials.folder / "checkpoint.pt")
    model.add_callback("on_train_start", look)
    model.train(resume=True)
    expected = {"dtypes": {"torch.float32"}, "updates": before}
    _expect(f"it began with {found}", found == expected, f"h of {before} updates")
    updates = model.trainer.optimizer.param_groups[0]["hessian_updates"]
    _expect(f"{updates} Hessian updates in the end", updates == 2 * STEPS, f"{2 * STEPS}")
    return f"went on at epoch {model.trainer.start_epoch + 1} with the h of {STEPS} updates"


@_question("other optimizer")
def other_optimizer(trials: Trials) -> str:
    """A training with another optimizer gives the same weights with and without the hooks; removes the hooks."""
    import torch

    weights, arguments = [], []
    for name in ("hooks", "plain"):
        if name == "plain":
            autoload.uninstall()
        trainer = trials.train(name, optimizer="AdamW", lr0=0.001, epochs=1, plots=False, val=False)
        weights.append(trainer.model.state_dict())
        arguments.append(Path(trainer.save_dir, "args.yaml").read_text(encoding="utf-8").replace(name, ""))
    differing = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    _expect(f"{len(differing)} of {len(weights[0])} tensors of the weights differ", not differing, "none")
    _expect("another args.yaml", arguments[0] == arguments[1], "the same with and without the hooks")
    return "AdamW: same weights and args.yaml with and without the hooks"


def main(folder: Path) -> None:
    """Write an answer to each question into a file of the folder, each as soon as it is known."""
    import logging

    import torch
    from ultralytics.utils import LOGGER, SETTINGS

    torch.set_num_threads(1)
    for name in SETTINGS.keys() & set(LOGGERS):
        dict.__setitem__(SETTINGS, name, False)
    trials = Trials(folder)
    handler = logging.Handler()
    handler.emit = lambda record: trials.log.append(record.getMessage())
    LOGGER.addHandler(handler)
    with (folder / ANSWERS).open("a", encoding="utf-8") as file:
        for question, ask in QUESTIONS.items():
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    answer = Answer(question, "ok", ask(trials))
            except NotRunError:
                answer = Answer(question, "not run", "see above")
            except Exception as error:
                answer = Answer(question, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
            file.write(json.dumps(asdict(answer)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
