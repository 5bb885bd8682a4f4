"""The update rule of `_step.py` as a Triton kernel: one launch for the tensors of all parameter groups.

A program moves BLOCK coordinates of one tensor. `owners` names the tensor's row of `table`, which holds its addresses
and the row of `scalars` with its settings; `_fused.py` writes all three. Importing this module needs Triton.
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(9)
"""Of a row of `table`, int64: addresses of p, g, m, h and the factors of lr (0: none), coordinates of the tensor,
coordinates per factor, row of `scalars`, first program."""

SCALARS = tl.constexpr(10)
"""Of a row of `scalars`, float32: lr, lr * weight_decay, b1, 1 - b1 (negative where the objective is maximized), scale
of h, eps, bound, whether eps is the smallest denominator, whether the root of h is taken, caution (0: none, 1, or -1
where the objective is maximized)."""


@triton.jit
def _move(p, g, m, h, factors, per_factor, settings, grad_scale, offsets, mask, BLOCK: tl.constexpr):
    """Move the coordinates at the offsets: p, g, m and h are read once, p and m written once."""
    gradient = tl.load(g + offsets, mask=mask).to(tl.float32)
    momentum = tl.load(m + offsets, mask=mask).to(tl.float32)
    divisor = tl.load(h + offsets, mask=mask).to(tl.float32) * tl.load(settings + 4)
    moved = tl.load(p + offsets, mask=mask).to(tl.float32)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if factors != 0:
        factor = tl.load(factors.to(tl.pointer_type(tl.float32)) + offsets // per_factor, mask=mask)
    if grad_scale is not None:  # torch's fused optimizers leave the unscaled gradient behind as well
        gradient = gradient / tl.load(grad_scale)
        tl.store(g + offsets, gradient.to(g.dtype.element_ty), mask=mask)
    momentum = momentum * tl.load(settings + 2) + gradient * tl.load(settings + 3)
    tl.store(m + offsets, momentum.to(m.dtype.element_ty), mask=mask)

    # Comparisons instead of minimum and maximum, so that NaN stays.
    eps, bound, caution = tl.load(settings + 5), tl.load(settings + 6), tl.load(settings + 9)
    if tl.load(settings + 8) != 0:
        divisor = tl.sqrt(tl.where(divisor < 0, 0.0, divisor))
    if tl.load(settings + 7) != 0:
        divisor = tl.where(divisor < eps, eps, divisor)
    else:
        divisor = divisor + eps
    update = momentum / divisor
    update = tl.where(update > bound, bound, update)
    update = tl.where(update < -bound, -bound, update)
    if caution != 0:
        update = tl.where(update * gradient * caution <= 0, 0.0, update)
    moved = moved * (1 - tl.load(settings + 1) * factor) - tl.load(settings) * (update * factor)
    tl.store(p + offsets, moved.to(p.dtype.element_ty), mask=mask)


@triton.jit
def step(
    table,
    scalars,
    owners,
    found_inf,
    grad_scale,
    skipped,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move all tensors of the table. P, G, M, H are their dtypes, ALIGNMENT what divides all of their addresses.

    found_inf, grad_scale and skipped are addresses of one number, or None: whether to leave everything as it is,
    what the gradients are divided by, and the number of launches that have left everything as it is.
    """
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * COLUMNS
    count = tl.load(row + 5)
    if found_inf is not None:
        skips = tl.load(found_inf) != 0
        count = tl.where(skips, 0, count)
        if skipped is not None:
            tl.store(skipped, tl.load(skipped) + 1, mask=skips & (program == 0))
    p = tl.multiple_of(tl.load(row).to(tl.pointer_type(P)), ALIGNMENT)
    g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(G)), ALIGNMENT)
    m = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(M)), ALIGNMENT)
    h = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(H)), ALIGNMENT)
    factors, per_factor = tl.load(row + 4), tl.load(row + 6)
    settings = scalars + tl.load(row + 7) * SCALARS
    start = (program - tl.load(row + 8)) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # without a mask, several coordinates are one access
        _move(p, g, m, h, factors, per_factor, settings, grad_scale, offsets, None, BLOCK)
    else:
        _move(p, g, m, h, factors, per_factor, settings, grad_scale, offsets, offsets < count, BLOCK)
