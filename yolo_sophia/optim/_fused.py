"""When the Triton kernel takes a step, and what it reads: the table of tensors, their settings, overflow flags.

One launch per device and combination of dtypes moves the tensors of all parameter groups. Before it, one asynchronous
copy brings the table to the device, as gradients lie somewhere else in every step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from yolo_sophia.optim._step import Columns, StepOptions, foreach_step, single_tensor_step

BLOCK = 1024
"""Coordinates that a program of the kernel moves."""

COLUMNS, SCALARS = 9, 10
"""Of the two parts of the table, see `_triton.py`."""

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""What the kernel reads, by the names of Triton."""

CAPABILITY = (7, 0)
"""The least CUDA capability that Triton supports."""


def uses_triton(group: Mapping[str, Any], params: Sequence[Tensor]) -> bool:
    """Whether the kernel steps a parameter group: where `fused` asks for it, else on CUDA where it can.

    Where it could be expected and cannot, a warning gives the reason, once per process.

    Args:
        group: `fused` is True, False or None (choose), `foreach` likewise: a choice there is one against the kernel.
        params: The parameters to update, at least one.

    Raises:
        RuntimeError: `fused` is True, and the kernel cannot be used.
    """
    asked = group["fused"]
    if asked is False or (asked is None and group["foreach"] is not None):
        return False
    plain = all(type(p) in (Tensor, Parameter) for p in params)  # not DTensor
    if asked is None and not (plain and all(p.is_cuda for p in params)):
        return False
    is_captured = params[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or is_captured:
        return False  # a CUDA graph would replay the copy of the table with the addresses and settings of today
    reasons = [] if plain else ["found a subclass of Tensor, such as DTensor, expected plain tensors"]
    reasons += [reason for device in {p.device for p in params} if (reason := reason_against(device))]
    if reasons and asked:
        raise RuntimeError(f"fused=True: {reasons[0]}. Use fused=None to take the kernel where it can be used.")
    for reason in reasons:
        _say_once(f"Sophia steps with multi-tensor kernels (foreach) instead of one Triton kernel: {reason}.")
    return not reasons


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


@functools.cache
def reason_against(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device, None if it can. The first call compiles it and compares a step."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"found parameters on {device.type!r}, expected 'cuda'"
    if os.name == "nt":
        return "Triton does not support Windows"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"found CUDA capability {found}, expected at least {'.'.join(map(str, CAPABILITY))}"
    try:
        _check_one_step(device)
    except Exception as error:  # whatever a compiler, a driver or another version of Triton may raise
        lines = str(error).strip().splitlines() or ["no message"]
        return f"Triton does not work here ({type(error).__name__}: {lines[0]})"
    return None


def _check_one_step(device: torch.device) -> None:
    """Compare the kernel with the single-tensor step on two small tensors.

    Raises:
        Exception: Triton is missing or broken, has no C compiler, or its result is another one.
    """
    values = torch.linspace(-2, 2, BLOCK + 76, dtype=torch.float32, device="cpu")
    columns = [[values.roll(i).to(device), values[:5].roll(i).to(device)] for i in range(3)]
    columns.append([h.square() for h in columns[0]])
    found, expected = ([[t.clone() for t in column] for column in columns] for _ in range(2))
    options, scales = StepOptions(0.1, 0.9, 0.1, 1e-12, False), [0.5, 0.5]
    single_tensor_step(*expected, scales, [None, None], options)
    with torch.no_grad():
        step, columns = FusedStep(), (*found, [None, None])
        step.arrange(columns)
        step(columns, [(options, scales)], torch.zeros((), device=device))
    for a, b in zip((*found[0], *found[2]), (*expected[0], *expected[2])):
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            raise ArithmeticError("a step of the kernel differs from the reference")


class FusedStep:
    """Steps of one optimizer with the kernel.

    Attributes:
        rest: Positions of the tensors that the kernel does not take: their dtype or memory layout is another one.
        launches: What a step launches. Empty tensors are in none.
    """

    def __init__(self):
        self.rest: list[int] = []
        self.launches: list[_Launch] = []
        self._layouts: list[list[Any]] = []  # of the step before
        self._states: list[Tensor | None] = []
        self._skipped: Tensor | None = None  # steps that have left everything as it was, on the device

    def arrange(self, columns: Columns) -> bool:
        """Divide the tensors of the next step, of all groups, into launches.

        Returns:
            Whether their number, dtypes or layouts are others than in the step before.
        """
        layouts = [[*map(read, tensors)] for tensors in columns[:2] for read in (Tensor.size, Tensor.stride)]
        layouts += [[*map(read, ts)] for ts in columns[:4] for read in (Tensor.get_device, attrgetter("dtype"))]
        states = [*chain(*columns[2:])]  # of the same tensor, neither shape nor strides change
        if layouts == self._layouts and all(map(is_, states, self._states)):
            return False
        self._layouts, self._states, self.rest = layouts, states, []
        buckets: dict[tuple, list[int]] = {}
        for i, (p, g, m, h, f) in enumerate(zip(*columns)):
            if not is_supported(p, g, m, h, f):
                self.rest.append(i)
            elif p.numel():
                buckets.setdefault((p.device, p.dtype, g.dtype, m.dtype, h.dtype), []).append(i)
        self.launches = [_Launch(*kind, places=places, columns=columns) for kind, places in buckets.items()]
        return True

    def __call__(
        self,
        columns: Columns,
        groups: Sequence[tuple[StepOptions, list[float]]],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Move the tensors that were arranged; the rest with multi-tensor kernels, which read no flags.

        Args:
            columns: The tensors, as they were given to `arrange`.
            groups: Settings of each parameter group, and the factors on h of its tensors.
            found_inf: Not 0: leave everything as it is. One number on a device, or None.
            grad_scale: What the gradients are divided by, in place. One number on a device, or None.
        """
        settings: list[list[float]] = []
        rows: list[int] = []
        for options, scales in groups:  # usually one row for a group: its tensors have the same scale
            row = {scale: len(settings) + i for i, scale in enumerate(dict.fromkeys(scales))}
            settings += [_settings(options, scale) for scale in row]
            rows += [row[scale] for scale in scales]
        counter = None
        if found_inf is not None and self.launches:
            if self._skipped is None:
                self._skipped = torch.zeros((), dtype=torch.int32, device=self.launches[0].device)
            counter = self._skipped
        for launch in self.launches:
            launch(columns, settings, rows, found_inf, grad_scale, counter)
            counter = None  # a step is counted once
        first = 0
        for options, scales in groups if self.rest else ():
            places = [i for i in self.rest if first <= i < first + len(scales)]
            if places:
                *tensors, factors = [[column[i] for i in places] for column in columns]
                foreach_step(*tensors, [scales[i - first] for i in places], factors, options)
            first += len(scales)

    def take_skipped(self) -> int:
        """How many steps have left everything as it was since this was asked for last. Waits for the device."""
        counter, self._skipped = self._skipped, None
        return 0 if counter is None else int(counter)


class _Launch:
    """One launch: the tensors of one device and one combination of dtypes.

    Args:
        device: Where the tensors are.
        dtypes: Of parameters, gradients, momenta and curvatures.
        places: Positions of the tensors, none of them empty.
        columns: The tensors, see `FusedStep.arrange`.
    """

    def __init__(self, device: torch.device, *dtypes: torch.dtype, places: list[int], columns: Columns):
        self.device, self.dtypes, self.places = device, dtypes, places
        counts = np.array([columns[0][i].numel() for i in places], dtype=np.int64)
        programs = -(-counts // BLOCK)
        self.programs = int(programs.sum())
        self._table = np.zeros((len(places), COLUMNS), dtype=np.int64)
        self._table[:, 5] = counts
        self._table[:, 6] = counts // [1 if columns[4][i] is None else columns[4][i].numel() for i in places]
        self._table[:, 8] = np.cumsum(programs) - programs
        self._owners = self._on_device(np.repeat(np.arange(len(places), dtype=np.int32), programs))

    def __call__(
        self,
        columns: Columns,
        settings: list[list[float]],
        rows: list[int],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        """Launch; `settings` are the rows for `_triton.SCALARS`, `rows` says which one is each tensor's."""
        import yolo_sophia.optim._triton as kernel  # imports Triton

        for column, tensors in enumerate(columns):
            self._table[:, column] = [0 if (t := tensors[i]) is None else t.data_ptr() for i in self.places]
        self._table[:, 7] = [rows[i] for i in self.places]
        scalars = np.array(settings, dtype=np.float32).reshape(-1)
        scalars = np.pad(scalars, (0, -len(scalars) % 4))  # the table begins at a multiple of 16 bytes
        held = self._on_device(np.concatenate([scalars.view(np.int64), self._table.reshape(-1)]))
        aligned = not (self._table[:, :4] % 16).any()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            kernel.step[(self.programs,)](
                held[len(scalars) // 2 :],
                held[: len(scalars) // 2].view(torch.float32),
                self._owners,
                None if found_inf is None else found_inf.to(self.device, non_blocking=True),
                None if grad_scale is None else grad_scale.to(self.device, non_blocking=True),
                skipped,
                *(getattr(kernel.tl, DTYPES[dtype]) for dtype in self.dtypes),
                ALIGNMENT=16 if aligned else 1,
                BLOCK=BLOCK,
            )

    def _on_device(self, content: np.ndarray) -> Tensor:
        """A copy on the device, which the host does not wait for.

        PyTorch's allocator of pinned memory keeps the source until the device has read it.
        """
        source = torch.from_numpy(content)
        return (source.pin_memory() if self.device.type == "cuda" else source).to(self.device, non_blocking=True)


def _settings(o: StepOptions, scale: float) -> list[float]:
    """A row for `_triton.SCALARS`."""
    sign = -1.0 if o.maximize else 1.0
    eps = max(o.eps, torch.finfo(torch.float32).tiny)
    flags = [float(o.eps_is_minimum), float(o.hessian_power != 1), sign * o.cautious]
    return [o.lr, o.lr * o.weight_decay, o.beta1, sign * (1 - o.beta1), scale, eps, o.bound, *flags]


def is_supported(p: Tensor, g: Tensor, m: Tensor, h: Tensor, f: Tensor | None) -> bool:
    """Whether the kernel can step a parameter: its tensors are dense and alike in memory, its factors are one per row.

    Args:
        p: The parameter.
        g: Its gradient.
        m: Its momentum.
        h: Its curvature.
        f: Its factors of lr, or None.
    """
    tensors = (p, g, m, h)
    if any(t.dtype not in DTYPES or t.device != p.device or t.shape != p.shape for t in tensors):
        return False
    if p.numel() == 0:
        return True
    strides = [[s for s, n in zip(t.stride(), t.shape) if n > 1] for t in tensors]  # others do not matter
    if strides.count(strides[0]) < len(strides) or not _is_dense(p):
        return False
    if f is None:
        return True
    if f.dtype != torch.float32 or f.device != p.device or not f.is_contiguous():
        return False
    by_rows = p.dim() > 0 and f.shape == (p.shape[0], *[1] * (p.dim() - 1))
    return f.numel() == 1 or (by_rows and p.stride(0) * p.shape[0] == p.numel())


def _is_dense(t: Tensor) -> bool:
    """Whether the entries of a tensor fill a range of memory, each at one place."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n > 1):
        if stride != size:
            return False
        size *= n
    return True
