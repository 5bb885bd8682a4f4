"""The update rule of Sophia in one pass over memory, on request (`fused=True`).

On CPU, `fused.cpp` is compiled at its first use by the machine's C++ compiler, in about a second, and kept in the
user's cache folder. It takes every tensor where it lies: gradients need not be gathered. On CUDA, torch.compile turns
the multi-tensor rule into one Triton kernel for some twenty tensors each, since Inductor fuses `_foreach` operations
across the tensors of a list; the learning rate and the scale of h enter as tensors, so that nothing is compiled again
when they change.

There is no fall-back: whoever asks for this and has no compiler gets an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from yolo_sophia.optim.compiler import build
from yolo_sophia.optim.foreach import apply_rule
from yolo_sophia.optim.layout import Bucket, buckets
from yolo_sophia.optim.reference import Rule, single_tensor_update, working_dtype

NAMES = {torch.float64: "double", torch.float32: "float", torch.float16: "_Float16", torch.bfloat16: "bfloat16"}
"""The dtypes in C++."""

ENTRIES_PER_THREAD = 32768
"""A thread is not woken for less, as in torch."""


def fused_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    rule: Rule,
) -> None:
    """Update params and exp_avgs in place in one pass; arguments as in `single_tensor_update`.

    On CPU, a tensor whose memory has gaps, or that does not lie like its gradient, is left to the reference.

    Raises:
        RuntimeError: No compiler works here.
        ValueError: The parameters are on another kind of device than CPU or CUDA.
    """
    for bucket in buckets(params, grads, exp_avgs, hessians, scales):
        kind = bucket.params[0].device.type
        if kind == "cpu":
            _update_on_cpu(bucket, rule)
        elif kind == "cuda":
            _update_compiled(bucket, rule)
        else:
            raise ValueError(f"fused=True supports CPU and CUDA, found parameters on {kind!r}; leave fused out.")


def check_compiler(p: Tensor, exp_avg: torch.dtype, hessian: torch.dtype) -> None:
    """Compile now what a CPU parameter will need.

    Args:
        p: The parameter.
        exp_avg: Dtype of its m.
        hessian: Dtype of its h.

    Raises:
        RuntimeError: No compiler works here.
    """
    if p.device.type == "cpu":
        _kernel(p.dtype, exp_avg, hessian)


@cache
def _kernel(param: torch.dtype, exp_avg: torch.dtype, hessian: torch.dtype) -> ctypes._CFuncPtr:
    library = build("fused.cpp", PARAM=NAMES[param], EXP_AVG=NAMES[exp_avg], HESSIAN=NAMES[hessian])
    function = ctypes.CDLL(str(library)).sophia_update
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int] * 4]
    function.restype = None
    return function


def _update_on_cpu(bucket: Bucket, rule: Rule) -> None:
    bucket, odd = bucket.parted()
    if odd:
        single_tensor_update(odd.params, odd.grads, odd.exp_avgs, odd.hessians, [odd.scale] * len(odd.params), rule)
    if not bucket.params:
        return
    counts = list(map(Tensor.numel, bucket.params))
    table = [address for column in bucket.columns() for address in map(Tensor.data_ptr, column)] + counts
    eps = rule.eps_in(working_dtype(bucket.params[0]))
    numbers = (rule.beta1, rule.gain, bucket.scale, eps, rule.bound, rule.shrink, rule.lr)  # struct Numbers
    _kernel(bucket.params[0].dtype, bucket.exp_avgs[0].dtype, bucket.hessians[0].dtype)(
        (ctypes.c_int64 * len(table))(*table),
        len(counts),
        (ctypes.c_double * len(numbers))(*numbers),
        rule.floor,
        rule.cautious,
        rule.root,
        min(torch.get_num_threads(), 1 + sum(counts) // ENTRIES_PER_THREAD),
    )


def _update_compiled(bucket: Bucket, rule: Rule) -> None:
    p = bucket.params[0]
    # fill_ is a kernel of its own; a copy from the host would wait for the device
    numbers = [torch.full((), x, dtype=working_dtype(p), device=p.device) for x in (bucket.scale, rule.shrink, rule.lr)]
    constant = replace(rule, lr=0.0, weight_decay=float(rule.weight_decay > 0))
    update = _compiled(tuple(p.shape for p in bucket.params))
    update(bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians, *numbers, constant)


@cache
def _compiled(shapes: tuple[torch.Size, ...]) -> Callable:
    """The rule compiled for one list: of one code object, torch.compile takes eight variants, then it raises."""
    own = FunctionType(apply_rule.__code__.replace(), apply_rule.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=False)
