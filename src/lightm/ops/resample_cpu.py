"""Pooling and interpolation on the CPU: kernels spread over images and rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.planes import for_rows, image_bytes, plane_sizes
from lightm.ops.resample_kernels import double_backward, double_forward, pool_backward_kernel, pool_kernel
from lightm.ops.threads import parallel_for


def halved(x: Tensor) -> tuple[int, ...]:
    """The shape of x (Bt, *spatial, C) pooled by 2."""
    return (x.shape[0], *(size // 2 for size in x.shape[1:-1]), x.shape[-1])


def doubled(x: Tensor) -> tuple[int, ...]:
    """The shape of x (Bt, *spatial, C) with every axis doubled."""
    return (x.shape[0], *(size * 2 for size in x.shape[1:-1]), x.shape[-1])


def pool_forward(x: Tensor, kind: str) -> Tensor:
    """Pool x by 2, in its dtype."""
    rows = x.float().contiguous()
    out = torch.empty(halved(x))
    run = pool_kernel(kind, x.dim() - 2)
    height, width = x.shape[-3:-1]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, to = address(rows) + entry * image_bytes(x), address(out) + entry * image_bytes(out)
        run(of, to, z, first, last, height, width, x.shape[-1])

    if out.numel():
        for_rows(out, work)
    return out.to(x.dtype)


def pool_into(kind: str, x: Tensor, out: Tensor) -> None:
    """Pool one contiguous float32 image (*S, C) of even sizes by "max", "avg" or "add", their sum, into `out`."""
    axes = x.dim() - 1
    run = pool_kernel(kind, axes)
    height, width, channels = x.shape[-3:]
    planes, rows = (out.shape[0] if axes == 3 else 1), out.shape[-3]
    block = 8
    blocks = -(-rows // block)

    def work(item: int, worker: int) -> None:
        z, part = divmod(item, blocks)
        last = min((part + 1) * block, rows)
        run(address(x), address(out), z, part * block, last, height, width, channels)

    parallel_for(work, planes * blocks)


def pool_backward(grad_y: Tensor, x: Tensor, kind: str) -> Tensor:
    """Gradient of x."""
    rows, grad = x.float().contiguous(), grad_y.float().contiguous()
    covered = all(size % 2 == 0 for size in x.shape[1:-1])
    dx = torch.empty(x.shape) if covered else torch.zeros(x.shape)
    run = pool_backward_kernel(kind, x.dim() - 2)
    height, width = x.shape[-3:-1]

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        at = entry * image_bytes(x)
        of = address(grad) + entry * image_bytes(grad)
        run(address(rows) + at, of, address(dx) + at, z, first, last, height, width, x.shape[-1])

    if grad.numel():
        for_rows(grad, work)
    return dx.to(x.dtype)


def upsample_forward(x: Tensor) -> Tensor:
    """Double x by linear interpolation, in its dtype."""
    rows = x.float().contiguous()
    out = torch.empty(doubled(x))
    sizes = plane_sizes(x)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, to = address(rows) + entry * image_bytes(x), address(out) + entry * image_bytes(out)
        double_forward(of, to, x.dim() - 2, z, first, last, *sizes, x.shape[-1])

    if out.numel():
        for_rows(out, work)
    return out.to(x.dtype)


def upsample_backward(grad_y: Tensor) -> Tensor:
    """Gradient of the tensor before doubling."""
    grad = grad_y.float().contiguous()
    dx = torch.empty(halved(grad))
    sizes = plane_sizes(dx)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        of, to = address(grad) + entry * image_bytes(grad), address(dx) + entry * image_bytes(dx)
        double_backward(of, to, dx.dim() - 2, z, first, last, *sizes, dx.shape[-1])

    if dx.numel():
        for_rows(dx, work)
    return dx.to(grad_y.dtype)
