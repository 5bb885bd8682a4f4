"""The grammar of `compare` and `tune`: `key=value` words and YAML files, read into a mapping.

Ultralytics' arguments are read as `yolo train` reads them. A path that exists is taken as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_sophia.integration.words import is_switch, merge_words, read_value
from yolo_sophia.yaml_io import is_file, parse_yaml, read_yaml

PATHS = ("plan", "model", "out", "project", "name", "storage", "study")
"""Keys whose text is never interpreted."""
NAME_LISTS = ("data", "optimizers")
NUMBER_LISTS = ("seeds", "horizons", "devices")
MAPPINGS = ("optimizer_args", "lr_factors", "space", "arms")
"""Keys whose value may be a mapping in YAML."""


def read(given: Sequence[str] | Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Read words into a mapping, on top of that of the `plan=` file; in a mapping, text is read as in words.

    Args:
        given: `key=value` words, or a mapping as in a plan file.
        own: Keys that are not Ultralytics'.

    Raises:
        ValueError: A word is not `key=value`, or the file is not readable.
    """
    if isinstance(given, Mapping):
        return _read_content(given, own)
    explicit: dict[str, Any] = {}
    for word in _joined(given):
        key, separator, text = word.lstrip("-").partition("=")
        key = key.strip()
        if not separator and key not in own and is_switch(key):
            explicit[key] = True
        elif not separator or not key:
            raise ValueError(f"found {word!r}, expected key=value, such as data=my.yaml or seeds=3.")
        else:
            explicit[key] = _value(key, text, own)
    content = read_mapping("plan", explicit["plan"]) if explicit.get("plan") else {}
    explicit.pop("plan", None)
    return {**_read_content(content, own), **explicit}


def _read_content(content: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in content.items():
        if key == "arms" and isinstance(value, dict):
            arms = value.items()
            made[key] = {name: _read_content(arm, ()) if isinstance(arm, dict) else arm for name, arm in arms}
        else:
            made[key] = _value(key, value, own) if isinstance(value, str) and value.strip() else value
    return made


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


def _joined(words: Sequence[str]) -> list[str]:
    """Merge words as Ultralytics does; a word that is complete, or names a file, is left alone."""
    made: list[str] = []
    pending: list[str] = []
    for word in words:
        _, _, text = word.partition("=")
        complete = bool(text) and (text.count("[") == text.count("]") or is_file(text))
        if complete and pending[-1:] != ["="] and not word.startswith("="):
            made += [*merge_words(pending), word]
            pending = []
        else:
            pending.append(word)
    return made + merge_words(pending)


def _value(key: str, text: str, own: Collection[str]) -> Any:
    if not text.strip():
        if key in own or key == "model":
            return None
        raise ValueError(f"{key}= has no value.")
    if key in NAME_LISTS and key in own:
        return split_names(text, is_file if key == "data" else lambda name: False)
    if key in PATHS:
        return None if text.lower() == "none" else text
    if key in NUMBER_LISTS and key in own and (key != "seeds" or "," in text):
        return [_scalar(key, part.strip()) for part in text.strip("[]()").split(",") if part.strip()]
    if key in MAPPINGS or key in own:
        return text if is_file(text) else _scalar(key, text)
    return read_value(key, text.removesuffix(","))


def split_names(text: str, exists: Callable[[str], bool]) -> list[str]:
    """Split names at commas, with or without brackets around them; a name that exists is not split."""
    text = text.strip()
    if exists(text):
        return [text]
    if _is_bracketed(text):
        if (names := _literal_names(text)) is not None:
            return names
        text = text[1:-1]
    parts, names = text.split(","), []
    while parts:
        size = next((n for n in range(len(parts), 1, -1) if exists(",".join(parts[:n]).strip())), 1)
        names.append(",".join(parts[:size]).strip())
        parts = parts[size:]
    return [name for name in names if name]


def _is_bracketed(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes."""
    if text[:1] + text[-1:] not in {"[]", "()"}:
        return False
    return all(text.count(text[0], 0, i) > text.count(text[-1], 0, i) for i in range(1, len(text)))


def _literal_names(text: str) -> list[str] | None:
    """Names in quotes, `['a.yaml', 'b.yaml']`; None where they are not."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    names = [names] if isinstance(names, str) else names
    return list(names) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None


def _scalar(key: str, text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if text.lower() in {"none", "null", ""}:
        return None
    try:
        return parse_yaml(text, f"{key}={text}")
    except ValueError:
        if text.startswith(("{", "[")):  # meant as a mapping or a list
            raise
        return text
