"""The patches of Ultralytics: how `optimizer=SophiaG` and its arguments reach a training.

Every symbol that is replaced is in contract.py, with the reason; patch_set.py replaces and restores them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from yolo_sophia import options
from yolo_sophia.integration import arguments, explicit
from yolo_sophia.integration.children import children_know_us, require_ray_workers
from yolo_sophia.integration.patch_set import PatchSet


def _keys_of(patches: PatchSet, optimizer: object, given: Mapping[str, Any]) -> tuple[str, ...]:
    """As `arguments.keys_of`; the arguments that Ultralytics has itself do not count."""
    return arguments.keys_of(optimizer, {key: value for key, value in given.items() if key not in patches.taken})


def _children_of(patches: PatchSet, optimizer: object, given: Mapping[str, Any]) -> AbstractContextManager[None]:
    return children_know_us() if _keys_of(patches, optimizer, given) else nullcontext()


def _in_checkpoints(name: str) -> Callable[[Callable], Callable]:
    """Replace by a function of checkpoints.py, which is imported at the first call."""

    def make(original: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            from yolo_sophia.integration import checkpoints

            return getattr(checkpoints, name)(original, *args, **kwargs)

        return wrapper

    return make


def _patch_utils(patches: PatchSet, module: ModuleType) -> None:
    patches.add((module.DEFAULT_CFG_DICT, vars(module.DEFAULT_CFG)), arguments.default_arguments())


def _patch_cfg(patches: PatchSet, module: ModuleType) -> None:
    for name, kind in (("CFG_FRACTION_KEYS", "fraction"), ("CFG_INT_KEYS", "int"), ("CFG_BOOL_KEYS", "bool")):
        original = module.__dict__.get(name)
        if isinstance(original, (set, frozenset)):
            patches.set(module, name, type(original)(original | (options.keys(kind) & patches.added_keys())))

    def entrypoint(original: Callable) -> Callable:
        def wrapper(debug=""):
            tokens = (debug.split(" ") if debug else sys.argv)[1:]
            with explicit.command_line(module.merge_equals_args(tokens)):
                return original(debug)

        return wrapper

    patches.replace(module, "entrypoint", entrypoint)


def _patch_trainer(patches: PatchSet, module: ModuleType) -> None:
    def check_resume(original: Callable) -> Callable:
        def wrapper(self, overrides):
            original(self, overrides)
            if keys := _keys_of(patches, self.args.optimizer, vars(self.args)):
                patches.require_supported(keys)
            arguments.finalize(self.args, overrides, patches.added_keys())

        return wrapper

    def build_optimizer(original: Callable) -> Callable:
        signature = inspect.signature(original)

        def wrapper(self, *args, **kwargs):
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            name = call.arguments["name"]
            keys = _keys_of(patches, name, vars(self.args))
            if not keys:
                return original(self, *args, **kwargs)
            patches.require_supported(keys)  # again: it may be check_resume that does not fit
            from yolo_sophia.integration.build import build

            optimizer = build(self, original, call.arguments)
            if getattr(self.args, "fit_head", None):
                from yolo_sophia.integration.fit_head import fit_before_training

                fit_before_training(self)
            return optimizer

        return wrapper

    def init(original: Callable) -> Callable:
        def wrapper(self, cfg=module.DEFAULT_CFG, *args, **kwargs):
            with explicit.configuration(None if cfg is module.DEFAULT_CFG else cfg):
                original(self, cfg, *args, **kwargs)

        return wrapper

    def train(original: Callable) -> Callable:
        def wrapper(self, *args, **kwargs):
            if not _keys_of(patches, self.args.optimizer, vars(self.args)):
                return original(self, *args, **kwargs)
            from yolo_sophia.integration.provenance import provenance_for_workers

            with children_know_us(), provenance_for_workers(self.model):
                return original(self, *args, **kwargs)

        return wrapper

    trainer = module.BaseTrainer
    patches.replace(trainer, "__init__", init)
    patches.replace(trainer, "train", train)
    if not patches.replace(trainer, "check_resume", check_resume):
        patches.remove_keys()  # nothing would remove them from other runs' args.yaml
    patches.replace(trainer, "build_optimizer", build_optimizer)
    patches.replace(module, "convert_optimizer_state_dict_to_fp16", _in_checkpoints("convert_others"))
    patches.replace(module, "strip_optimizer", _in_checkpoints("strip_atomically"))


def _patch_model(patches: PatchSet, module: ModuleType) -> None:
    def train(original: Callable) -> Callable:
        def wrapper(self, trainer=None, **kwargs):
            with explicit.keyword_arguments(kwargs):
                if isinstance(kwargs.get("data"), (list, tuple)):  # MultiTrainer starts a child for each of them
                    kwargs = arguments.recorded_for_children(kwargs, self.overrides)
                    given = {**self.overrides, **kwargs}
                    with _children_of(patches, given.get("optimizer"), given):
                        return original(self, trainer, **kwargs)
                return original(self, trainer, **kwargs)

        return wrapper

    def tune(original: Callable) -> Callable:
        def wrapper(self, use_ray=False, *args, **kwargs):
            given = {**self.overrides, **kwargs}
            if not use_ray or not _keys_of(patches, given.get("optimizer"), given):
                return original(self, use_ray, *args, **kwargs)
            patches.require_supported(arguments.OUR_KEYS)
            require_ray_workers()
            with children_know_us():
                return original(self, use_ray, *args, **kwargs)

        return wrapper

    patches.replace(module.Model, "train", train)
    patches.replace(module.Model, "tune", tune)


def _patch_tasks(patches: PatchSet, module: ModuleType) -> None:
    def load(original: Callable) -> Callable:
        def wrapper(self, weights, *args, **kwargs):
            from yolo_sophia.integration.loads import recorded_load

            return recorded_load(original, self, weights, *args, **kwargs)

        return wrapper

    def parse_model(original: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            from yolo_sophia.integration.loads import note_built

            result = original(*args, **kwargs)
            note_built(result[0])
            return result

        return wrapper

    patches.replace(module.BaseModel, "load", load)
    patches.replace(module, "parse_model", parse_model)


def _patch_tuner(patches: PatchSet, module: ModuleType) -> None:
    def init(original: Callable) -> Callable:
        def wrapper(self, args, *rest, **kwargs):
            asked = args.get("optimizer", "auto")
            name = arguments.canonical_optimizer(asked)
            if name is None:
                record = explicit.Record.of(args, arguments.KNOWN_KEYS)
                given = {**args, **dict.fromkeys(args.get("space") or {}, 0)}
                found = explicit.explicit_keys(given, given, record)
                arguments.remove_for_other(args, record, found, patches.added_keys())
            else:
                patches.require_supported(arguments.OUR_KEYS)
                args["optimizer"] = name
                arguments.set_explicit(args, dict(args))  # before Tuner makes its directory
            original(self, args, *rest, **kwargs)
            if name is None:
                for key in patches.added_keys() - (found & set(arguments.own_of(asked))):
                    vars(self.args).pop(key, None)
            else:
                from yolo_sophia.integration.resolution import start_search

                start_search(vars(self.args), self.space)
                mutate = self._mutate
                self._mutate = lambda *args, **kwargs: arguments.within(mutate(*args, **kwargs), self.space)

        return wrapper

    def call(original: Callable) -> Callable:
        def wrapper(self, *args, **kwargs):
            with _children_of(patches, self.args.optimizer, vars(self.args)):
                return original(self, *args, **kwargs)

        return wrapper

    patches.replace(module.Tuner, "__init__", init)
    patches.replace(module.Tuner, "__call__", call)
    # It rounds what it finds for these keys; where it was imported before install(), it has its own reference.
    integer_keys = getattr(sys.modules["ultralytics.cfg"], "CFG_INT_KEYS", None)
    if integer_keys is not None and module.__dict__.get("CFG_INT_KEYS", integer_keys) is not integer_keys:
        patches.set(module, "CFG_INT_KEYS", integer_keys)


PATCHES = PatchSet(
    {
        "ultralytics.utils": _patch_utils,
        "ultralytics.cfg": _patch_cfg,
        "ultralytics.nn.tasks": _patch_tasks,
        "ultralytics.engine.model": _patch_model,
        "ultralytics.engine.trainer": _patch_trainer,
        "ultralytics.engine.tuner": _patch_tuner,
    }
)
