"""The decoder's stages and the head on the CPU: kernels on a few planes at a time, which stay in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.depthwise_cpu import input_gradient, to_tiles, weight_gradient
from lightm.ops.depthwise_cpu import run_forward as depthwise_forward
from lightm.ops.depthwise_kernels import forward_kernel
from lightm.ops.jit import LANES, kernel
from lightm.ops.linear_cpu import run_matmul, run_weight_gradient
from lightm.ops.matmul_kernels import SCRATCH, Packed, matmul_kernel
from lightm.ops.memory import release_unused
from lightm.ops.norms import GroupNormParameters
from lightm.ops.norms_cpu import group_moments_of, group_norm_backward, group_norm_forward, group_statistics
from lightm.ops.norms_kernels import group_forward
from lightm.ops.planes import plane_sizes
from lightm.ops.resample_cpu import upsample_backward
from lightm.ops.resample_kernels import double_forward
from lightm.ops.threads import parallel_for, worker_count
from lightm.ops.vector import fma
from lightm.ops.vector_parts import get, put

_SLAB = 1 << 19  # numbers of a slab without the planes beside it
_FLAT = 1 << 16  # numbers of a work item that needs no neighbours


@kernel(
    lambda out, x, scale, channels, rows: {
        "out": (0, 4 * channels * rows),
        "x": (0, 4 * channels * rows),
        "scale": (0, 4 * channels),
    }
)
def _add_scaled(out, x, scale, channels, rows):  # type: ignore[no-untyped-def]
    """out += scale * x for `rows` rows; scale is of channels."""
    for t in range(rows):
        for c in range(0, channels, LANES):
            at, left = 4 * (t * channels + c), channels - c
            put(out + at, fma(get(scale + 4 * c, left), get(x + at, left), get(out + at, left)), left)


@kernel(lambda out, x, count: {"out": (0, 4 * count), "x": (0, 4 * count)})
def _add(out, x, count):  # type: ignore[no-untyped-def]
    """out += x for `count` numbers."""
    for i in range(0, count, LANES):
        put(out + 4 * i, get(out + 4 * i, count - i) + get(x + 4 * i, count - i), count - i)


class _Slices:
    """An image (*S, C) as slices across its first axis: planes in 3D, rows in 2D."""

    def __init__(self, x: Tensor) -> None:
        self.number, self.channels = x.shape[1], x.shape[-1]
        self.voxels = x[0, 0, ..., 0].numel()
        self.numbers = self.voxels * self.channels
        self.slab = max(1, min(self.number, _SLAB // self.numbers))
        self.bytes = 4 * self.numbers

    def run(self, batch: int, work: Callable[[int, int, int, int], None]) -> None:
        """work(entry, first slice, last + 1, worker) for slabs of all images."""
        slabs = -(-self.number // self.slab)

        def item(index: int, worker: int) -> None:
            entry, part = divmod(index, slabs)
            work(entry, part * self.slab, min((part + 1) * self.slab, self.number), worker)

        parallel_for(item, batch * slabs)


def _address(x: Tensor, entry: int) -> int:
    return address(x) + 4 * entry * x.stride(0)


def _upsampled(low: Tensor, skip: Tensor, overwrite: bool) -> Tensor:
    """upsample(low) + skip, in the skip's memory if allowed."""
    x = skip if overwrite and skip.is_contiguous() else skip.clone(memory_format=torch.contiguous_format)
    low = low.contiguous()
    depth, height, width = plane_sizes(low)
    channels, axes = x.shape[-1], x.dim() - 2
    of = _Slices(x)
    of.slab = 1 if axes == 3 else max(1, min(of.number, _FLAT // of.numbers))
    buffers = torch.empty((worker_count(x.shape[0] * of.number), of.slab * of.numbers))

    def work(entry: int, first: int, last: int, worker: int) -> None:
        buffer = address(buffers[worker])
        # the kernel writes slice `first` of an image that begins that much before the buffer
        to, z, rows = buffer - first * of.bytes, 0, (first, last)
        if axes == 3:
            z, rows = first, (0, x.shape[2])
        double_forward(_address(low, entry), to, axes, z, *rows, depth, height, width, channels)
        _add(_address(x, entry) + first * of.bytes, buffer, (last - first) * of.numbers)

    of.run(x.shape[0], work)
    return x


def run_stage(
    low: Tensor,
    skip: Tensor,
    norm1: GroupNormParameters,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor,
    norm2: GroupNormParameters,
    overwrite_skip: bool,
) -> Tensor:
    """See `decoder_stage`."""
    x = _upsampled(low, skip, overwrite_skip)
    y = torch.empty_like(x)
    of, axes, batch = _Slices(x), x.dim() - 2, x.shape[0]
    mean, factor, offset = group_statistics(x, norm1.groups, norm1.weight, norm1.bias, norm1.eps)
    weights = to_tiles(depthwise.reshape(-1, of.channels))
    packed = Packed(pointwise.t())
    each = scale.expand(of.channels).contiguous()
    zeros = torch.zeros(x.shape[-2] * of.channels)
    convolve = forward_kernel(axes)
    workers = worker_count(batch * -(-of.number // of.slab))
    normed = torch.empty((workers, (of.slab + 2) * of.numbers))
    filtered = torch.empty((workers, (of.slab + 2) * of.numbers))
    scratch = torch.empty((workers, SCRATCH // 4))
    row = 4 * of.channels

    def work(entry: int, first: int, last: int, worker: int) -> None:
        low_edge, high_edge = max(first - 1, 0), min(last + 1, of.number)
        around, inside = high_edge - low_edge, (first - low_edge, last - low_edge)
        at = _address(x, entry)
        group_forward(
            at + low_edge * of.bytes, address(normed[worker]), _address(mean, entry), _address(factor, entry),
            address(offset), of.channels, 0, around * of.voxels,
        )  # fmt: skip
        source = (address(normed[worker]), address(filtered[worker]), address(weights), address(zeros))
        if axes == 3:
            for z in range(*inside):
                convolve(*source, z, 0, x.shape[2], around, x.shape[2], x.shape[3], of.channels)
        else:
            convolve(*source, 0, *inside, 1, around, x.shape[2], of.channels)
        rows = (last - first) * of.voxels
        to = _address(y, entry) + first * of.bytes
        plan, blocks, weight, zero = packed.arguments
        matmul_kernel(
            plan, blocks, source[1] + inside[0] * of.bytes, row, weight, zero, to, row, rows, address(scratch[worker])
        )  # fmt: skip
        _add_scaled(to, at + first * of.bytes, address(each), of.channels, rows)

    of.run(batch, work)
    mean2, factor2, offset2 = group_statistics(y, norm2.groups, norm2.weight, norm2.bias, norm2.eps)
    _flat(y, lambda entry, at, first, last, worker: group_forward(
        at, at, _address(mean2, entry), _address(factor2, entry), address(offset2), of.channels, first, last
    ))  # fmt: skip
    return y


def run_stage_backward(
    grad: Tensor,
    low: Tensor,
    skip: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    groups1: int,
    eps1: float,
    groups2: int,
    eps2: float,
) -> tuple[Tensor, ...]:
    """Gradients of the nine tensors; what is large is let go at once, and two of them are computed twice for it."""
    release_unused()
    x = _upsampled(low, skip, False)
    normed, mean1, inverse1 = group_norm_forward(x, groups1, weight1, bias1, eps1)
    filtered = depthwise_forward(normed, depthwise)
    del normed
    y = run_matmul(filtered, pointwise, None)
    del filtered
    channels, rows = x.shape[-1], x[..., 0].numel()
    each = scale.expand(channels).contiguous()
    _add_scaled_everywhere(y, x, each)
    mean2, inverse2 = group_moments_of(y, groups2, eps2)
    dy, dweight2, dbias2 = group_norm_backward(grad, y, weight2, bias2, mean2, inverse2)
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
    dx, dweight1, dbias1 = group_norm_backward(dnormed, x, weight1, bias1, mean1, inverse1)
    del dnormed, x
    _add_scaled_everywhere(dx, dy, each)
    return upsample_backward(dx), dx, dweight1, dbias1, ddepthwise, dpointwise, dscale, dweight2, dbias2


def _add_scaled_everywhere(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """out += scale * x for contiguous tensors (..., C)."""
    channels = out.shape[-1]

    def work(entry: int, at: int, first: int, last: int, worker: int) -> None:
        start = 4 * channels * first
        _add_scaled(at + start, _address(x, entry) + start, address(scale), channels, last - first)

    _flat(out, work)


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b over the rows, for every column; in segments, so that a * b is never whole."""
    return torch.stack([(x * y).sum(0) for x, y in zip(a.split(_FLAT), b.split(_FLAT), strict=True)]).sum(0)


def _flat(x: Tensor, work: Callable[[int, int, int, int, int], None]) -> None:
    """work(entry, address of the image, first voxel, last + 1, worker) for chunks of all images."""
    voxels = x.shape[1:-1].numel()
    size = max(1, _FLAT // x.shape[-1])
    chunks = -(-voxels // size)

    def item(index: int, worker: int) -> None:
        entry, part = divmod(index, chunks)
        work(entry, _address(x, entry), part * size, min((part + 1) * size, voxels), worker)

    parallel_for(item, x.shape[0] * chunks)


def run_head(
    x: Tensor, norm: GroupNormParameters, scale: Tensor, offset: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """See `decoder_head`; scale and offset are folded into the matmul."""
    x = x.contiguous()
    channels = x.shape[-1]
    packed = Packed((weight * scale).t(), weight @ offset + bias)
    mean, factor, shift = group_statistics(x, norm.groups, norm.weight, norm.bias, norm.eps)
    out = torch.empty((*x.shape[:-1], packed.columns))
    size = max(1, _FLAT // channels)
    workers = worker_count(x.shape[:-1].numel() // size + x.shape[0])
    normed, scratch = torch.empty((workers, size * channels)), torch.empty((workers, SCRATCH // 4))
    plan, blocks, weights, shifts = packed.arguments

    def work(entry: int, at: int, first: int, last: int, worker: int) -> None:
        of = address(normed[worker])
        group_forward(
            at + 4 * channels * first, of, _address(mean, entry), _address(factor, entry), address(shift), channels,
            0, last - first,
        )  # fmt: skip
        matmul_kernel(
            plan, blocks, of, 4 * channels, weights, shifts, _address(out, entry) + 4 * packed.columns * first,
            4 * packed.columns, last - first, address(scratch[worker]),
        )  # fmt: skip

    _flat(x, work)
    return out


def run_head_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, the norm's weight and bias, scale, offset, weight and bias."""
    release_unused()
    x = x.contiguous()
    normed, mean, inverse = group_norm_forward(x, groups, norm_weight, norm_bias, eps)
    dfolded = run_weight_gradient(grad, normed)[0]  # of weight * scale
    del normed
    total = grad.flatten(0, -2).sum(0)
    dnormed = run_matmul(grad, (weight * scale).t(), None)
    dx, dnorm_weight, dnorm_bias = group_norm_backward(dnormed, x, norm_weight, norm_bias, mean, inverse)
    dweight = dfolded * scale + torch.outer(total, offset)
    return dx, dnorm_weight, dnorm_bias, (dfolded * weight).sum(0), total @ weight, dweight, total
