"""One fact about a training, and the table of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5
"""Names that a figure lists; it counts the others."""


@dataclass(frozen=True)
class Fact:
    """A fact.

    Attributes:
        name: What it is about.
        figure: The figure, in words.
        look: Whether it deserves a look; otherwise it is in order, or known to be harmless.
        argument: What to type, or to change, where it deserves a look; empty where nothing helps.
        values: The numbers in the figure, by name, in the types of JSON.
    """

    name: str
    figure: str
    look: bool = False
    argument: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`look` or `ok`."""
        return "look" if self.look else "ok"


def table(facts: Sequence[Fact]) -> str:
    """The facts as aligned text, one line each: verdict, name, figure, what to type."""
    name, figure = (max(len(getattr(fact, part)) for fact in facts) for part in ("name", "figure"))
    lines = []
    for fact in facts:
        start = f"{fact.verdict:<4}  {fact.name:<{name}}  "
        lines.append(f"{start}{fact.figure:<{figure}}  {fact.argument}".rstrip())
    return "\n".join(lines)


def as_dicts(facts: Iterable[Fact]) -> list[dict[str, Any]]:
    """The facts in the types of JSON."""
    return [
        {
            "fact": fact.name,
            "verdict": fact.verdict,
            "figure": fact.figure,
            "argument": fact.argument,
            "values": dict(fact.values),
        }
        for fact in facts
    ]


def some(names: Iterable[str], shown: int = SHOWN) -> str:
    """The first names of a list, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def plural(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {_PLURALS.get(noun, f'{noun}s')}"


_PLURALS = {"batch": "batches", "class": "classes"}
