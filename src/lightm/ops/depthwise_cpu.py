"""The depthwise convolution on the CPU: kernels spread over images and planes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightm.ops.bounds import address
from lightm.ops.depthwise_kernels import forward_kernel, weight_kernel
from lightm.ops.jit import LANES
from lightm.ops.planes import for_rows, image_bytes, plane_sizes, row_chunks


def to_tiles(weight: Tensor) -> Tensor:
    """Weights (kernel elements, C) in the kernels' order, flat."""
    elements, channels = weight.shape
    whole = channels - channels % LANES
    tiles = weight[:, :whole].reshape(elements, -1, LANES).transpose(0, 1)
    return torch.cat((tiles.reshape(-1), weight[:, whole:].t().reshape(-1)))


def from_tiles(flat: Tensor, elements: int) -> Tensor:
    """Undo `to_tiles`: (kernel elements, C)."""
    channels = flat.numel() // elements
    whole = channels - channels % LANES
    tiles = flat[: whole * elements].reshape(-1, elements, LANES).transpose(0, 1).reshape(elements, whole)
    return torch.cat((tiles, flat[whole * elements :].reshape(-1, elements).t()), dim=1)


def run_forward(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x (Bt, *spatial, C) with weight (3,)*d + (C,), in x's dtype."""
    out = torch.empty(x.shape)
    if not x.numel():
        return out.to(x.dtype)
    rows, sizes, channels = x.float().contiguous(), plane_sizes(x), x.shape[-1]
    tiles = to_tiles(weight.float().reshape(-1, channels))
    zeros = torch.zeros(sizes[2] * channels)
    run = forward_kernel(x.dim() - 2)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        at = entry * image_bytes(x)
        of, to = address(rows) + at, address(out) + at
        run(of, to, address(tiles), address(zeros), z, first, last, *sizes, channels)

    for_rows(x, work)
    return out.to(x.dtype)


def run_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (x, weight)."""
    return input_gradient(grad_y, weight).to(x.dtype), weight_gradient(grad_y, x, weight)


def input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x."""
    return run_forward(grad_y, weight.flip(tuple(range(weight.dim() - 1))))


def weight_gradient(grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient."""
    axes = x.dim() - 2
    if not x.numel():
        return torch.zeros_like(weight)
    rows, grad = x.float().contiguous(), grad_y.float().contiguous()
    sizes, channels, elements = plane_sizes(x), x.shape[-1], 3**axes
    zeros = torch.zeros(sizes[2] * channels)
    shares = torch.zeros((row_chunks(x), elements * channels))
    run = weight_kernel(axes)

    def work(chunk: int, entry: int, z: int, first: int, last: int) -> None:
        at = entry * image_bytes(x)
        of, to = address(rows) + at, address(shares[chunk])
        run(of, address(grad) + at, to, address(zeros), z, first, last, *sizes, channels)

    for_rows(x, work)
    return from_tiles(shares.sum(0), elements).reshape(weight.shape).to(weight.dtype)
