"""The fused norms on the CPU: kernels spread over batch entries and blocks of tokens or voxels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops import norms_kernels as kernels
from lightm.ops.bounds import address, entry_address, strided_address, token_rows
from lightm.ops.norms_kernels import SEGMENT
from lightm.ops.threads import for_blocks, parallel_for

_BLOCK = 1 << 16  # numbers of one work item; fixed, so that sums do not depend on the number of threads


def _block(channels: int) -> int:
    """Tokens of one work item, a multiple of SEGMENT."""
    return max(1, _BLOCK // (SEGMENT * channels)) * SEGMENT


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> Tensor:
    """The normalized, gated tokens (Bt, L, E) in y's dtype."""
    batch, length, channels = y.shape
    rows, gates, factor, offset, out = (
        token_rows(y),
        token_rows(z),
        _vector(weight),
        _vector(bias),
        torch.empty(y.shape),
    )

    (y_at, y_entry, y_step), (z_at, z_entry, z_step) = strided_address(rows), strided_address(gates)

    def work(entry: int, first: int, last: int, worker: int) -> None:
        kernels.gated_forward(
            y_at + entry * y_entry, y_step, z_at + entry * z_entry, z_step, entry_address(out, entry), address(factor),
            address(offset), channels, channels // parts, eps, first, last,
        )  # fmt: skip

    for_blocks(batch, length, _block(channels), work)
    return out.to(y.dtype)


def gated_norm_backward(
    grad_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (y, z, weight, bias)."""
    batch, length, channels = y.shape
    rows, gates, grad, factor, offset = (
        token_rows(y),
        token_rows(z),
        token_rows(grad_out),
        _vector(weight),
        _vector(bias),
    )
    dy, dz = torch.empty(y.shape), torch.empty(y.shape)
    sums = torch.empty(batch, -(-length // SEGMENT), 2, channels)
    (y_at, y_entry, y_step), (z_at, z_entry, z_step) = strided_address(rows), strided_address(gates)
    g_at, g_entry, g_step = strided_address(grad)

    def work(entry: int, first: int, last: int, worker: int) -> None:
        kernels.gated_backward(
            y_at + entry * y_entry, y_step, z_at + entry * z_entry, z_step, g_at + entry * g_entry, g_step,
            entry_address(dy, entry), entry_address(dz, entry), address(factor), address(offset), channels,
            channels // parts, eps, first, last, entry_address(sums, entry),
        )  # fmt: skip

    for_blocks(batch, length, _block(channels), work)
    total = torch.empty(2, channels)
    kernels.sum_rows(address(sums), sums.shape[0] * sums.shape[1], 2 * channels, address(total))
    # clones: an operator's results must not share memory
    dweight, dbias = (part.to(like.dtype, copy=True) for part, like in zip(total, (weight, bias), strict=True))
    return dy.to(y.dtype), dz.to(z.dtype), dweight, dbias


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """One number per group (Bt, G) as one per channel (Bt, C)."""
    return x.repeat_interleave(channels // x.shape[1], 1)


def group_moments_of(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / deviation) of the groups of contiguous float32 rows (Bt, *S, C), (Bt, G) each."""
    batch, channels, voxels = rows.shape[0], rows.shape[-1], rows.shape[1:-1].numel()
    moments = torch.empty(batch, -(-voxels // SEGMENT), 2, channels)
    mean, inverse = torch.empty(batch, groups), torch.empty(batch, groups)

    def measure(entry: int, first: int, last: int, worker: int) -> None:
        kernels.group_moments(entry_address(rows, entry), channels, first, last, entry_address(moments, entry))

    def join(entry: int, worker: int) -> None:
        of, to = entry_address(moments, entry), (entry_address(mean, entry), entry_address(inverse, entry))
        kernels.join_moments(of, voxels, channels, groups, eps, *to)

    for_blocks(batch, voxels, _block(channels), measure)
    parallel_for(join, batch)
    return mean, inverse


def group_statistics(
    rows: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `group_forward` needs to normalize contiguous float32 rows: (mean (Bt, C), scale (Bt, C), shift (C))."""
    channels = rows.shape[-1]
    mean, inverse = group_moments_of(rows, groups, eps)
    return _by_channel(mean, channels), _by_channel(inverse, channels) * weight.float(), _vector(bias)


def group_norm_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(GroupNorm(x)) in x's dtype, and the groups' (mean, 1 / deviation), (Bt, G) each."""
    batch, channels = x.shape[0], x.shape[-1]
    rows, offset, out = _vector(x), _vector(bias), torch.empty(x.shape)
    mean, inverse = group_moments_of(rows, groups, eps)
    middle, factor = _by_channel(mean, channels), _by_channel(inverse, channels) * weight.float()

    def apply(entry: int, first: int, last: int, worker: int) -> None:
        kernels.group_forward(
            entry_address(rows, entry), entry_address(out, entry), entry_address(middle, entry),
            entry_address(factor, entry), address(offset), channels, first, last,
        )  # fmt: skip

    for_blocks(batch, x.shape[1:-1].numel(), _block(channels), apply)
    return out.to(x.dtype), mean, inverse


def group_norm_backward(
    grad_out: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias)."""
    batch, channels, voxels = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    rows, grad, offset, dx = _vector(x), _vector(grad_out), _vector(bias), torch.empty(x.shape)
    middle, spread = _by_channel(mean, channels), _by_channel(inverse, channels)
    factor = spread * weight.float()
    segments = -(-voxels // SEGMENT)
    sums, totals = torch.empty(batch, segments, 2, channels), torch.empty(batch, 2, channels)

    def measure(entry: int, first: int, last: int, worker: int) -> None:
        kernels.group_sums(
            entry_address(rows, entry), entry_address(grad, entry), entry_address(middle, entry),
            entry_address(spread, entry), entry_address(factor, entry), address(offset), channels, first, last,
            entry_address(sums, entry),
        )  # fmt: skip

    def join(entry: int, worker: int) -> None:
        kernels.sum_rows(entry_address(sums, entry), segments, 2 * channels, entry_address(totals, entry))

    for_blocks(batch, voxels, _block(channels), measure)
    parallel_for(join, batch)
    dweight, dbias = totals.double().unbind(1)
    numbers = voxels * channels // groups
    scaled = (totals.double() * weight.double()).unflatten(-1, (groups, -1)).sum(-1) * inverse.double()[:, None]
    slope, constant = (-scaled / numbers).unbind(1)
    along = _by_channel((slope * inverse.double()).float(), channels)
    common = _by_channel(constant.float(), channels)

    def apply(entry: int, first: int, last: int, worker: int) -> None:
        kernels.group_backward(
            entry_address(rows, entry), entry_address(grad, entry), entry_address(dx, entry),
            entry_address(middle, entry), entry_address(factor, entry), address(offset), entry_address(along, entry),
            entry_address(common, entry), channels, first, last,
        )  # fmt: skip

    for_blocks(batch, voxels, _block(channels), apply)
    return dx.to(x.dtype), dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
