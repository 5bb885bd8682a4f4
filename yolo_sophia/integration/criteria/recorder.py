"""Records the calls inside a criterion during one forward pass.

The criterion's own callables are wrapped for one call, so the assignment, the normaliser and the tensors of the graph
are those of the real loss. Calls of `torch.nn.functional` losses inside a wrapped callable are recorded as well: a
mask's logits exist only there. The names of these callables are the same from Ultralytics 8.3.0 on, while the
signatures of the criteria changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolo_sophia.curvature import LossTerm

_RECORDED_FUNCTIONS = (F.binary_cross_entropy_with_logits, F.cross_entropy, F.l1_loss, F.mse_loss)


@dataclass
class Call:
    """One recorded call of a callable.

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


class _LossFunctionRecorder(TorchFunctionMode):
    def __init__(self, recorded: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.recorded = recorded

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _RECORDED_FUNCTIONS:
            self.recorded.append(args[:2])
        return func(*args, **(kwargs or {}))


class _RecordedCallable:
    """Stands in for a callable; attributes are those of the original."""

    def __init__(self, original: Callable, calls: list[Call]):
        self._original, self._calls_made = original, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        self._calls_made.append(call)
        with _LossFunctionRecorder(call.inner):
            call.result = self._original(*args, **kwargs)
        return call.result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class Recorder:
    """Records one call of a criterion and returns its loss terms.

    Args:
        criterion: The criterion.
        owner: What the callables in `recorded_callables` are looked up on, if it is not the criterion.

    Attributes:
        recorded_callables: Callables to record, by dotted path. Those that this version or model lacks are left
            out.
        known: Whether the terms are the criterion's own, and not signed gradients that stand for them.
    """

    recorded_callables: ClassVar[tuple[str, ...]] = ()
    known: bool = True

    def __init__(self, criterion: Any, owner: Any = None):
        self.criterion = criterion
        self.owner = criterion if owner is None else owner
        self._wrapped: list[tuple[Any, str, tuple]] = []
        self._calls: dict[str, list[Call]] = {}

    @property
    def recording(self) -> bool:
        """Whether it is recording."""
        return bool(self._wrapped)

    def start(self) -> None:
        """Record the next call, and discard an earlier one."""
        self.stop()
        found = [(path, *self._find(path)) for path in self.recorded_callables]  # all of them before any is wrapped
        for path, owner, name, original in found:
            if original is not None:
                # In the instance's own attributes, before those of a module and of the class.
                self._wrapped.append((owner, name, (vars(owner)[name],) if name in vars(owner) else ()))
                vars(owner)[name] = _RecordedCallable(original, self._calls.setdefault(path, []))

    def _find(self, path: str) -> tuple[Any, str, Callable | None]:
        *parents, name = path.split(".")
        owner = self.owner
        for parent in parents:
            owner = getattr(owner, parent, None)
        return owner, name, getattr(owner, name, None)

    def stop(self) -> None:
        """Restore the criterion's own callables, and discard the recorded calls, which hold the graph."""
        for owner, name, own in reversed(self._wrapped):
            if own:
                vars(owner)[name] = own[0]
            else:
                vars(owner).pop(name, None)
        self._wrapped, self._calls = [], {}

    def terms(self, weight: float = 1.0) -> list[LossTerm]:
        """Loss terms of the recorded call, their outputs in its graph. Stops the recording.

        Args:
            weight: Factor of this criterion in the loss that is trained.

        Raises:
            RuntimeError: The criterion was not called, or in a way that is not known here.
        """
        calls = self._calls
        self.stop()
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


class CompositeRecorder(Recorder):
    """Several recorders of the same pass, such as those of a model with two heads.

    Args:
        criterion: The criterion that the model holds.
        parts: Pairs of a recorder and a callable that returns its weight when the terms are read; the weight may change
            every epoch.
    """

    def __init__(self, criterion: Any, parts: Sequence[tuple[Recorder, Callable[[], float]]]):
        super().__init__(criterion)
        self.parts = parts
        self.known = all(recorder.known for recorder, _ in parts)

    @property
    def recording(self) -> bool:
        """Whether it is recording."""
        return any(recorder.recording for recorder, _ in self.parts)

    def start(self) -> None:
        """Start every part."""
        for recorder, _ in self.parts:
            recorder.start()

    def stop(self) -> None:
        """Stop every part."""
        for recorder, _ in self.parts:
            recorder.stop()

    def terms(self, weight: float = 1.0) -> list[LossTerm]:
        """Terms of all parts, each with its weight; see `Recorder.terms`."""
        return [term for recorder, own in self.parts for term in recorder.terms(weight * own())]
