"""What the plans of `compare` and `tune` have in common: keys, arms, and the checks of Ultralytics' arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from types import MappingProxyType
from typing import Any

import yaml

from yolo_sophia.runs.checks import as_int, as_list, check_free, check_known, check_values, is_int, is_number
from yolo_sophia.runs.run import Run, check_name, data_name, make_run

MAX_SEEDS, MAX_SEED = 1000, 2**31
"""Limits of a plan: NumPy takes no seed of more than 32 bits, and Ultralytics adds the rank."""
TRIAL_SEED = 9_999
"""Seed of tuning trials; it takes no part in comparisons."""


@dataclass(frozen=True)
class Arm:
    """One optimizer with its arguments, under a name that is unique in the plan."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of a plan: its description, its default, and the accepted values."""

    meaning: str
    default: Any = None
    valid: Callable[[Any], bool] = lambda v: True
    expected: str = ""


@dataclass(frozen=True)
class BasePlan:
    """The part of a plan that decides on trainings; `common` holds the Ultralytics arguments of every arm."""

    arms: tuple[Arm, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    bn_recalibrate: bool
    cut_runs: str
    engine: str
    workers: int | None
    devices: tuple[str, ...]
    cpus: int | None
    gpus: float | None
    out: Path
    dry_run: bool

    @property
    def epochs(self) -> int:
        """Epochs of a training at horizon 1.0."""
        return int(self.common["epochs"])

    @property
    def local_workers(self) -> int:
        """Trainings side by side on this machine."""
        return self.workers or max(1, len(self.devices))

    def run(self, arm: str, data: str, seed: int, horizon: float, arguments: Mapping[str, Any]) -> Run:
        """A training of this plan."""
        made = make_run(arm, data, seed, horizon, {**arguments, "data": data, "seed": seed}, self.bn_recalibrate)
        return replace(made, restart=self.cut_runs == "restart")


def is_path(v: Any) -> bool:
    """Whether a value can be a path or a name; YAML reads some of them as numbers."""
    text = isinstance(v, (str, int, float, Path)) and not isinstance(v, bool)
    return text and bool(str(v).strip()) and "\0" not in str(v)


def bool_key(meaning: str) -> Key:
    """A key that is False by default."""
    return Key(meaning, False, lambda v: isinstance(v, bool), "True or False")


def path_key(meaning: str) -> Key:
    """A key whose value is a path."""
    return Key(meaning, None, is_path, "a path")


def int_key(meaning: str, default: int | None = None, low: int = 1, high: int = 10**6) -> Key:
    """A key whose value is an integer from `low` to `high`."""
    limit = f", at most {high}" if high < 10**6 else ""
    return Key(meaning, default, is_int(low, high), f"a whole number >= {low}{limit}")


def choice_key(names: tuple[str, ...], meaning: str) -> Key:
    """A key with named values, the first by default."""
    return Key(meaning, names[0], lambda v: v in names, f"{', '.join(names[:-1])} or {names[-1]}")


RUN_KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "bn_recalibrate": bool_key(
            "recalibrate BatchNorm statistics on training images before each validation, in every arm"
        ),
        "engine": choice_key(
            ("local", "ray"),
            "local, or ray: an existing Ray cluster (RAY_ADDRESS, else this machine's); its nodes must share the "
            "folder of results",
        ),
        "workers": int_key("number of parallel trainings (default: one per device, else 1)", high=1024),
        "devices": Key("GPU numbers that the trainings are spread over (default: CPU)", ()),
        "cpus": int_key("engine=ray: processors and threads of a training (default: 1)"),
        "gpus": Key(
            "engine=ray: GPUs of a training; 0.5 runs two on one GPU (default: 0, the CPU)",
            None,
            lambda v: is_number(v) and 0 <= v <= 1,
            "a number from 0 to 1",
        ),
        "project": path_key("folder that holds the folder of results"),
        "name": path_key("name of the folder of results in `project`"),
        "out": path_key("path of the folder of results, instead of project and name"),
    }
)
"""Keys of every plan on how and where its trainings run."""

