"""The decoder's stages and the head on the CPU: kernels on a few planes at a time, which stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightm.ops.bounds import address, each, entry_address
from lightm.ops.depthwise_cpu import forward_kernel, input_gradient, to_tiles, weight_gradient
from lightm.ops.depthwise_cpu import run_forward as depthwise_forward
from lightm.ops.jit import LANES, kernel
from lightm.ops.matmul_cpu import SCRATCH, Packed, matmul_kernel, run_matmul, run_weight_gradient
from lightm.ops.memory import release_unused
from lightm.ops.norms_cpu import group_moments_of, group_norm_backward, group_norm_forward, group_statistics
from lightm.ops.norms_kernels import group_forward
from lightm.ops.resample_cpu import double_forward, upsample_backward
from lightm.ops.threads import for_blocks, plane_sizes, worker_count
from lightm.ops.vector import fma, get, put

_SLAB = 1 << 19  # numbers of a slab of slices (planes in 3D, rows in 2D) without those beside it
_FLAT = 1 << 16  # numbers of a work item that needs no neighbours


@kernel(lambda channels, rows: {**each((0, 4 * channels * rows), "out", "x"), "scale": (0, 4 * channels)})
def _add_scaled(out, x, scale, channels, rows):  # type: ignore[no-untyped-def]
    """out += scale * x for `rows` rows; scale is of channels."""
    for t in range(rows):
        for c in range(0, channels, LANES):
            at, left = 4 * (t * channels + c), channels - c
            put(out + at, fma(get(scale + 4 * c, left), get(x + at, left), get(out + at, left)), left)


@kernel(lambda count: each((0, 4 * count), "out", "x"))
def _add(out, x, count):  # type: ignore[no-untyped-def]
    """out += x for `count` numbers."""
    for i in range(0, count, LANES):
        put(out + 4 * i, get(out + 4 * i, count - i) + get(x + 4 * i, count - i), count - i)


def _upsampled(low: Tensor, skip: Tensor, overwrite: bool) -> Tensor:
    """upsample(low) + skip, in the skip's memory if allowed."""
    x = skip if overwrite and skip.is_contiguous() else skip.clone(memory_format=torch.contiguous_format)
    low = low.contiguous()
    depth, height, width = plane_sizes(low)
    (batch, slices, *_, channels), axes, numbers = x.shape, x.dim() - 2, x[0, 0].numel()
    slab = 1 if axes == 3 else max(1, min(slices, _FLAT // numbers))
    buffers = torch.empty((worker_count(batch * slices), slab * numbers))

    def work(entry: int, first: int, last: int, worker: int) -> None:
        buffer = address(buffers[worker])
        # the kernel writes slice `first` of an image that begins that much before the buffer
        to, z, rows = buffer - 4 * first * numbers, 0, (first, last)
        if axes == 3:
            z, rows = first, (0, x.shape[2])
        double_forward(entry_address(low, entry), to, axes, z, *rows, depth, height, width, channels)
        _add(entry_address(x, entry) + 4 * first * numbers, buffer, (last - first) * numbers)

    for_blocks(batch, slices, slab, work)
    return x


def run_stage(
    tensors: Sequence[Tensor], groups1: int, eps1: float, groups2: int, eps2: float, overwrite_skip: bool = False
) -> Tensor:
    """See `decoder_stage`."""
    low, skip, weight1, bias1, depthwise, pointwise, scale, weight2, bias2 = tensors
    x = _upsampled(low, skip, overwrite_skip)
    y = torch.empty_like(x)
    (batch, slices, *_, width, channels), axes = x.shape, x.dim() - 2
    numbers = x[0, 0].numel()
    voxels, size = numbers // channels, 4 * numbers
    slab = max(1, min(slices, _SLAB // numbers))
    mean, factor, offset = group_statistics(x, groups1, weight1, bias1, eps1)
    weights = to_tiles(depthwise.reshape(-1, channels))
    packed = Packed(pointwise.t())
    each_scale = scale.expand(channels).contiguous()
    zeros = torch.zeros(width * channels)
    convolve = forward_kernel(axes)
    workers = worker_count(batch * -(-slices // slab))
    normed, filtered = (torch.empty((workers, (slab + 2) * numbers)) for _ in range(2))
    scratch = torch.empty((workers, SCRATCH // 4))
    row = 4 * channels

    def work(entry: int, first: int, last: int, worker: int) -> None:
        low_edge, high_edge = max(first - 1, 0), min(last + 1, slices)
        around, inside = high_edge - low_edge, (first - low_edge, last - low_edge)
        at, to = entry_address(x, entry), entry_address(y, entry) + first * size
        group_forward(
            at + low_edge * size, address(normed[worker]), entry_address(mean, entry), entry_address(factor, entry),
            address(offset), channels, 0, around * voxels,
        )  # fmt: skip
        source = (address(normed[worker]), address(filtered[worker]), address(weights), address(zeros))
        if axes == 3:
            for z in range(*inside):
                convolve(*source, z, 0, x.shape[2], around, x.shape[2], width, channels)
        else:
            convolve(*source, 0, *inside, 1, around, width, channels)
        rows = (last - first) * voxels
        plan, blocks, weight, zero = packed.arguments
        matmul_kernel(
            plan, blocks, source[1] + inside[0] * size, row, weight, zero, to, row, rows, address(scratch[worker])
        )  # fmt: skip
        _add_scaled(to, at + first * size, address(each_scale), channels, rows)

    for_blocks(batch, slices, slab, work)
    mean2, factor2, offset2 = group_statistics(y, groups2, weight2, bias2, eps2)

    def end(entry: int, first: int, last: int, worker: int) -> None:
        at, statistics = entry_address(y, entry), (entry_address(mean2, entry), entry_address(factor2, entry))
        group_forward(at, at, *statistics, address(offset2), channels, first, last)

    _flat(y, end)
    return y


def run_stage_backward(
    grad: Tensor, tensors: Sequence[Tensor], groups1: int, eps1: float, groups2: int, eps2: float
) -> tuple[Tensor, ...]:
    """Gradients of the nine tensors; what is large is let go at once, and two of them are computed twice for it."""
    low, skip, weight1, bias1, depthwise, pointwise, scale, weight2, bias2 = tensors
    release_unused()
    x = _upsampled(low, skip, False)
    normed, mean1, inverse1 = group_norm_forward(x, groups1, weight1, bias1, eps1)
    filtered = depthwise_forward(normed, depthwise)
    del normed
    y = run_matmul(filtered, pointwise, None)
    del filtered
    channels, rows = x.shape[-1], x[..., 0].numel()
    each_scale = scale.expand(channels).contiguous()
    _add_scaled_everywhere(y, x, each_scale)
    mean2, inverse2 = group_moments_of(y, groups2, eps2)
    dy, dweight2, dbias2 = group_norm_backward(grad, y, groups2, weight2, bias2, eps2, mean2, inverse2)
    del y
    dscale = _column_dots(dy.view(rows, channels), x.view(rows, channels))
    dscale = dscale.sum().view(scale.shape) if scale.numel() == 1 else dscale
    normed = group_norm_forward(x, groups1, weight1, bias1, eps1)[0]
    filtered = depthwise_forward(normed, depthwise)
    dpointwise = run_weight_gradient(dy, filtered)[0]
    del filtered
    dfiltered = run_matmul(dy, pointwise.t(), None)
    ddepthwise = weight_gradient(dfiltered, normed, depthwise)
    del normed
    dnormed = input_gradient(dfiltered, depthwise)
    del dfiltered
    dx, dweight1, dbias1 = group_norm_backward(dnormed, x, groups1, weight1, bias1, eps1, mean1, inverse1)
    del dnormed, x
    _add_scaled_everywhere(dx, dy, each_scale)
    return upsample_backward(dx), dx, dweight1, dbias1, ddepthwise, dpointwise, dscale, dweight2, dbias2


def _add_scaled_everywhere(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out += scale * x for contiguous tensors (..., C)."""
    channels = out.shape[-1]

    def work(entry: int, first: int, last: int, worker: int) -> None:
        start = 4 * channels * first
        to, of = entry_address(out, entry) + start, entry_address(x, entry) + start
        _add_scaled(to, of, address(scale), channels, last - first)

    _flat(out, work)


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over the rows, for every column; in segments, so that a * b is never whole."""
    return torch.stack([(x * y).sum(0) for x, y in zip(a.split(_FLAT), b.split(_FLAT), strict=True)]).sum(0)


def _flat(x: Tensor, work: Callable[[int, int, int, int], None]) -> None:
    """work(entry, first voxel, last + 1, worker) for chunks of all images."""
    for_blocks(x.shape[0], x.shape[1:-1].numel(), max(1, _FLAT // x.shape[-1]), work)


def run_head(tensors: Sequence[Tensor], groups: int, eps: float) -> Tensor:
    """See `decoder_head`; scale and offset are folded into the matmul."""
    x, norm_weight, norm_bias, scale, offset, weight, bias = tensors
    x = x.contiguous()
    channels = x.shape[-1]
    packed = Packed((weight * scale).t(), weight @ offset + bias)
    mean, factor, shift = group_statistics(x, groups, norm_weight, norm_bias, eps)
    out = torch.empty((*x.shape[:-1], packed.columns))
    size = max(1, _FLAT // channels)
    workers = worker_count(x.shape[:-1].numel() // size + x.shape[0])
    normed, scratch = torch.empty((workers, size * channels)), torch.empty((workers, SCRATCH // 4))
    (plan, blocks, weights, shifts), row, row_out = packed.arguments, 4 * channels, 4 * packed.columns

    def work(entry: int, first: int, last: int, worker: int) -> None:
        of, count = address(normed[worker]), last - first
        group_forward(
            entry_address(x, entry) + row * first, of, entry_address(mean, entry), entry_address(factor, entry),
            address(shift), channels, 0, count,
        )  # fmt: skip
        to = entry_address(out, entry) + row_out * first
        matmul_kernel(plan, blocks, of, row, weights, shifts, to, row_out, count, address(scratch[worker]))

    _flat(x, work)
    return out


def run_head_backward(grad: Tensor, tensors: Sequence[Tensor], groups: int, eps: float) -> tuple[Tensor, ...]:
    """Gradients of x, the norm's weight and bias, scale, offset, weight and bias."""
    x, norm_weight, norm_bias, scale, offset, weight, _ = tensors
    release_unused()
    x = x.contiguous()
    normed, mean, inverse = group_norm_forward(x, groups, norm_weight, norm_bias, eps)
    dfolded = run_weight_gradient(grad, normed)[0]  # of weight * scale
    del normed
    total = grad.flatten(0, -2).sum(0)
    dnormed = run_matmul(grad, (weight * scale).t(), None)
    dx, dnorm_weight, dnorm_bias = group_norm_backward(dnormed, x, groups, norm_weight, norm_bias, eps, mean, inverse)
    dweight = dfolded * scale + torch.outer(total, offset)
    return dx, dnorm_weight, dnorm_bias, (dfolded * weight).sum(0), total @ weight, dweight, total
