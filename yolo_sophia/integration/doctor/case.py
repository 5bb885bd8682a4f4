"""The inputs of all facts, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from yolo_sophia.integration import ultralytics_yaml
from yolo_sophia.integration.arguments import KNOWN_KEYS, OUR_KEYS, canonical_optimizer
from yolo_sophia.integration.auto_preset import choose_preset, optimizer_steps
from yolo_sophia.integration.doctor.label_counts import TASKS, LabelCounts, count_labels
from yolo_sophia.integration.doctor.start import Start, local_file, make_start
from yolo_sophia.integration.explicit import MARKER, Record
from yolo_sophia.integration.measure import image_files, read_data
from yolo_sophia.integration.provenance import Provenance, listed_names, provenance_of
from yolo_sophia.integration.resolution import Resolved, preview, resolve, validate_arguments
from yolo_sophia.integration.run_length import RunLength, images_used, run_length
from yolo_sophia.options import ALL, AUTO


@dataclass(frozen=True)
class Case:
    """A training that has not begun.

    Attributes:
        arguments: All its arguments. Of a Sophia run, with what would be decided.
        explicit: Names of the arguments that were given.
        content: Content of the data YAML.
        files: Images of each split that it has, after `fraction`.
        found: Training images before `fraction`.
        start: What it starts from.
        sophia: The settings that optimizer=SophiaG would decide on, or the run's own if it has a Sophia optimizer.
    """

    arguments: Mapping[str, Any]
    explicit: frozenset[str]
    content: Mapping[str, Any]
    files: Mapping[str, list[str]]
    found: int
    start: Start
    sophia: Resolved

    @property
    def optimizer(self) -> str:
        """The argument `optimizer`."""
        return str(self.arguments["optimizer"])

    @property
    def is_sophia(self) -> bool:
        """Whether the training has a Sophia optimizer."""
        return canonical_optimizer(self.optimizer) is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the data."""
        return class_names(self.content)

    @property
    def images(self) -> int:
        """Training images; 0 where they are unknown."""
        return len(self.files["train"])

    @cached_property
    def length(self) -> RunLength | None:
        """The length of the training; None where it is unknown."""
        return run_length(self.arguments, self.images) if self.images else None

    @cached_property
    def iterations(self) -> int | None:
        """Optimizer steps as Ultralytics estimates them, on which `optimizer=auto` and the preset depend."""
        return optimizer_steps(self.arguments)

    @cached_property
    def provenance(self) -> Provenance | None:
        """Where the model's weights came from; None where there is no model."""
        return None if self.start.model is None else provenance_of(self.start.model)

    @property
    def has_labels(self) -> bool:
        """Whether the labels of the task can be counted."""
        return self.start.task in (*TASKS, "classify") and bool(self.names)

    def labels(self, split: str) -> LabelCounts:
        """The labels of a split."""
        single = bool(self.arguments.get("single_cls"))
        points = tuple(self.content.get("kpt_shape") or ())
        return count_labels(tuple(self.files[split]), self.start.task, len(self.names), points, single)


def class_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names of a data YAML; none where it has neither names nor their number."""
    if content.get("names"):
        return listed_names(content["names"])
    number = content.get("nc")
    return tuple(f"class_{k}" for k in range(number)) if isinstance(number, int) else ()


def make_case(given: Mapping[str, Any]) -> Case:
    """Collect the inputs; raises as `examine`."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = _with_file(given)
    if missing := [key for key in ("data", "model") if given.get(key) in (None, "")]:
        raise ValueError(f"found no {' and no '.join(missing)}: add {' '.join(f'{key}=...' for key in missing)}")
    if given.get("resume"):
        raise ValueError(
            f"resume={given['resume']}: a resumed training takes its arguments from its checkpoint. Examine those of "
            "the training that was started."
        )
    validated = validate_arguments(given)
    record = Record.of(validated, KNOWN_KEYS)
    explicit = frozenset(given) | (record.keys if record else frozenset())
    _, content = read_data(given["data"])
    found = image_files(given["data"])
    files = {
        "train": found[: images_used(len(found), validated["fraction"])] if found else [],
        "val": image_files(given["data"], "val") or image_files(given["data"], "test"),
    }
    files["val"] = files["val"][: images_used(len(files["val"]), validated["fraction"], "val")]
    start = make_start(validated, class_names(content), content)
    sophia = _sophia(validated, given, record, start)
    # A preset that leaves one of Ultralytics' arguments open leaves it at its default.
    arguments = {**DEFAULT_CFG_DICT, **validated, **sophia.values} if record else validated
    return Case(arguments, explicit, content, files, len(found), start, sophia)


def _with_file(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with those of the file under `cfg` below them."""
    from ultralytics.utils.checks import check_yaml

    given = dict(given)
    file = given.pop("cfg", None)
    return {**ultralytics_yaml.load(check_yaml(str(file))), **given} if file else given


def _sophia(validated: Mapping[str, Any], given: Mapping[str, Any], record: Record | None, start: Start) -> Resolved:
    """What optimizer=SophiaG would decide on: with the explicit arguments of a Sophia run, else with none."""
    if record:
        arguments = {**validated, "sophia": given.get("sophia", AUTO)}
    else:
        arguments = {key: value for key, value in validated.items() if key not in {*ALL, *OUR_KEYS}}
        arguments["optimizer"] = "SophiaG"
    arguments.pop(MARKER, None)
    places = {key: local_file(arguments[key]) for key in ("model", "pretrained") if _is_path(arguments.get(key))}
    if start.model is None:
        return _without_model(arguments, record)
    return preview({**arguments, **places}, record.keys if record else ())


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, Path))


def _without_model(arguments: Mapping[str, Any], record: Record | None) -> Resolved:
    """The settings where the model cannot be loaded: a file with weights is taken for a trained one."""
    if str(arguments.get("sophia") or AUTO).lower() == AUTO:
        is_file = str(arguments["model"]).lower().endswith((".pt", ".pth"))
        name, reason = choose_preset(is_file, optimizer_steps(arguments))
        found = resolve({**arguments, "sophia": name}, record.keys if record else (), None)
        return replace(found, reason=f"{reason}, if the model is trained" if is_file else reason)
    return resolve(arguments, record.keys if record else (), None)
