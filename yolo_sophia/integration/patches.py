"""The ledger of what is replaced in Ultralytics, and the replacements.

The rule: every replacement delegates unless a run asked for Sophia; the ledger keeps the very object it replaced and
gives it back. A seam that does not look as expected is not touched: the problem is kept, and told to who asks for
Sophia.

Seams (Ultralytics 8.3.0 to 8.4.190):
    utils.DEFAULT_CFG_DICT, DEFAULT_CFG     our keys added in place: `python -m ultralytics.cfg.__init__` shares them
    cfg.CFG_{FRACTION,INT,BOOL}_KEYS       the kinds of our keys
    cfg.entrypoint, engine.model.Model.train    which arguments the user gave
    nn.tasks.BaseModel.load                     the class names of the weights
    engine.trainer.BaseTrainer.__init__, train  its cfg=; what the workers of a multi-GPU run must know
    engine.trainer.BaseTrainer.check_resume     arguments are validated here, and no directory is made yet
    engine.trainer.BaseTrainer.build_optimizer  the closed list of optimizers
    engine.trainer.convert_optimizer_state_dict_to_fp16   would halve h, which is tiny
    engine.trainer.strip_optimizer              would write last.pt and best.pt in place
    engine.tuner.Tuner.__init__             its children get every key as if typed
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from yolo_sophia import options
from yolo_sophia.integration import arguments, explicit
from yolo_sophia.integration.external_optimizer import OWN, is_dotted

SUPPORTED = "ultralytics>=8.3,<9"
_SUPPORTED_MAJOR_MINOR = ((8, 3), (9, 0))  # from, below


_LOCK = threading.RLock()  # threads may import, install and uninstall at once


@dataclass(frozen=True)
class Replaced:
    """One replaced attribute: `owner.name` was `original` and is `replacement`."""

    owner: Any
    name: str
    original: Any
    replacement: Any


class Ledger:
    """Sets the seams of Ultralytics' modules and takes them back."""

    def __init__(self):
        self.generation = object()
        self.replaced: list[Replaced] = []
        self.added: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        self.problems: list[str] = []
        self.patched: set[str] = set()

    def patch(self, module_name: str) -> None:
        """Set the seams of a loaded module, once; what does not fit goes to `problems`."""
        with _LOCK:
            if module_name in self.patched:
                return
            self._patch(module_name)
            self.patched.add(module_name)  # last: in another thread, install() is not done before the seams are set

    def _patch(self, module_name: str) -> None:
        version = getattr(sys.modules.get("ultralytics"), "__version__", "unknown")
        if (problem := version_problem(version)) and problem not in self.problems:
            self.problems.append(problem)
        try:
            _SEAMS[module_name](self, sys.modules[module_name])
        except Exception as error:  # Ultralytics must stay importable for who does not ask for Sophia
            self.problems.append(f"{module_name}: {error}")

    def replace(self, owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Callable], Callable]) -> bool:
        """Replace a callable by `make(original)` if its parameters begin as expected; else note a problem."""
        original = owner.__dict__.get(name)
        found = tuple(inspect.signature(original).parameters) if callable(original) else None
        if found is None or found[: len(parameters)] != parameters:
            place = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"
            shown = f"takes {found}" if found else "is gone"
            self.problems.append(f"{place}.{name} {shown}, expected {parameters}")
            return False
        made, generation = make(original), self.generation

        @functools.wraps(original)
        def replacement(*args, **kwargs):
            # Somebody who replaced ours holds it, and calls it still when we have taken it back.
            return (made if self.generation is generation else original)(*args, **kwargs)

        self.set(owner, name, replacement)
        return True

    def set(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace an attribute and write it down."""
        self.replaced.append(Replaced(owner, name, owner.__dict__[name], replacement))
        setattr(owner, name, replacement)

    def add(self, mapping: dict[str, Any], items: dict[str, Any]) -> None:
        """Add items to a mapping in place, but none that it has, and write their keys down."""
        new = {key: value for key, value in items.items() if key not in mapping}
        mapping.update(new)
        self.added.append((mapping, tuple(new)))

    def added_keys(self) -> set[str]:
        """The keys that `add` put anywhere: not those that Ultralytics has itself."""
        return {key for _, keys in self.added for key in keys}

    def take_keys_back(self) -> None:
        """Take out of every mapping what `add` put there."""
        for mapping, keys in self.added:
            for key in keys:
                mapping.pop(key, None)
        self.added = []

    def restore(self) -> None:
        """Give back every replaced attribute, in reverse order, and take our keys out of the configuration."""
        with _LOCK:
            self._restore()

    def _restore(self) -> None:
        for entry in reversed(self.replaced):
            if entry.owner.__dict__.get(entry.name) is entry.replacement:
                setattr(entry.owner, entry.name, entry.original)
            # Modules that imported the replacement by name hold a copy of the reference.
            for module in [m for name, m in sys.modules.items() if name.startswith("ultralytics.") and m]:
                for key in [k for k, v in vars(module).items() if v is entry.replacement]:
                    setattr(module, key, entry.original)
        self.take_keys_back()
        self.__init__()

    def require_sound(self) -> None:
        """Refuse to go on where a seam did not fit.

        Raises:
            RuntimeError: The installed Ultralytics is not supported, or moved something.
        """
        if self.problems:
            version = getattr(sys.modules.get("ultralytics"), "__version__", "unknown")
            raise RuntimeError(
                f"yolo-sophia does not fit the installed ultralytics {version}: {'; '.join(self.problems)}. Install a "
                f"supported version (pip install '{SUPPORTED}') or a newer yolo-sophia, or use another optimizer."
            )


LEDGER = Ledger()


def version_problem(version: str) -> str | None:
    """Why this version of Ultralytics is not supported, or None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    low, high = _SUPPORTED_MAJOR_MINOR
    if found and low <= (int(found[1]), int(found[2])) < high:
        return None
    return f"version {version} is not in the supported range {SUPPORTED}"


def _patch_utils(ledger: Ledger, module: ModuleType) -> None:
    for mapping in (module.DEFAULT_CFG_DICT, vars(module.DEFAULT_CFG)):
        ledger.add(mapping, arguments.default_arguments())


def _patch_cfg(ledger: Ledger, module: ModuleType) -> None:
    for name, kind in (("CFG_FRACTION_KEYS", "fraction"), ("CFG_INT_KEYS", "int"), ("CFG_BOOL_KEYS", "bool")):
        original = module.__dict__.get(name)
        if isinstance(original, (set, frozenset)):
            ledger.set(module, name, type(original)(original | (options.keys(kind) & ledger.added_keys())))

    def entrypoint(original: Callable) -> Callable:
        def wrapper(debug=""):
            tokens = (debug.split(" ") if debug else sys.argv)[1:]
            with explicit.command_line(module.merge_equals_args(tokens)):
                return original(debug)

        return wrapper

    ledger.replace(module, "entrypoint", ("debug",), entrypoint)


def _patch_trainer(ledger: Ledger, module: ModuleType) -> None:
    def check_resume(original: Callable) -> Callable:
        def wrapper(self, overrides):
            original(self, overrides)
            if arguments.canonical_optimizer(self.args.optimizer) or is_dotted(self.args.optimizer):
                ledger.require_sound()
            arguments.finalize(self.args, overrides, ledger.added_keys())

        return wrapper

    def build_optimizer(original: Callable) -> Callable:
        signature = inspect.signature(original)

        def wrapper(self, *args, **kwargs):
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            name = call.arguments["name"]
            ours = arguments.canonical_optimizer(name) is not None
            if not ours and not is_dotted(name):
                return original(self, *args, **kwargs)
            ledger.require_sound()  # again: it may be check_resume that was moved
            from yolo_sophia.integration.build import build_other, build_sophia

            build = build_sophia if ours else build_other
            return build(self, original, call.arguments)

        return wrapper

    def convert_optimizer_state_dict_to_fp16(original: Callable) -> Callable:
        def wrapper(state_dict):
            ours = any(arguments.KEEP_FLOAT32 in group for group in state_dict["param_groups"])
            return state_dict if ours else original(state_dict)

        return wrapper

    def strip_optimizer(original: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            from yolo_sophia.integration.checkpoints import strip_atomically

            return strip_atomically(original, *args, **kwargs)

        return wrapper

    def init(original: Callable) -> Callable:
        def wrapper(self, cfg=module.DEFAULT_CFG, *args, **kwargs):
            with explicit.configuration(None if cfg is module.DEFAULT_CFG else cfg):
                original(self, cfg, *args, **kwargs)

        return wrapper

    def train(original: Callable) -> Callable:
        def wrapper(self, *args, **kwargs):
            if arguments.canonical_optimizer(self.args.optimizer) is None:
                return original(self, *args, **kwargs)
            from yolo_sophia.integration.provenance import names_for_workers

            with names_for_workers(self.model):
                return original(self, *args, **kwargs)

        return wrapper

    trainer = module.BaseTrainer
    ledger.replace(trainer, "__init__", ("self", "cfg", "overrides", "_callbacks"), init)
    ledger.replace(trainer, "train", ("self",), train)
    if not ledger.replace(trainer, "check_resume", ("self", "overrides"), check_resume):
        ledger.take_keys_back()  # nobody would take them out of other runs' args.yaml
    ledger.replace(
        trainer, "build_optimizer", ("self", "model", "name", "lr", "momentum", "decay", "iterations"), build_optimizer
    )
    ledger.replace(
        module, "convert_optimizer_state_dict_to_fp16", ("state_dict",), convert_optimizer_state_dict_to_fp16
    )
    ledger.replace(module, "strip_optimizer", ("f", "s"), strip_optimizer)


def _patch_model(ledger: Ledger, module: ModuleType) -> None:
    def train(original: Callable) -> Callable:
        def wrapper(self, trainer=None, **kwargs):
            with explicit.keyword_arguments(kwargs):
                if isinstance(kwargs.get("data"), (list, tuple)):  # MultiTrainer starts a child for each of them
                    kwargs = arguments.recorded_for_children(kwargs, self.overrides)
                return original(self, trainer, **kwargs)

        return wrapper

    ledger.replace(module.Model, "train", ("self", "trainer"), train)


def _patch_tasks(ledger: Ledger, module: ModuleType) -> None:
    def load(original: Callable) -> Callable:
        def wrapper(self, weights, *args, **kwargs):
            result = original(self, weights, *args, **kwargs)
            from yolo_sophia.integration.provenance import note_load

            note_load(self, weights)
            return result

        return wrapper

    ledger.replace(module.BaseModel, "load", ("self", "weights"), load)


def _patch_tuner(ledger: Ledger, module: ModuleType) -> None:
    def init(original: Callable) -> Callable:
        def wrapper(self, args, *rest, **kwargs):
            asked = args.get("optimizer", "auto")
            name = arguments.canonical_optimizer(asked)
            theirs = set(OWN) if is_dotted(asked) else set()
            space = args.get("space") or {}
            given = {**args, **dict.fromkeys(space, 0)}
            if name is None:
                record = explicit.Record.of(args, arguments.KNOWN_KEYS)
                found = explicit.explicit_keys(given, given, record)
                if record is None:
                    arguments.refuse_for_others(found & (ledger.added_keys() - theirs), asked)
                else:
                    arguments.drop_record(args, record, found, ledger.added_keys())
            else:
                ledger.require_sound()
                args["optimizer"] = name
                arguments.set_explicit(args, dict(args))  # before Tuner makes its directory
            original(self, args, *rest, **kwargs)
            if name is None:
                for key in ledger.added_keys() - theirs:
                    vars(self.args).pop(key, None)
            else:
                from yolo_sophia.integration.resolution import start_search

                start_search(vars(self.args), self.space)
                mutate = self._mutate
                self._mutate = lambda *args, **kwargs: arguments.within(mutate(*args, **kwargs), self.space)

        return wrapper

    ledger.replace(module.Tuner, "__init__", ("self", "args"), init)
    # It rounds what it finds for these keys; where it was imported before install(), it has its own reference.
    integer_keys = getattr(sys.modules["ultralytics.cfg"], "CFG_INT_KEYS", None)
    if integer_keys is not None and module.__dict__.get("CFG_INT_KEYS", integer_keys) is not integer_keys:
        ledger.set(module, "CFG_INT_KEYS", integer_keys)


_SEAMS: dict[str, Callable[[Ledger, ModuleType], None]] = {
    "ultralytics.utils": _patch_utils,
    "ultralytics.cfg": _patch_cfg,
    "ultralytics.engine.trainer": _patch_trainer,
    "ultralytics.engine.tuner": _patch_tuner,
    "ultralytics.engine.model": _patch_model,
    "ultralytics.nn.tasks": _patch_tasks,
}
