"""Wraps a method on one object, and restores it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Binding:
    """The method `name` of an object, wrapped on the instance.

    `replacement` is called with the original method and the arguments of a call.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable):
        self.owner, self.name, self.replacement = owner, name, replacement
        self._running = False
        self.bind()

    def bind(self) -> None:
        """Wrap the method, unless it is wrapped: again if other code has replaced the wrapper."""
        original = getattr(self.owner, self.name)
        if original is getattr(self, "_wrapper", None):
            return
        self._own = vars(self.owner).get(self.name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._running or self.replacement is None:  # inside a replacement that calls an earlier wrapper
                return original(*args, **kwargs)
            self._running = True
            try:
                return self.replacement(original, *args, **kwargs)
            finally:
                self._running = False

        self._wrapper = wrapper
        setattr(self.owner, self.name, wrapper)

    def release(self) -> None:
        """Restore the method."""
        self.replacement = None
        if vars(self.owner).get(self.name) is self._wrapper:
            if self._own is None:
                del vars(self.owner)[self.name]
            else:
                setattr(self.owner, self.name, self._own)
