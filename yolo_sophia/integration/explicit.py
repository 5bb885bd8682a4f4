"""Which arguments are explicit, and the record of it that children and resumed runs read.

An argument is explicit if it is on the command line or a keyword of `Model.train`. One from a file or from a trainer's
`cfg=` is explicit if it differs from Ultralytics' default.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

MARKER = "sophia_typed"
"""The argument that holds the record."""

CHILD = "YOLO_SOPHIA_CHILD"
"""Environment variable of processes that a training or a search starts: their command line has the record."""

_COMMAND_LINE: ContextVar[frozenset[str] | None] = ContextVar("command_line", default=None)
_WORDS: ContextVar[frozenset[str] | None] = ContextVar("words", default=None)
_CFG: ContextVar[Any] = ContextVar("cfg", default=None)


@dataclass(frozen=True)
class Record:
    """What the process that the user started has found.

    Attributes:
        preset: The preset of the run, once it is decided; until then empty.
        keys: The explicit arguments.
    """

    preset: str
    keys: frozenset[str]

    def __str__(self) -> str:
        """The form in which it stands in args.yaml."""
        return f"{self.preset}:{','.join(sorted(self.keys))}"

    @staticmethod
    def of(arguments: Mapping[str, Any], known: Iterable[str]) -> Record | None:
        """The record in the arguments of a run, or None.

        Args:
            arguments: Arguments of the run.
            known: Names of the arguments that can stand in a record.

        Raises:
            ValueError: It is not one that this package wrote.
        """
        text = arguments.get(MARKER)
        if text is None:
            return None
        preset, colon, keys = str(text).rpartition(":")
        found = frozenset(keys.split(",")) - {""}
        if not colon or not found <= set(known):
            raise ValueError(
                f"'{MARKER}={text}' is not an argument to set: yolo-sophia records in it which arguments were given "
                "explicitly. Remove it."
            )
        return Record(preset, found)


@contextmanager
def _in_effect(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def command_line(tokens: Iterable[str]) -> AbstractContextManager[None]:
    """While it runs, trainings are started by this command line of `yolo`.

    Raises:
        SyntaxError: It sets the record.
    """
    words = frozenset(token.removeprefix("--").rstrip(",").partition("=")[0] for token in tokens)
    if MARKER in words and CHILD not in os.environ:
        raise SyntaxError(f"'{MARKER}' is not a valid YOLO argument: yolo-sophia writes it. Remove it.")
    return _in_effect(_COMMAND_LINE, words)


def keyword_arguments(given: Mapping[str, Any]) -> AbstractContextManager[None]:
    """While it runs, trainings are started by `Model.train` with these keyword arguments."""
    words, line = frozenset(k for k, own in given.items() if own is not None), _COMMAND_LINE.get()
    return _in_effect(_WORDS, words if line is None else words & line)


def configuration(cfg: Any) -> AbstractContextManager[None]:
    """While it runs, a trainer is made with this `cfg`; None stands for Ultralytics' defaults."""
    return _in_effect(_CFG, cfg)


def explicit_keys(args: Mapping[str, Any], overrides: Mapping[str, Any], record: Record | None) -> set[str]:
    """Names of the arguments that the user gave.

    Args:
        args: All arguments of the run.
        overrides: What the trainer was given on top of its `cfg`.
        record: The record in `args`. A process that was given it along with all other arguments (a worker, a child of
            the tuner) takes it as it is.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    words = _WORDS.get()
    words = words if words is not None and words <= overrides.keys() | {"cfg"} else None
    passed = overrides.keys() if words is None else words
    given = {key for key in passed if args.get(key) is not None}
    if record is not None:
        return set(record.keys) if MARKER in passed else set(record.keys) | given
    if _is_dump(passed):
        given = set()
    changed = {key for key, value in DEFAULT_CFG_DICT.items() if args.get(key) not in (None, value)}
    return given | changed


def ambiguous(keys: Iterable[str], args: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a file, or of a copy of all arguments, that equal Ultralytics' defaults: perhaps meant, perhaps not.

    Args:
        keys: The arguments to look at.
        args: All arguments of the run.
        overrides: What the trainer was given on top of its `cfg`.
    """
    words, cfg = _WORDS.get(), _CFG.get()
    source: set[str] = set()
    if cfg is not None:
        from ultralytics.cfg import cfg2dict

        source |= cfg2dict(cfg).keys()
    if words is not None and "cfg" in words | (_COMMAND_LINE.get() or frozenset()):
        source |= overrides.keys() - words
    elif _is_dump(overrides.keys() if words is None else words):
        source |= overrides.keys()
    return {key: args[key] for key in keys if key in source}


def _is_dump(names: Set[str]) -> bool:
    """Whether names look like those of all arguments, not like a choice of some."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    return 2 * len(names & DEFAULT_CFG_DICT.keys()) > len(DEFAULT_CFG_DICT)