READY_MADE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The recipe of a widely copied article: no Hessian update ever, so h = 0 and each step is the sign of the
        # momentum, behind Ultralytics' norm clip and at its default learning rate.
        "blog": {
            "optimizer": "yolo_sophia.SophiaG",
            "optimizer_args": {"betas": [0.937, 0.999], "rho": 0.04, "weight_decay": 0.0},
            "lr0": 0.01,
        },
        # timm's own AdamW has the mask of arXiv 2411.16085 (pytorch_optimizer's AdamW is torch's, and has none).
        "adamw-cautious": {"optimizer": "timm.optim.AdamWLegacy", "optimizer_args": {"caution": True}},
    }
)
"""Arms by name: the class that people paste, and a control for the cautious mask."""


def read_keys(content: Mapping[str, Any], keys: Mapping[str, Key]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a mapping into the plan's own keys, checked and complete, and Ultralytics' arguments.

    Raises:
        ValueError: A key is not known, an own key has a value that is not accepted, or data or model is missing.
    """
    content = dict(content)
    check_known(content.keys() - keys.keys(), "the plan", keys)
    if missing := [key for key in ("data", "model") if content.get(key) in (None, "", [], (), {})]:
        raise ValueError(f"the plan lacks {' and '.join(missing)}: add {' '.join(f'{key}=...' for key in missing)}.")
    values: dict[str, Any] = {}
    for key, spec in keys.items():
        value = content.pop(key, None)
        values[key] = spec.default if value is None else value
        if value is not None and not spec.valid(value):
            raise ValueError(f"{key}={value!r}: expected {spec.expected}.")
    return values, content


def read_base(values: Mapping[str, Any], arguments: Mapping[str, Any], first_seed: int = 0) -> dict[str, Any]:
    """The fields of `BasePlan` that do not depend on the command, from what `read_keys` returns.

    Raises:
        ValueError: A value is not accepted.
    """
    check_engine(values)
    return {
        "common": MappingProxyType(read_arguments(arguments)),
        "data": read_data(values["data"]),
        "seeds": read_seeds(values["seeds"], first_seed),
        "devices": tuple(map(str, as_list(values["devices"]))),
        **{key: values[key] for key in ("bn_recalibrate", "engine", "workers", "cpus", "gpus", "dry_run")},
    }


def read_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The Ultralytics arguments that every arm has in common, checked as far as they do not depend on the arm.

    Raises:
        ValueError: An argument is decided by the plan, or its value is not accepted.
    """
    common = {"epochs": 100, **content}
    common["epochs"] = as_int(common["epochs"])
    if not is_int(1)(common["epochs"]):
        raise ValueError(f"epochs={common['epochs']!r}: expected a whole number >= 1.")
    check_free(common, "the plan", {"epochs"})
    if not is_path(common["model"]):
        raise ValueError(f"model={common['model']!r}: expected a path or a name.")
    return common


def read_data(given: Any) -> tuple[str, ...]:
    """Data YAMLs with different names.

    Raises:
        ValueError: One is not a path, or two have the same name.
    """
    if not all(map(is_path, as_list(given))):
        raise ValueError(f"data={given!r}: expected a data YAML, or a list of them.")
    data = tuple(map(str, as_list(given)))
    if len({data_name(d) for d in data}) < len(data):
        raise ValueError(f"data={list(data)}: expected different names, found {[data_name(d) for d in data]}.")
    return data


def read_seeds(given: Any, first: int = 0) -> tuple[int, ...]:
    """Seeds from their number, counted from `first`, or from a list.

    Raises:
        ValueError: It is neither.
    """
    counted = is_int(1, MAX_SEEDS)(given)
    seeds = tuple(range(first, first + given)) if counted else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not seeds or not all(map(is_int(0, MAX_SEED), seeds)) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds={given!r}: expected a number >= 1, or a list of different whole numbers >= 0 (at most "
            f"{MAX_SEEDS} seeds, none above {MAX_SEED})."
        )
    return seeds


def read_out(values: Mapping[str, Any], project: str, name: str) -> Path:
    """The folder of results: `out`, or `project`/`name` with these defaults.

    Raises:
        ValueError: Both are given.
    """
    if values["out"] is not None and (both := [key for key in ("project", "name") if values[key] is not None]):
        raise ValueError(f"out={values['out']} and {both[0]}={values[both[0]]}: use one of them.")
    if values["out"] is not None:
        return Path(str(values["out"]))
    return Path(str(values["project"] or project), str(values["name"] or name))


def read_arms(optimizers: Any, arms: Any) -> tuple[Arm, ...]:
    """Arms from `optimizers` (names) and `arms` (name -> arguments); a name given twice is an A/A control.

    Raises:
        ValueError: There is none, one has no valid name, or an argument is not known.
    """
    if arms is not None and not isinstance(arms, dict):
        raise ValueError(f"arms: found {type(arms).__name__}, expected a mapping of names to arguments.")
    names = as_list(optimizers) if optimizers else []
    if not all(map(is_path, names)):
        raise ValueError(f"optimizers={optimizers!r}: expected names.")
    named: list[tuple[str, Mapping[str, Any]]] = [(str(name), {}) for name in names]
    for name, arguments in (arms or {}).items():
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"arms: {name}: found {arguments!r}, expected a mapping of arguments.")
        named.append((str(name), arguments or {}))
    if not named:
        raise ValueError("the plan has no arms: add optimizers=SophiaG,AdamW, or `arms` in the plan file.")
    made: list[Arm] = []
    for name, arguments in named:
        unique, count = name, 0
        while unique in {arm.name for arm in made}:
            count += 1
            unique = f"{name}-again{count}"
        check_name("arm ", unique)
        complete = {"optimizer": name, **READY_MADE.get(name, {}), **arguments}
        check_known(complete, f"arm {name}")
        made.append(Arm(unique, MappingProxyType(complete)))
    return tuple(made)


