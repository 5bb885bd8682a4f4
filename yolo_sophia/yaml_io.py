"""YAML that users write: presets, plans, search spaces, and values on a command line.

Only plain values under keys of text are read: no Python objects, no repeated keys, no dates, and no aliases that make a
large value of a small file. 1e-3 is a number, as in YAML 1.2; PyYAML reads it as text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

LARGEST, MOST, DEEPEST = 1_000_000, 100_000, 50
"""Bytes of a file; values in it, those of an alias counted wherever it stands; lists and mappings inside each other."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = {None, *(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    """Plain values; a date stays text, and an exponent makes a number."""

    yaml_constructors: ClassVar = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN
    }
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag != _TAG + "timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary; keys beside a merge (`<<`) take precedence over merged ones, as in all YAML."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == _TAG + "merge" else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"found {key!r} as a key, expected text (in quotes, where YAML reads another thing)")
            if key in seen:
                raise ValueError(f"found the key {key!r} twice, expected it once")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_TAG + "float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML; `where` says what it is, for messages.

    Raises:
        ValueError: It is malformed, or more than `MOST`, or more than plain values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # PyYAML lets the errors of int(), float() and of its own look-ups through, and calls itself for each level.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        deep = f"more than {DEEPEST} levels of lists and mappings, expected fewer"
        reason = deep if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{where} is not readable YAML: {reason}") from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values that a node stands for, and levels of lists and mappings in it.

    Raises:
        ValueError: Too many, too deep, or it contains itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1, 0
    if id(node) not in known:
        known[id(node)] = MOST, 0  # what it counts inside of itself
        children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes = [_measure(child, known) for child in children]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((height for _, height in sizes), default=0)
    size, height = known[id(node)]
    if size > MOST:
        raise ValueError(f"more than {MOST} values, expected fewer (an alias counts wherever it stands)")
    if height > DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels of lists and mappings, expected fewer")
    return size, height


def read_yaml(path: Path, where: str) -> Any:
    """Read a YAML file that is there; `where` says what it is, for messages.

    Raises:
        ValueError: As `parse_yaml`; or the file is too large, cannot be read, or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{where}: found {size} bytes, expected a YAML file of at most {LARGEST}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from None
    return parse_yaml(text, where)


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; names that are too long or invalid do not raise."""
    return os.path.isfile(path)
