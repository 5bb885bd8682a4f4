"""What `yolo-sophia status --check` tries: does the installed Ultralytics, of whatever version, train as it should?

The rule: nothing is asked about version numbers. Tiny trainings on generated images run in a process of their own, and
each question is answered by what they leave behind. That process has settings of its own, so neither the user's
settings nor their loggers see anything of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_sophia import autoload

TIMEOUT = 600
"""Seconds after which the trainings hang; they take about 20 on one core."""
ANSWERS = "answers.jsonl"
STEPS = 4
RUN = {
    "imgsz": 64,
    "epochs": 2,
    "batch": 4,
    "nbs": 4,
    "workers": 0,
    "device": "cpu",
    "exist_ok": True,
    "verbose": False,
    "seed": 0,
}
NO_LOGGERS = {"WANDB_MODE": "disabled", "COMET_MODE": "disabled", "MPLBACKEND": "agg"}


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
        environment = {
            **os.environ,
            **NO_LOGGERS,
            "YOLO_CONFIG_DIR": folder,
            "YOLO_OFFLINE": "true",
            "YOLO_AUTOINSTALL": "false",
        }
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
    if len(answers) < len(QUESTIONS):  # it died on the way
        said = output.decode("utf-8", errors="replace").strip().splitlines()[-1:]
        reason = f"the process {ended}; it said last: {(said or ['nothing'])[0]}"
        first, *others = list(QUESTIONS)[len(answers) :]
        answers += [Answer(first, "failed", reason), *(Answer(name, "not run", "see above") for name in others)]
    return answers


def table(answers: list[Answer]) -> str:
    """The answers as lines of three columns."""
    width = max(len(answer.question) for answer in answers)
    return "\n".join(f"  {a.question:<{width}}  {a.result:<7}  {a.found}" for a in answers)


class Trials:
    """The trainings, made once each, and what they left behind.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: list[str] = []
        self.interrupted: Any = None
        self.resumed: Any = None

    def prepare(self) -> None:
        """Generate images, and cut the YOLOv8 of the installed Ultralytics down to 1/16 of its width."""
        import yaml
        from ultralytics.utils import ROOT

        from yolo_sophia.shapes import NAMES, generate

        images = generate(self.folder / "shapes", train=4 * STEPS, val=4, size=64)
        data = {"path": str(images), "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
        layout = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text(encoding="utf-8"))
        layout |= {"scales": {"n": [0.33, 0.0625, 256]}, "nc": len(NAMES)}
        (self.folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        (self.folder / "yolov8n.yaml").write_text(yaml.safe_dump(layout), encoding="utf-8")

    def train(self, name: str, **settings: Any) -> Any:
        """Train from the start; returns the trainer."""
        from ultralytics import YOLO

        model = YOLO(self.folder / "yolov8n.yaml")
        for event, function in settings.pop("callbacks", {}).items():
            model.add_callback(event, function)
        model.train(
            data=str(self.folder / "data.yaml"), **{**RUN, "project": str(self.folder), "name": name} | settings
        )
        return model.trainer


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


def training(trials: Trials) -> str:
    """Train with SophiaG, an estimate at each step, and interrupt it after the first of two epochs."""
    trials.prepare()

    def keep(trainer: Any) -> None:
        if trainer.epoch == 0:  # the final one is stripped of what resuming needs
            (trials.folder / "checkpoint.pt").write_bytes(Path(trainer.last).read_bytes())

    trials.interrupted = trials.train(
        "sophia",
        optimizer="SophiaG",
        hessian_interval=1,
        val=False,
        callbacks={
            "on_train_epoch_end": lambda trainer: setattr(trainer, "stop", trainer.epoch == 0),
            "on_model_save": keep,
        },
    )
    return f"{STEPS} steps of {type(trials.interrupted.optimizer).__name__}"


def curvature(trials: Trials) -> str:
    """H was refreshed at each step, from the likelihoods of the loss, and is positive wherever there is a momentum."""
    trainer = need(trials.interrupted)
    clock = trainer.optimizer.param_groups[0]
    found, dropped = clock["hessian_updates"], clock["hessian_dropped"]
    expect(f"{found} Hessian updates, {dropped} dropped", found == STEPS and not dropped, f"{STEPS} and none")
    states = trainer.optimizer.state.values()
    flat = [state for state in states if state["exp_avg"].any() and not state["hessian"].any()]
    expect(f"{len(flat)} of {len(states)} tensors have a momentum and no curvature", not flat, "none")
    unknown = [line for line in trials.said if "is not known here" in line]
    expect(" ".join(unknown), not unknown, "the detection loss to be known")
    return f"{found} Hessian updates of {len(states)} tensors"


def columns(trials: Trials) -> str:
    """results.csv has Sophia's columns beside Ultralytics' own, with numbers in them."""
    path = Path(need(trials.interrupted).save_dir, "results.csv")
    header, row = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    figures = {key.strip(): value for key, value in zip(header, row) if key.strip().startswith("sophia/")}
    expect(f"columns {sorted(figures)}", {"sophia/rho", "sophia/clip_fraction"} <= set(figures), "those of the guide")
    expect(f"rho={figures['sophia/rho']}", float(figures["sophia/rho"]) > 0, "a number > 0")
    return f"{len(figures)} columns of Sophia's among {len(header)}"


def picture(trials: Trials) -> str:
    """sophia.png was drawn."""
    path = Path(need(trials.interrupted).save_dir, "sophia.png")
    size = path.stat().st_size if path.is_file() else 0
    expect(f"{path.name} of {size} bytes", size > 0, "a picture")
    return f"{path.name}, {size // 1024} KiB"


def resume(trials: Trials) -> str:
    """An interrupted training goes on with its curvature, in full precision, and with its clock."""
    from ultralytics import YOLO

    need(trials.interrupted)
    import torch

    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        states = trainer.optimizer.state.values()
        seen["dtypes"] = {str(state["hessian"].dtype) for state in states}
        seen["updates"] = trainer.optimizer.param_groups[0]["hessian_updates"]

    model = YOLO(trials.folder / "checkpoint.pt")
    model.add_callback("on_train_start", look)
    model.train(resume=True)
    trials.resumed = model.trainer
    expect(f"it began with {seen}", seen == {"dtypes": {str(torch.float32)}, "updates": STEPS}, f"h of {STEPS} updates")
    updates = trials.resumed.optimizer.param_groups[0]["hessian_updates"]
    expect(f"{updates} Hessian updates in the end", updates == 2 * STEPS, f"{2 * STEPS}")
    return f"went on at epoch {trials.resumed.start_epoch + 1} with the h of {STEPS} updates"


def other_optimizer(trials: Trials) -> str:
    """A training that does not ask for Sophia gives the same weights with and without the hooks."""
    import torch

    if not (trials.folder / "data.yaml").is_file():
        trials.prepare()
    weights, arguments = [], []
    for hooks in (True, False):
        if not hooks:
            autoload.uninstall()
        trainer = trials.train(f"hooks-{hooks}", optimizer="AdamW", lr0=0.001, epochs=1, plots=False, val=False)
        weights.append(trainer.model.state_dict())
        arguments.append(Path(trainer.save_dir, "args.yaml").read_text(encoding="utf-8").replace(f"-{hooks}", ""))
    differing = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    expect(f"{len(differing)} of {len(weights[0])} tensors of the weights differ", not differing, "none")
    expect("another args.yaml", arguments[0] == arguments[1], "the same with and without the hooks")
    return "AdamW: same weights and args.yaml with and without the hooks"


QUESTIONS: dict[str, Callable[[Trials], str]] = {
    "patches": patches,
    "training": training,
    "curvature": curvature,
    "results.csv": columns,
    "sophia.png": picture,
    "resume": resume,
    "other optimizer": other_optimizer,
}
"""In the order in which they are asked; each returns what it found, or raises."""


def expect(found: str, right: bool, expected: str) -> None:
    """Fail a question.

    Raises:
        ValueError: It is not right.
    """
    if not right:
        raise ValueError(f"found {found}, expected {expected}")


def need(trainer: Any) -> Any:
    """The trainer, if there is one.

    Raises:
        NotRunError: Its training failed.
    """
    if trainer is None:
        raise NotRunError
    return trainer


def main(folder: Path) -> None:
    """Answer all questions, each as soon as it is asked, into a file of the folder."""
    import logging

    import torch
    from ultralytics.utils import LOGGER, SETTINGS

    torch.set_num_threads(1)
    for name in ("wandb", "comet", "clearml", "mlflow", "neptune", "raytune", "tensorboard", "hub", "dvc"):
        if name in SETTINGS:
            dict.__setitem__(SETTINGS, name, False)
    trials = Trials(folder)
    handler = logging.Handler()
    handler.emit = lambda record: trials.said.append(record.getMessage())
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
