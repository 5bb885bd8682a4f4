"""The best settings as a file to train with: a preset for Sophia, arguments for any other optimizer.

Every number in the preset has an origin: this study, an argument of the study, or the preset that it started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yolo_sophia.options import OPTIONS, ULTRALYTICS_ARGS, renamed
from yolo_sophia.runs.run import data_name
from yolo_sophia.search_space import BY_PART, argument_of, with_settings
from yolo_sophia.tune.plan import TunePlan, as_arguments

BEST, ARGUMENTS = "best.yaml", "best-arguments.yaml"


@dataclass(frozen=True)
class BestSettings:
    """Files by name, and the command that trains with them."""

    files: Mapping[str, str]
    command: str


def best_settings(plan: TunePlan, settings: Mapping[str, Any], value: float, trials: int) -> BestSettings:
    """The best settings of a study: those of its best trial, with mAP50-95 `value`, of `trials` that were begun."""
    from yolo_sophia.integration.arguments import canonical_optimizer

    settings = current_names(with_settings(by_part(plan.fixed, settings), as_arguments(settings)))
    name = canonical_optimizer(plan.arm.arguments["optimizer"])
    where = f"model={plan.fixed['model']} data={plan.data[0]}"
    found = f"best of {trials} trials, mAP50-95 {value:.4f}: {_length(plan)}"
    best, others = plan.out / BEST, plan.out / ARGUMENTS
    if name is None:
        given = {key: plan.fixed[key] for key in (*ULTRALYTICS_ARGS, BY_PART) if key in plan.fixed}
        text = _arguments(plan, {**given, **plan.arm.arguments, **settings}, found)
        return BestSettings({BEST: text}, f"yolo train cfg={best} {where}")
    files = {BEST: _preset(plan, name, settings, found)}
    rest = {key: settings[key] for key in settings if key not in OPTIONS and key not in ULTRALYTICS_ARGS}
    if not rest:
        return BestSettings(files, f"yolo train {where} optimizer={name} sophia={best}")
    files[ARGUMENTS] = _arguments(plan, {"optimizer": name, **rest}, found)
    command = f"yolo train cfg={others} {where} sophia={best}"  # cfg= first: it replaces what stands before
    return BestSettings(files, command)


def by_part(fixed: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fixed entries of a mapping whose other entries were searched."""
    arguments = {argument for argument, entry in map(argument_of, settings) if entry}
    return {key: fixed[key] for key in arguments if key in fixed}


def current_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without the names of 0.1.0."""
    return dict(renamed(key, value) for key, value in arguments.items() if value is not None)


def _length(plan: TunePlan) -> str:
    seeds, data = plan.seeds, ", ".join(map(data_name, plan.data))
    many = "seed" if len(seeds) == 1 else "mean over seeds"
    return f"{data}, {Path(str(plan.fixed['model'])).name}, {plan.epochs} epochs, {many} {', '.join(map(str, seeds))}"


def _preset(plan: TunePlan, optimizer: str, settings: Mapping[str, Any], found: str) -> str:
    from yolo_sophia.integration.resolution import preview

    given = {**current_names(plan.fixed), **settings}
    resolved = preview({**given, "optimizer": optimizer}, given)
    origins = {
        "preset": lambda key: f"preset {resolved.preset.name}: {resolved.preset.origins[key]}",
        "default": lambda key: "package default; not varied",
        "explicit": lambda key: f"study {plan.study}: " + (found if key in settings else "given, not varied"),
    }
    content = {
        "description": f"Tuned by yolo-sophia tune, study {plan.study}; {found}",
        "status": "provisional",
        "settings": {
            key: {"value": resolved.values[key], "origin": origins[source](key)}
            for key, source in resolved.sources.items()
        },
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)


def _arguments(plan: TunePlan, content: Mapping[str, Any], found: str) -> str:
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# Tuned by yolo-sophia tune, study {plan.study}; {' '.join(found.split())}\n{text}"
