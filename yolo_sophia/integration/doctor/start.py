"""The model that a training would start from, made as its trainer makes it; nothing is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from yolo_sophia.integration.provenance import listed_names


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        task: "detect", "classify" and so on.
        model: The model before its first step; None where it could not be made.
        file: The file that was read; None where there is none on this machine.
        reason: Why there is no model.
        trainer: A trainer that has arguments and data and nothing else; None where there is no model.
        weight_names: Class names of the weights; none where there are no weights.
    """

    task: str
    model: nn.Module | None = None
    file: str | None = None
    reason: str = ""
    trainer: Any = None
    weight_names: tuple[str, ...] = ()


@contextmanager
def quiet() -> Iterator[None]:
    """Ultralytics logs errors only."""
    from ultralytics.utils import LOGGER

    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def local_file(name: object) -> str | None:
    """The file on this machine that Ultralytics would read under a model's name; None where it would download one."""
    from ultralytics.utils import SETTINGS
    from ultralytics.utils.checks import check_model_file_from_stem, check_yaml, check_yolov5u_filename

    text = str(check_model_file_from_stem(str(name).strip()))
    if text.lower().endswith((".yaml", ".yml")):
        from ultralytics.nn.tasks import yaml_model_load

        try:
            yaml_model_load(check_yaml(text, hard=False) or text)
        except Exception:  # of many kinds, by version: no such file, or not a model
            return None
        return text
    if "://" in text:
        return None
    text = check_yolov5u_filename(text, verbose=False)
    places = (Path(text), Path(SETTINGS["weights_dir"]) / text)
    return next((str(place) for place in places if place.is_file()), None)


def make_start(arguments: Mapping[str, Any], names: tuple[str, ...], data: Mapping[str, Any]) -> Start:
    """Make the model of a training.

    Args:
        arguments: All arguments of the training.
        names: Class names of its data.
        data: Content of its data YAML.
    """
    task = str(arguments.get("task") or "detect")
    file, pretrained = local_file(arguments["model"]), arguments.get("pretrained", True)
    if isinstance(pretrained, (str, Path)):
        pretrained = local_file(pretrained)
    for name, found in (("model", file), ("pretrained", pretrained)):
        if found is None:
            return Start(task, reason=f"{arguments[name]} is not on this machine; nothing is downloaded")
    if not names:
        return Start(task, file=file, reason="not made: the classes of the data are not known")
    try:
        return _made(file, pretrained, arguments, names, data)
    except Exception as error:  # of many kinds: a damaged file, a model of another program, an unfit data set
        return Start(task, file=file, reason=f"{file} cannot be loaded: {type(error).__name__}: {error}")


def _made(
    file: str, pretrained: Any, arguments: Mapping[str, Any], names: tuple[str, ...], data: Mapping[str, Any]
) -> Start:
    from ultralytics import YOLO
    from ultralytics.engine.model import Model
    from ultralytics.engine.trainer import BaseTrainer

    made = YOLO(file)
    if not isinstance(made.model, nn.Module):
        raise TypeError("a model that cannot be trained")
    if isinstance(pretrained, str):
        made.load(pretrained)
    starts_random = pretrained is False and "pretrained" in Model.train.__code__.co_varnames  # 8.3 ignores it for .pt
    trainer_class = made.task_map[made.task]["trainer"]
    trainer = object.__new__(trainer_class)  # without folders, data loaders and a device
    trainer.args = SimpleNamespace(**{**arguments, "task": made.task})
    if arguments.get("single_cls") and "single_cls" in BaseTrainer.get_dataset.__code__.co_names:
        names = ("item",)
    trainer.data = {"channels": 3, **data, "nc": len(names), "names": dict(enumerate(names))}
    trainer.callbacks = _NoCallbacks()
    weights = made.model if made.ckpt and not starts_random else None
    trainer.model = trainer.get_model(cfg=made.model.yaml, weights=weights, verbose=False)
    trainer.set_model_attributes()
    known = listed_names(getattr(made.model, "names", None)) if weights is not None else ()
    return Start(made.task, trainer.model, file, trainer=trainer, weight_names=known)


class _NoCallbacks(dict):
    """Callbacks of a trainer that never runs."""

    def __missing__(self, event: str) -> list[Any]:
        return []
