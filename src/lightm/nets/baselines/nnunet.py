"""nnU-Net's rules: from the size and spacing of a patch to the stages of a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

MIN_FEATURE = 4  # voxels that an axis keeps in the deepest stage
MAX_CHANNELS = {2: 512, 3: 320}


@dataclass(frozen=True)
class Stages:
    """Per stage, and per axis where it depends on that: kernel sizes, strides and channels, the deepest stage last."""

    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """What every axis of an image must be a multiple of."""
        return tuple(prod(stride[axis] for stride in self.strides) for axis in range(len(self.strides[0])))


def plan_stages(
    image_size: Sequence[int],
    *,
    spacing: Sequence[float] | None = None,
    base_channels: int = 32,
    max_channels: int | None = None,
) -> Stages:
    """Return the stages that nnU-Net's rules give for a patch.

    Source: nnU-Net, arXiv 1904.08128 (supplement on network topology). An axis is pooled by 2 while at least 4 voxels
    remain, and only if it is less than twice as coarse as the finest axis that is still pooled: the finer ones go
    first. A last axis is pooled alone only if it keeps 6 voxels. Kernels are 1 along an axis until
    its spacing is less than twice the finest one's, then 3; the deepest stage has kernels of 3. Filters double from
    `base_channels` up to 320 in 3D, 512 in 2D.

    Arguments: `image_size` in voxels; `spacing` of the voxels in any unit, by default equal along all axes.
    Raises ValueError for a patch so small that fewer than two poolings remain.
    """
    size = [int(length) for length in image_size]
    dims = len(size)
    step = [1.0] * dims if spacing is None else [float(length) for length in spacing]
    if len(step) != dims or min(step) <= 0:
        raise ValueError(f"spacing {tuple(step)}: {dims} positive numbers are needed for a patch of {tuple(size)}")
    most = MAX_CHANNELS[dims] if max_channels is None else max_channels
    kernel = [1] * dims
    kernels: list[tuple[int, ...]] = []
    strides: list[tuple[int, ...]] = [(1,) * dims]
    while True:
        axes = [axis for axis in range(dims) if size[axis] >= 2 * MIN_FEATURE]
        if axes:
            finest = min(step[axis] for axis in axes)
            axes = [axis for axis in axes if step[axis] < 2 * finest]
        if not axes or (len(axes) == 1 and size[axes[0]] < 3 * MIN_FEATURE):
            break
        kernel = [3 if k == 3 or step[axis] < 2 * min(step) else 1 for axis, k in enumerate(kernel)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(dims)))
        for axis in axes:
            size[axis] = -(-size[axis] // 2)
            step[axis] *= 2
    if len(strides) < 3:
        raise ValueError(
            f"image_size {tuple(image_size)}: nnU-Net's rules allow {len(strides) - 1} pooling(s) here, and a U-Net "
            "needs two; use 16 or more along two axes"
        )
    kernels.append((3,) * dims)
    widths = tuple(min(base_channels * 2**stage, most) for stage in range(len(strides)))
    return Stages(tuple(kernels), tuple(strides), widths)
