"""Listening to a criterion for one forward pass.

The rule: nothing is computed twice and nothing is guessed. The criterion's own callables are wrapped for one call, so
the assignment, the normaliser and the very tensors of the graph are those of the real loss. Inside such a callable the
calls of `torch.nn.functional` losses are overheard as well: that is where a mask's logits exist, and nowhere else.
Criteria have kept these callables from Ultralytics 8.3.0 on, while their own signatures changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolo_sophia.curvature import LossTerm

_OVERHEARD = (F.binary_cross_entropy_with_logits, F.cross_entropy, F.l1_loss, F.mse_loss)


@dataclass
class Call:
    """One call of a callable that was listened to.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        result: What it returned.
        inner: First two arguments (input and target) of each loss of `torch.nn.functional` that was called inside.
    """

    args: tuple
    kwargs: dict[str, Any]
    result: Any = None
    inner: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Overhear(TorchFunctionMode):
    def __init__(self, heard: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.heard = heard

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _OVERHEARD:
            self.heard.append(args[:2])
        return func(*args, **(kwargs or {}))


class _Recorder:
    """In the place of a callable, for everybody who calls it or reads its attributes."""

    def __init__(self, original: Callable, calls: list[Call]):
        self._original, self._heard = original, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        self._heard.append(call)
        with _Overhear(call.inner):
            call.result = self._original(*args, **kwargs)
        return call.result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class Tap:
    """Listens to one call of a criterion and returns its loss terms.

    Args:
        criterion: The criterion.
        owner: What the callables in `hears` are looked up on, if it is not the criterion.

    Attributes:
        hears: Callables to listen to, by dotted path; one that this version or model does not have is left out.
        known: Whether the terms are the criterion's own, and not signed gradients that stand for them.
    """

    hears: ClassVar[tuple[str, ...]] = ()
    known: bool = True

    def __init__(self, criterion: Any, owner: Any = None):
        self.criterion = criterion
        self.owner = criterion if owner is None else owner
        self._wrapped: list[tuple[Any, str, tuple]] = []
        self._calls: dict[str, list[Call]] = {}

    @property
    def armed(self) -> bool:
        """Whether it listens."""
        return bool(self._wrapped)

    def arm(self) -> None:
        """Listen to the next call; forget an earlier one."""
        self.disarm()
        found = [(path, *self._find(path)) for path in self.hears]  # all of them before any is wrapped
        for path, owner, name, original in found:
            if original is not None:
                # In the instance's own attributes, before those of a module and of the class.
                self._wrapped.append((owner, name, (vars(owner)[name],) if name in vars(owner) else ()))
                vars(owner)[name] = _Recorder(original, self._calls.setdefault(path, []))

    def _find(self, path: str) -> tuple[Any, str, Callable | None]:
        *parents, name = path.split(".")
        owner = self.owner
        for parent in parents:
            owner = getattr(owner, parent, None)
        return owner, name, getattr(owner, name, None)

    def disarm(self) -> None:
        """Give the criterion its own callables back, and forget what was heard: it holds the graph."""
        for owner, name, own in reversed(self._wrapped):
            if own:
                vars(owner)[name] = own[0]
            else:
                vars(owner).pop(name, None)
        self._wrapped, self._calls = [], {}

    def terms(self, weight: float = 1.0) -> list[LossTerm]:
        """Loss terms of the call that was listened to, their outputs in its graph; ends the listening.

        Args:
            weight: Factor of this criterion in the loss that is trained.

        Raises:
            RuntimeError: The criterion was not called, or in a way that is not known here.
        """
        calls = self._calls
        self.disarm()
        # Not those of detached features (the second head's prototypes) or behind frozen layers.
        return [term for term in self._read(calls, weight) if term.output.requires_grad]

    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        raise NotImplementedError

    @staticmethod
    def _only(calls: dict[str, list[Call]], path: str) -> Call:
        """The one call of a callable that the criterion must have called once."""
        found = calls.get(path, [])
        if len(found) != 1:
            raise RuntimeError(
                f"The criterion called its `{path}` {len(found)} times, expected once: Ultralytics moved it. See "
                "yolo-sophia status."
            )
        return found[0]


class Joint(Tap):
    """Several taps heard in the same pass, such as those of a model with two heads.

    Args:
        criterion: The criterion that the model holds.
        parts: Pairs of a tap and a callable that gives its weight when the terms are read: it may change every epoch.
    """

    def __init__(self, criterion: Any, parts: Sequence[tuple[Tap, Callable[[], float]]]):
        super().__init__(criterion)
        self.parts = parts
        self.known = all(tap.known for tap, _ in parts)

    @property
    def armed(self) -> bool:
        """Whether it listens."""
        return any(tap.armed for tap, _ in self.parts)

    def arm(self) -> None:
        """Listen to the next call with every part."""
        for tap, _ in self.parts:
            tap.arm()

    def disarm(self) -> None:
        """End the listening of every part."""
        for tap, _ in self.parts:
            tap.disarm()

    def terms(self, weight: float = 1.0) -> list[LossTerm]:
        """Terms of all parts, each with its weight; see `Tap.terms`."""
        return [term for tap, own in self.parts for term in tap.terms(weight * own())]
