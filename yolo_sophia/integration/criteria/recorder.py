"""Records the calls inside a criterion during one forward pass.

The criterion's own callables are wrapped for one call, so the assignment, the normaliser and the tensors of the graph
are those of the real loss. Calls of `torch.nn.functional` losses inside them are recorded too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolo_sophia.curvature import LossTerm

_RECORDED_FUNCTIONS = (F.binary_cross_entropy_with_logits, F.cross_entropy, F.l1_loss, F.mse_loss)


@dataclass
class LossCall:
    """One call of a loss of `torch.nn.functional`.

    Attributes:
        function: The loss.
        output: Its input, in the graph.
        target: Its target.
        options: Further arguments by name, those that are None left out.
    """

    function: Callable
    output: Tensor
    target: Tensor
    options: dict[str, Any]


@dataclass
class Call:
    """One recorded call of a callable.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        result: What it returned.
        inner: Calls of the losses of `torch.nn.functional` inside it.
    """

    args: tuple
    kwargs: dict[str, Any]
    result: Any = None
    inner: list[LossCall] = field(default_factory=list)


class _LossFunctionRecorder(TorchFunctionMode):
    def __init__(self, recorded: list[LossCall]):
        super().__init__()
        self.recorded = recorded

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _RECORDED_FUNCTIONS:
            given = {**dict(zip(inspect.signature(func).parameters, args)), **(kwargs or {})}
            options = {name: value for name, value in given.items() if value is not None}
            self.recorded.append(LossCall(func, options.pop("input"), options.pop("target"), options))
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
        images_exponent: e in the growth of the loss with the number of images n, as n ** e: 1 for a sum over images, 0
            for a mean.
        complete: Whether the last pass gave all terms of the criterion. Without foreground, those of boxes are absent.
        detached: Kinds of terms of the last pass whose outputs have no gradient, although the criterion does not
            detach them by design.
        left_out: Scalars in the graph of the last pass that are part of the loss and have no term by design.
        by_design: Callables of the criterion whose arguments this model detaches by design.
    """

    recorded_callables: ClassVar[tuple[str, ...]] = ()
    images_exponent: int = 1

    def __init__(self, criterion: Any, owner: Any = None, by_design: Sequence[str] = ()):
        self.criterion = criterion
        self.owner = criterion if owner is None else owner
        self.by_design = tuple(by_design)
        self.complete = True
        self.detached: list[str] = []
        self.left_out: list[Tensor] = []
        self._wrapped: list[tuple[Any, str, tuple]] = []
        self._calls: dict[str, list[Call]] = {}

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
        self.complete, self.left_out = True, []
        terms = self._read(calls, weight)
        self.detached = sorted({type(term).__name__ for term in terms if not term.output.requires_grad})
        return [term for term in terms if term.output.requires_grad]

    @property
    def callables(self) -> list[Any]:
        """The callables that would be recorded; another list means that one was replaced."""
        found = [self._find(path)[2] for path in self.recorded_callables]
        return [getattr(one, "__func__", one) for one in found]

    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        raise NotImplementedError

    @staticmethod
    def _only(calls: dict[str, list[Call]], path: str) -> Call:
        """The one call of a callable that the criterion must have called once."""
        found = calls.get(path, [])
        if len(found) != 1:
            raise RuntimeError(
                f"the criterion called its `{path}` {len(found)} times in one forward pass, expected once"
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
        self.images_exponent = parts[0][0].images_exponent

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
        terms = [term for recorder, own in self.parts for term in recorder.terms(weight * own())]
        recorders = [recorder for recorder, _ in self.parts]
        self.complete = all(recorder.complete for recorder in recorders)
        self.detached = sorted({name for recorder in recorders for name in recorder.detached})
        self.left_out = [value for recorder in recorders for value in recorder.left_out]
        return terms

    @property
    def callables(self) -> list[Any]:
        """Those of all parts; see `Recorder.callables`."""
        return [one for recorder, _ in self.parts for one in recorder.callables]