def check_arm(arm: Arm, common: Mapping[str, Any]) -> None:
    """Check the arguments of an arm as its trainings will.

    Raises:
        ValueError: One is decided by the plan, or has a wrong value.
    """
    check_free(arm.arguments, f"arm {arm.name}", {"optimizer"})
    check_values({**common, **arm.arguments}, f"arm {arm.name}")


def check_engine(values: Mapping[str, Any]) -> None:
    """Refuse keys that the engine ignores: Ray itself places the trainings.

    Raises:
        ValueError: Such a key is given.
    """
    fitting, others = ("cpus", "gpus"), ("workers", "devices")
    if values["engine"] == "local":
        fitting, others = others, fitting
    for key in others:
        if values[key] not in (None, (), []):
            raise ValueError(
                f"{key}={values[key]!r} is not for engine={values['engine']}: use {' and '.join(fitting)} instead."
            )


def check_data(plan: BasePlan) -> None:
    """Refuse a plan whose data YAMLs are not there; their images may still have to be downloaded.

    Raises:
        ValueError: One is not, or it names no training images.
    """
    from yolo_sophia.integration.measure import count_images

    for data in plan.data if plan.engine == "local" else ():  # on a cluster, the nodes have them
        count_images(data)


def describe_keys(example: str, keys: Mapping[str, Key], rest: str) -> str:
    """The help of a command: an example, the keys with their meanings, and what else is accepted."""
    layout = {"width": 100, "subsequent_indent": " " * 18, "break_on_hyphens": False}
    lines = [fill(f"  {key:<15} {spec.meaning}", **layout) for key, spec in keys.items()]
    return "\n".join([example, "", *lines, "", rest])


def to_yaml(content: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """A plan as a file that `plan=` reads back to the same plan; own keys that are None are left out."""
    given = {key: value for key, value in content.items() if value is not None}
    return yaml.safe_dump({**plain(given), **plain(common)}, sort_keys=False, allow_unicode=True)


def plain(value: Any, *, words: bool = True) -> Any:
    """A value in the types of YAML.

    With `words`, a tuple, which a word such as `classes=0,3` gives, is written as that word; otherwise as a list, which
    is what the file can hold inside `optimizer_args`.
    """
    if isinstance(value, Mapping):
        return {key: plain(item, words=words and key != "optimizer_args") for key, item in value.items()}
    if isinstance(value, tuple) and words:
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, words=words) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
