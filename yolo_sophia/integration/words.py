"""`key=value` words as `yolo train` reads them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any


def merge_words(words: Sequence[str]) -> list[str]:
    """Join `key = value` and values in brackets that the shell split at spaces.

    Raises:
        ValueError: A bracket is not closed.
    """
    from ultralytics.cfg import merge_equals_args

    try:
        return merge_equals_args(list(words))
    except (SyntaxError, IndexError) as error:
        raise ValueError(f"found {' '.join(words)!r}, expected key=value: {error}") from None


def read_value(key: str, text: str) -> Any:
    """The value that `yolo train key=text` gives its trainer; the installed Ultralytics decides.

    Ultralytics before 8.4 evaluates words as Python expressions. Only literals are passed on to it, because plan files
    are read here as well.
    """
    from ultralytics.cfg import parse_key_value_pair, smart_value

    text = text.strip()
    try:
        if "literal_eval" not in smart_value.__code__.co_names and text.lower() not in {"none", "true", "false"}:
            ast.literal_eval(text)
        return parse_key_value_pair(f"{key}={text}")[1]
    except Exception:  # no literal; 8.4 also looks `module.CONSTANT` up, and a user's module may do anything then
        return text


def is_switch(key: str) -> bool:
    """Whether `yolo train` takes the bare word for True: an argument that is True or False by default."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    return isinstance(DEFAULT_CFG_DICT.get(key), bool)
