"""The fused norms on the CPU: kernels spread over batch entries and blocks of tokens or voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.norms_kernels import (
    SEGMENT,
    gated_backward,
    gated_forward,
    group_backward,
    group_forward,
    group_moments,
    group_sums,
    join_moments,
    sum_rows,
)
from lightm.ops.threads import parallel_for

_BLOCK = 1 << 16  # numbers of one work item; fixed, so that sums do not depend on the number of threads


def _for_blocks(batch: int, length: int, channels: int, work: Callable[[int, int, int], None]) -> None:
    """Call work(entry, first, last + 1) for all tokens, cut at multiples of SEGMENT."""
    block = max(1, _BLOCK // (SEGMENT * channels)) * SEGMENT
    blocks = -(-length // block)

    def item(index: int, worker: int) -> None:
        entry, part = divmod(index, blocks)
        work(entry, part * block, min((part + 1) * block, length))

    parallel_for(item, batch * blocks)


def _rows(x: Tensor) -> Tensor:
    """x as float32 with channels next to each other."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _new(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _spot(x: Tensor, entry: int) -> int:
    """Address of an entry of the first axis of float32 numbers."""
    return address(x) + 4 * entry * x.stride(0)


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> Tensor:
    """The normalised, gated tokens (Bt, L, E) in y's dtype."""
    batch, length, channels = y.shape
    rows, gates, factor, offset = _rows(y), _rows(z), _vector(weight), _vector(bias)
    out = _new(*y.shape)

    def work(entry: int, first: int, last: int) -> None:
        gated_forward(
            _spot(rows, entry),
            4 * rows.stride(1),
            _spot(gates, entry),
            4 * gates.stride(1),
            _spot(out, entry),
            address(factor),
            address(offset),
            channels,
            channels // parts,
            eps,
            first,
            last,
        )

    _for_blocks(batch, length, channels, work)
    return out.to(y.dtype)


def gated_norm_backward(
    grad_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (y, z, weight, bias)."""
    batch, length, channels = y.shape
    rows, gates, grad, factor, offset = _rows(y), _rows(z), _rows(grad_out), _vector(weight), _vector(bias)
    dy, dz = _new(*y.shape), _new(*y.shape)
    sums = _new(batch, -(-length // SEGMENT), 2, channels)

    def work(entry: int, first: int, last: int) -> None:
        gated_backward(
            _spot(rows, entry),
            4 * rows.stride(1),
            _spot(gates, entry),
            4 * gates.stride(1),
            _spot(grad, entry),
            4 * grad.stride(1),
            _spot(dy, entry),
            _spot(dz, entry),
            address(factor),
            address(offset),
            channels,
            channels // parts,
            eps,
            first,
            last,
            _spot(sums, entry),
        )

    _for_blocks(batch, length, channels, work)
    total = _new(2, channels)
    sum_rows(address(sums), sums.shape[0] * sums.shape[1], 2 * channels, address(total))
    # clones: an operator's results must not share memory
    dweight, dbias = (part.to(like.dtype, copy=True) for part, like in zip(total, (weight, bias), strict=True))
    return dy.to(y.dtype), dz.to(z.dtype), dweight, dbias


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """One number per group (Bt, G) as one per channel (Bt, C)."""
    return x.repeat_interleave(channels // x.shape[1], 1)


def group_moments_of(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / deviation) of the groups of contiguous float32 rows (Bt, *S, C), (Bt, G) each."""
    batch, channels, voxels = rows.shape[0], rows.shape[-1], rows.shape[1:-1].numel()
    moments = _new(batch, -(-voxels // SEGMENT), 2, channels)
    mean, inverse = _new(batch, groups), _new(batch, groups)

    def measure(entry: int, first: int, last: int) -> None:
        group_moments(_spot(rows, entry), channels, first, last, _spot(moments, entry))

    def join(entry: int, worker: int) -> None:
        join_moments(_spot(moments, entry), voxels, channels, groups, eps, _spot(mean, entry), _spot(inverse, entry))

    _for_blocks(batch, voxels, channels, measure)
    parallel_for(join, batch)
    return mean, inverse


def group_statistics(
    rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `group_forward` needs to normalise contiguous float32 rows: (mean (Bt, C), scale (Bt, C), shift (C))."""
    channels = rows.shape[-1]
    mean, inverse = group_moments_of(rows, groups, eps)
    return _by_channel(mean, channels), _by_channel(inverse, channels) * weight.float(), _vector(bias)


def group_norm_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(GroupNorm(x)) in x's dtype, and the groups' (mean, 1 / deviation), (Bt, G) each."""
    batch, channels = x.shape[0], x.shape[-1]
    rows, offset, out = _vector(x), _vector(bias), _new(*x.shape)
    mean, inverse = group_moments_of(rows, groups, eps)
    middle, factor = _by_channel(mean, channels), _by_channel(inverse, channels) * weight.float()

    def apply(entry: int, first: int, last: int) -> None:
        group_forward(
            _spot(rows, entry),
            _spot(out, entry),
            _spot(middle, entry),
            _spot(factor, entry),
            address(offset),
            channels,
            first,
            last,
        )

    _for_blocks(batch, x.shape[1:-1].numel(), channels, apply)
    return out.to(x.dtype), mean, inverse


def group_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias)."""
    batch, channels, groups = x.shape[0], x.shape[-1], mean.shape[1]
    voxels = x.shape[1:-1].numel()
    rows, grad, offset, dx = _vector(x), _vector(grad_out), _vector(bias), _new(*x.shape)
    middle, spread = _by_channel(mean, channels), _by_channel(inverse, channels)
    factor = spread * weight.float()
    segments = -(-voxels // SEGMENT)
    sums, totals = _new(batch, segments, 2, channels), _new(batch, 2, channels)

    def measure(entry: int, first: int, last: int) -> None:
        group_sums(
            _spot(rows, entry),
            _spot(grad, entry),
            _spot(middle, entry),
            _spot(spread, entry),
            _spot(factor, entry),
            address(offset),
            channels,
            first,
            last,
            _spot(sums, entry),
        )

    def join(entry: int, worker: int) -> None:
        sum_rows(_spot(sums, entry), segments, 2 * channels, _spot(totals, entry))

    _for_blocks(batch, voxels, channels, measure)
    parallel_for(join, batch)
    dweight, dbias = totals.double().unbind(1)
    numbers = voxels * channels // groups
    scaled = (totals.double() * weight.double()).unflatten(-1, (groups, -1)).sum(-1) * inverse.double()[:, None]
    slope, constant = (-scaled / numbers).unbind(1)
    along = _by_channel((slope * inverse.double()).float(), channels)
    common = _by_channel(constant.float(), channels)

    def apply(entry: int, first: int, last: int) -> None:
        group_backward(
            _spot(rows, entry),
            _spot(grad, entry),
            _spot(dx, entry),
            _spot(middle, entry),
            _spot(factor, entry),
            address(offset),
            _spot(along, entry),
            _spot(common, entry),
            channels,
            first,
            last,
        )

    _for_blocks(batch, voxels, channels, apply)
    return dx.to(x.dtype), dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
