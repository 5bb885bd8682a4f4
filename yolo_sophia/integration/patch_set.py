"""Replaces attributes of Ultralytics' modules, keeps the originals, and restores them.

An attribute without the expected form (contract.py) is not replaced: the problem is recorded, and raised when an
optimizer of this package is requested. Modules that are imported again are patched again.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from yolo_sophia.integration.contract import MODULES, difference

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


class PatchSet:
    """The patches of Ultralytics' modules.

    Args:
        functions: What patches a loaded module, by its name: it takes this object and the module.
    """

    def __init__(self, functions: Mapping[str, Callable[[PatchSet, ModuleType], None]]):
        self.functions = functions
        self._forget()

    def _forget(self) -> None:
        self.generation = object()
        self.replaced: list[Replaced] = []
        self.added: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        self.taken: frozenset[str] = frozenset()  # keys of ours that Ultralytics has itself
        self._problems: dict[str, list[str]] = {}
        self._patched: dict[str, tuple[Any, Any]] = {}
        self._module = ""

    # Patching -------------------------------------------------------------------------------------------------------

    def patch(self, module_name: str) -> None:
        """Patch a loaded module, unless it is patched; what does not fit becomes a problem."""
        with _LOCK:
            if self.is_patched(module_name):
                return
            self._module, self._problems[module_name] = module_name, []
            if problem := version_problem(_version()):
                self.add_problem(problem)
            try:
                self.functions[module_name](self, sys.modules[module_name])
            except Exception as error:  # Ultralytics must stay importable for runs with another optimizer
                self.add_problem(f"{module_name}: {error}")
            self._patched[module_name] = _execution_of(module_name)  # last, for threads that ask meanwhile

    def is_patched(self, module_name: str) -> bool:
        """Whether the loaded module is patched, and has not been executed since."""
        found = self._patched.get(module_name)
        return found is not None and all(a is b for a, b in zip(found, _execution_of(module_name)))

    def replace(self, owner: Any, name: str, make: Callable[[Callable], Callable]) -> bool:
        """Replace a callable by `make(original)` if its parameters are as expected; else record a problem."""
        original = owner.__dict__.get(name)
        if self._is_ours(original):
            return True
        if problem := difference(f"{place_of(owner)}.{name}", original):
            self.add_problem(problem)
            return False
        made, generation = make(original), self.generation

        @functools.wraps(original)
        def replacement(*args, **kwargs):
            # Code that replaced this function still calls it after the patches are removed.
            return (made if self.generation is generation else original)(*args, **kwargs)

        self.set(owner, name, replacement)
        return True

    def _is_ours(self, function: Any) -> bool:
        """Whether a function is a replacement of ours, or wraps one."""
        ours = {id(entry.replacement) for entry in self.replaced}
        while function is not None:
            if id(function) in ours:
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    def set(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace an attribute and record it."""
        self.replaced.append(Replaced(owner, name, owner.__dict__[name], replacement))
        setattr(owner, name, replacement)

    def add(self, mappings: Iterable[dict[str, Any]], items: Mapping[str, Any]) -> None:
        """Add items to mappings in place, except those that one of them has, and record their keys."""
        mappings = tuple(mappings)
        self.taken = frozenset(key for key in items if any(key in mapping for mapping in mappings))
        for mapping in mappings:
            mapping.update({key: value for key, value in items.items() if key not in self.taken})
            self.added.append((mapping, tuple(items.keys() - self.taken)))

    def added_keys(self) -> set[str]:
        """The keys that were added to Ultralytics' configuration: not those that it has itself."""
        current = getattr(sys.modules.get("ultralytics.utils"), "DEFAULT_CFG_DICT", None)
        return {key for mapping, keys in self.added if mapping is current for key in keys}

    # Problems -------------------------------------------------------------------------------------------------------

    def add_problem(self, text: str) -> None:
        """Record why the module that is being patched does not fit."""
        self._problems.setdefault(self._module, []).append(text)

    @property
    def problems(self) -> list[str]:
        """Why the installed Ultralytics does not fit, each reason once."""
        return list(dict.fromkeys(text for texts in self._problems.values() for text in texts))

    def require_supported(self, keys: Iterable[str] = ()) -> None:
        """Refuse to go on where Ultralytics does not fit.

        Args:
            keys: The arguments of this package that the run may use.

        Raises:
            RuntimeError: The installed Ultralytics is not supported, changed something that is patched, or has an
                argument of its own under one of these names.
        """
        problems = self.problems
        if taken := sorted(self.taken.intersection(keys)):
            problems.append(f"it has arguments of its own with the names of ours: {', '.join(taken)}")
        if problems:
            raise RuntimeError(
                f"yolo-sophia does not fit the installed ultralytics {_version()}: {'; '.join(problems)}. Install a "
                f"supported version (pip install '{SUPPORTED}') or a newer yolo-sophia, or use another optimizer."
            )

    # Removal --------------------------------------------------------------------------------------------------------

    def remove_keys(self) -> None:
        """Remove the added keys from every mapping."""
        for mapping, keys in self.added:
            for key in keys:
                mapping.pop(key, None)
        self.added = []

    def restore(self) -> None:
        """Restore every replaced attribute, in reverse order, and remove our keys from the configuration."""
        with _LOCK:
            for entry in reversed(self.replaced):
                if entry.owner.__dict__.get(entry.name) is entry.replacement:
                    setattr(entry.owner, entry.name, entry.original)
                # Modules that imported the replacement by name hold a reference of their own.
                for module in [m for name, m in sys.modules.items() if name.startswith("ultralytics.") and m]:
                    for key in [k for k, v in vars(module).items() if v is entry.replacement]:
                        setattr(module, key, entry.original)
            self.remove_keys()
            self._forget()


def place_of(owner: Any) -> str:
    """The dotted name of a module or class."""
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"


def _execution_of(module_name: str) -> tuple[Any, Any]:
    """What tells one execution of a module from another: the module, and an object that its code creates."""
    module = sys.modules.get(module_name)
    return module, getattr(module, MODULES[module_name], None)


def _version() -> str:
    return getattr(sys.modules.get("ultralytics"), "__version__", "unknown")


def version_problem(version: str) -> str | None:
    """Why this version of Ultralytics is not supported, or None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    low, high = _SUPPORTED_MAJOR_MINOR
    if found and low <= (int(found[1]), int(found[2])) < high:
        return None
    return f"version {version} is not in the supported range {SUPPORTED}"
