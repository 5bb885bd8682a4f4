"""A comparison as data: arms, seeds, data sets and horizons, and the list of runs that follows from them.

The rule: a plan is judged whole before a run starts or a file is written; the same plan always gives the same runs
under the same names, so that finished ones are found again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_sophia.presets import suggestion
from yolo_sophia.runs.run import Run, check_name, data_name, make_run
from yolo_sophia.yaml_io import is_file, parse_yaml, read_yaml


@dataclass(frozen=True)
class Arm:
    """One optimizer with its arguments, under a name that is unique in the plan."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A whole comparison; its keys are described in `KEYS`. `common` holds the Ultralytics arguments of every arm."""

    arms: tuple[Arm, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    common: Mapping[str, Any]
    target: float | None
    horizons: tuple[float, ...]
    tune_trials: int
    tune_epochs: int | None
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
        """Epochs of horizon 1.0."""
        return int(self.common["epochs"])


def whole(minimum: int, maximum: int = 10**6) -> Callable[[Any], bool]:
    """A check for whole numbers from a minimum to a maximum, by default one that nobody means."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and minimum <= v <= maximum


def is_text(v: Any) -> bool:
    """Whether it can be a path or a name; a number is one that YAML read as such."""
    return isinstance(v, (str, int, float, Path)) and not isinstance(v, bool) and bool(str(v).strip("\0 "))


PATH = {"valid": lambda v: is_text(v) and "\0" not in str(v), "expected": "a path"}
MOST_SEEDS, LARGEST_SEED = 1000, 2**31
"""Of a plan; NumPy takes no seed of more than 32 bits, and Ultralytics adds the rank."""
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Key:
    """A key of a plan: what it means, its default, and what is accepted."""

    meaning: str
    default: Any = None
    valid: Callable[[Any], bool] = lambda v: True
    expected: str = ""


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "plan": Key("YAML file with these keys, `arms`, and any Ultralytics argument"),
        "data": Key("data YAML, or several separated by commas"),
        "optimizers": Key("arms by name: optimizers, dotted paths, or ready-made arms"),
        "arms": Key("in a plan file: arm names with their own arguments"),
        "seeds": Key("number of seeds, or a list of them (default: 3)", 3),
        "reference": Key("arm that the others are compared with (default: AdamW, else the second arm)"),
        "target": Key(
            "mAP50-95 to reach (default: the reference arm's median final value)",
            None,
            lambda v: isinstance(v, (int, float)) and 0 < v < 1,
            "a number between 0 and 1",
        ),
        "horizons": Key("fractions of the epochs that full schedules are planned for (default: 1.0)", (1.0,)),
        "tune_trials": Key(
            "trials per arm over its search space before the comparison (default: 0)",
            0,
            whole(0, 10_000),
            "a whole number >= 0, at most 10000",
        ),
        "tune_epochs": Key("epochs of a trial (default: a third of the run's)", None, whole(1), "a whole number >= 1"),
        "bn_recalibrate": Key(
            "recalibrate BatchNorm statistics on training images before each validation, in every arm",
            False,
            lambda v: isinstance(v, bool),
            "True or False",
        ),
        "cut_runs": Key(
            "what becomes of a run that was cut: resume (from its last checkpoint) or restart (then the table is that "
            "of an uninterrupted comparison, which Ultralytics' resume does not give)",
            "resume",
            lambda v: v in ("resume", "restart"),
            "resume or restart",
        ),
        "engine": Key(
            "local, or ray: an existing Ray cluster (RAY_ADDRESS, else this machine's) whose nodes all see `out`",
            "local",
            lambda v: v in ("local", "ray"),
            "local or ray",
        ),
        "workers": Key(
            "runs side by side (default: one per device, else 1)",
            None,
            whole(1, MOST_WORKERS),
            f"a whole number >= 1, at most {MOST_WORKERS}",
        ),
        "devices": Key("GPU numbers to spread the workers over (default: CPU)", ()),
        "cpus": Key("engine=ray: processors and threads of a run (default: 1)", None, whole(1), "a whole number >= 1"),
        "gpus": Key(
            "engine=ray: GPUs of a run, 0.5 for two runs on one (default: 0, the CPU)",
            None,
            lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and (0 <= v <= 1),
            "a number from 0 to 1",
        ),
        "out": Key("folder of the comparison (default: runs/compare)", "runs/compare", **PATH),
        "dry_run": Key(
            "print the plan and an estimate from one measured step, run nothing",
            False,
            lambda v: isinstance(v, bool),
            "True or False",
        ),
    }
)

READY_MADE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The recipe of the article that people paste today: no Hessian update ever, so h = 0 and each step is the sign
        # of the momentum, behind Ultralytics' norm clip and at its default learning rate.
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


def parse(words: Sequence[str]) -> Plan:
    """Read a plan from `key=value` words, as Ultralytics reads them; a `plan=` file is read first, words win.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    return build(read_words(words))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words into a mapping, on top of that of the `plan=` file.

    Raises:
        ValueError: A word is no `key=value`, or the file is not readable.
    """
    typed: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.lstrip("-").partition("=")
        if not separator or not key:
            raise ValueError(f"found {word!r}, expected key=value, such as data=my.yaml or seeds=3.")
        typed[key] = _value(key, text)
    content = read_mapping("plan", typed.pop("plan")) if "plan" in typed else {}
    return {key: plain_numbers(value) for key, value in {**content, **typed}.items()}


def _value(key: str, text: str) -> Any:
    if key in {"optimizers", "data", "horizons", "devices"} or (key == "seeds" and "," in text):
        parts = [part.strip() for part in text.strip("[]()").split(",")]
        return [part if key in {"optimizers", "data"} else _scalar(key, part) for part in parts if part]
    return text if key in {"plan", "model", "out", "storage", "study"} and text else _scalar(key, text)


def _scalar(key: str, text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if text.lower() in {"none", "null", ""}:
        return None
    try:
        return plain_numbers(parse_yaml(text, f"{key}={text}"))
    except ValueError:
        if text.startswith(("{", "[")):  # meant as a mapping or a list
            raise
        return text


def plain_numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; the user means the number, inside `optimizer_args` too."""
    if isinstance(value, dict):
        return {key: plain_numbers(own) for key, own in value.items()}
    if isinstance(value, list):
        return [plain_numbers(own) for own in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def read_mapping(word: str, given: Any) -> dict[str, Any]:
    """Read a YAML file that was given as `word=path` and holds a mapping.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    path = Path(str(given))
    if not is_file(path):
        raise ValueError(f"{word}={path}: no such file.")
    content = read_yaml(path, f"{word}={path}")
    if not isinstance(content, dict):
        raise ValueError(f"{word}={path}: found {type(content).__name__}, expected a mapping of keys to values.")
    return content


def build(content: Mapping[str, Any]) -> Plan:
    """Make a plan from a mapping of `KEYS` and Ultralytics' arguments.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    content = {key: plain_numbers(value) for key, value in content.items()}
    if missing := [key for key in ("data", "model") if not content.get(key)]:
        raise ValueError(f"the plan lacks {' and '.join(missing)}: say {' '.join(f'{key}=...' for key in missing)}.")
    own = {}
    for key, spec in KEYS.items():
        value = content.pop(key, None)
        own[key] = spec.default if value is None else value
        if value is not None and not spec.valid(value):
            raise ValueError(f"{key}={value!r}: expected {spec.expected}.")
    _check_engine(own)
    common = {"epochs": 100, **content}
    if not whole(1)(common["epochs"]):
        raise ValueError(f"epochs={common['epochs']!r}: expected a whole number >= 1.")
    _check_known(common, "the plan")
    _check_free(common, "the plan", {"epochs"})
    if not is_text(common["model"]):
        raise ValueError(f"model={common['model']!r}: expected a path or a name.")
    if not all(map(PATH["valid"], _listed(own["data"]))):
        raise ValueError(f"data={own['data']!r}: expected a data YAML, or a list of them.")
    data = tuple(str(d) for d in _listed(own["data"]))
    if len({data_name(d) for d in data}) < len(data):
        raise ValueError(f"data={list(data)}: expected different names, found {[data_name(d) for d in data]}.")
    arms = _arms(own["optimizers"], own["arms"])
    for arm in arms:
        _check_free(arm.arguments, f"arm {arm.name}", {"optimizer"})
        _check_values({**common, **arm.arguments}, f"arm {arm.name}")
    names = [arm.name for arm in arms]
    reference = str(own["reference"] or ("AdamW" if "AdamW" in names else names[min(1, len(names) - 1)]))
    if reference not in names:
        raise ValueError(f"reference={reference!r} is not an arm.{suggestion(reference, names)} Arms: {names}.")
    seeds = own["seeds"]
    counted = whole(1, MOST_SEEDS)(seeds)
    seeds = tuple(range(seeds)) if counted else tuple(seeds) if isinstance(seeds, (list, tuple)) else ()
    if not seeds or not all(map(whole(0, LARGEST_SEED), seeds)) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds={own['seeds']!r}: expected a number >= 1, or a list of different whole numbers >= 0 (at most "
            f"{MOST_SEEDS} seeds, none above {LARGEST_SEED})."
        )
    horizons = tuple(_listed(own["horizons"]))
    if not all(isinstance(h, (int, float)) and 0 < h <= 1 for h in horizons) or 1.0 not in horizons:
        raise ValueError(f"horizons={list(horizons)}: expected fractions in (0, 1], 1.0 among them.")
    return Plan(
        arms=arms,
        data=data,
        seeds=seeds,
        reference=reference,
        common=MappingProxyType(common),
        horizons=tuple(sorted({float(h) for h in horizons}, reverse=True)),
        devices=tuple(str(d) for d in _listed(own["devices"])),
        out=Path(str(own["out"])),
        **{key: own[key] for key in ("target", "tune_trials", "tune_epochs", "bn_recalibrate", "cut_runs")},
        **{key: own[key] for key in ("engine", "workers", "cpus", "gpus", "dry_run")},
    )


def _check_engine(own: Mapping[str, Any]) -> None:
    """Refuse what the engine would not heed: Ray itself places the runs."""
    mine, others = ("cpus", "gpus"), ("workers", "devices")
    if own["engine"] == "local":
        mine, others = others, mine
    for key in others:
        if own[key] not in (None, (), []):
            raise ValueError(f"{key}={own[key]!r} is not for engine={own['engine']}: say {' and '.join(mine)} instead.")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _arms(optimizers: Any, arms: Any) -> tuple[Arm, ...]:
    """Arms from `optimizers` (names) and `arms` (name -> arguments); a name given twice is an A/A control."""
    if arms is not None and not isinstance(arms, dict):
        raise ValueError(f"arms: found {type(arms).__name__}, expected a mapping of names to arguments.")
    if not all(map(is_text, _listed(optimizers) if optimizers else ())):
        raise ValueError(f"optimizers={optimizers!r}: expected names.")
    named = [(str(name), {}) for name in (_listed(optimizers) if optimizers else ())]
    for name, arguments in (arms or {}).items():
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"arms: {name}: found {arguments!r}, expected a mapping of arguments.")
        named.append((str(name), arguments or {}))
    if not named:
        raise ValueError(
            "the plan has no arms: say optimizers=SophiaG,AdamW, or list them under `arms` in the plan file."
        )
    made: list[Arm] = []
    for name, arguments in named:
        unique, count = name, 0
        while unique in {arm.name for arm in made}:
            count += 1
            unique = f"{name}-again{count}"
        check_name("arm ", unique)
        complete = {"optimizer": name, **READY_MADE.get(name, {}), **arguments}
        _check_known(complete, f"arm {name}")
        made.append(Arm(unique, MappingProxyType(complete)))
    return tuple(made)


def _check_known(arguments: Mapping[str, Any], where: str) -> None:
    from yolo_sophia.integration.arguments import known_arguments

    known = known_arguments()
    for key in arguments:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is not a known argument.{suggestion(key, [*known, *KEYS])}")


DECIDED: Mapping[str, str] = MappingProxyType(
    {
        "seed": "say seeds=...",
        "optimizer": "say optimizers=..., or name it in an arm",
        "data": "it is the plan's, alike for every arm",
        "epochs": "they are the plan's, alike for every arm",
        "resume": "the same command, run again, goes on by itself",
        "project": "say out=...",
        "name": "say out=...",
        "exist_ok": "say out=...",
    }
)
"""Ultralytics' arguments that the comparison decides, and what to say instead."""


def _check_free(arguments: Mapping[str, Any], where: str, free: set[str]) -> None:
    """Refuse what would be overridden, but for what is `free` here."""
    for key, hint in DECIDED.items():
        if key in arguments and key not in free:
            raise ValueError(f"{where}: {key} is decided by the plan: {hint}.")
    if "," in str(arguments.get("device", "")):
        raise ValueError(f"{where}: device={arguments['device']}: a run has one; devices=... spreads the runs.")


def _check_values(arguments: Mapping[str, Any], where: str) -> None:
    from yolo_sophia.integration.arguments import judge

    try:
        judge(arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {error}") from None


def runs(plan: Plan, tuned: Mapping[tuple[str, str], Mapping[str, Any]] | None = None) -> list[Run]:
    """All trainings of a plan: every arm on every data set, seed and horizon, seeds outermost.

    Args:
        plan: The plan.
        tuned: What tuning found, by arm and data set; overrides the arm's own arguments.
    """
    made = []
    for seed in plan.seeds:
        for data in plan.data:
            for horizon in plan.horizons:
                for arm in plan.arms:
                    found = (tuned or {}).get((arm.name, data), {})
                    arguments = {**plan.common, **arm.arguments, **found}
                    arguments |= {"data": data, "seed": seed, "epochs": max(1, round(plan.epochs * horizon))}
                    run = make_run(arm.name, data, seed, horizon, arguments, plan.bn_recalibrate)
                    made.append(replace(run, restart=plan.cut_runs == "restart"))
    return made
