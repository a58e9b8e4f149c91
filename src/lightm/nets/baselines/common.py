"""What baselines share: the wrapper that checks sizes, layers by dimensionality, and the stages of nnU-Net's rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from lightm.nets.lightm_unet import check_shape

MIN_FEATURE = 4  # voxels that an axis keeps in the deepest stage of nnU-Net's rules
MAX_CHANNELS = {2: 512, 3: 320}


class Baseline(nn.Module):
    """A baseline behind the interface of LightM's own: (B, in_channels, *S) -> logits (B, out_channels, *S).

    Arguments: `body` does the work; `divisor` per axis; `image_size`: the only size that the body takes, if it takes
    but one; `one_voxel`: whether its deepest stage can be normalised when a single voxel is left there.
    Raises ValueError, naming the axis and a size that fits, for an image that the body cannot take.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        in_channels: int,
        divisor: Sequence[int],
        image_size: Sequence[int] | None = None,
        one_voxel: bool = True,
    ) -> None:
        super().__init__()
        self.body = body
        self.spatial_dims, self.in_channels = len(divisor), in_channels
        self.divisor = divisor[0] if len(set(divisor)) == 1 else tuple(divisor)
        self.image_size = None if image_size is None else tuple(image_size)
        self.one_voxel = one_voxel

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError unless the network takes an image of this size."""
        size = tuple(int(length) for length in size)
        divisors = self.divisor if isinstance(self.divisor, tuple) else (self.divisor,) * self.spatial_dims
        axes = "ZYX"[-self.spatial_dims :]
        for axis, length, divisor in zip(axes, size, divisors, strict=True):
            if length % divisor or length == 0:
                low = length // divisor * divisor
                near = f"{low} or {low + divisor}" if low else f"{divisor}"
                raise ValueError(f"input size {size}: {axis}={length} is not divisible by {divisor}; use {near}")
        if not self.one_voxel and size == divisors:
            raise ValueError(
                f"input size {size}: one voxel is left in the deepest stage, and its normalisation needs two; use "
                f"{axes[0]}={2 * divisors[0]} or more"
            )
        for axis, length, built in zip(axes, size, self.image_size or size, strict=True):
            if length != built:
                raise ValueError(
                    f"input size {size}: {axis}={length}, but this network was built for {self.image_size}, the size "
                    f"that its positions are learnt for; use {axis}={built}, or build it with another image_size"
                )

    def forward(self, image: Tensor) -> Tensor:
        check_shape(image, self.spatial_dims, self.in_channels)
        self.check_size(image.shape[2:])
        logits: Tensor = self.body(image)
        return logits


@dataclass(frozen=True)
class Shape:
    """What a baseline is built for; `image_size`: the patches that it will see, None where they are not known."""

    spatial_dims: int
    in_channels: int
    out_channels: int
    image_size: Sequence[int] | None

    def needed_size(self, why: str, divisor: Sequence[int] = ()) -> tuple[int, ...]:
        """The image size; ValueError where it is missing, with `why` it is needed, or no multiple of `divisor`."""
        if self.image_size is None:
            raise ValueError(
                f"image_size is missing: {why}; give the size of the patches, such as image_size=(96, 96, 96)"
            )
        size = tuple(int(length) for length in self.image_size)
        for axis, length, side in zip("ZYX"[-len(size) :], size, divisor, strict=False):
            if length % side or not length:
                near = length // side * side + side
                raise ValueError(f"image_size {size}: {axis}={length} is not divisible by {side}; use {near}")
        return size

    def baseline(self, body: nn.Module, divisor: Sequence[int] | int, **options: Any) -> Baseline:
        """The network around `body`, with the options of `Baseline`; one divisor is that of all axes."""
        divisors = [divisor] * self.spatial_dims if isinstance(divisor, int) else divisor
        return Baseline(body, in_channels=self.in_channels, divisor=divisors, **options)


def of_dims(kind: str, spatial_dims: int) -> Any:
    """The layer class of `torch.nn` of a kind and dimensionality: "Conv", 3 -> nn.Conv3d."""
    return getattr(nn, f"{kind}{spatial_dims}d")


def linear_mode(spatial_dims: int) -> str:
    """The name that `torch.nn.functional.interpolate` has for linear interpolation."""
    return "trilinear" if spatial_dims == 3 else "bilinear"


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
