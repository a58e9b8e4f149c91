"""What all baselines share: the wrapper that checks sizes, and layers by dimensionality."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


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
        for axis, length, divisor in zip("ZYX"[-self.spatial_dims :], size, divisors, strict=True):
            if length % divisor or length == 0:
                low = length // divisor * divisor
                near = f"{low} or {low + divisor}" if low else f"{divisor}"
                raise ValueError(f"input size {size}: {axis}={length} is not divisible by {divisor}; use {near}")
        if not self.one_voxel and all(length == divisor for length, divisor in zip(size, divisors, strict=True)):
            axis = "ZYX"[-self.spatial_dims]
            raise ValueError(
                f"input size {size}: one voxel is left in the deepest stage, and its normalisation needs two; use "
                f"{axis}={2 * divisors[0]} or more"
            )
        if self.image_size is not None and size != self.image_size:
            axis, length, built = next(
                (axis, length, built)
                for axis, length, built in zip("ZYX"[-self.spatial_dims :], size, self.image_size, strict=True)
                if length != built
            )
            raise ValueError(
                f"input size {size}: {axis}={length}, but this network was built for {self.image_size}, the size that "
                f"its positions are learnt for; use {axis}={built}, or build it with another image_size"
            )

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            axes = "Z, Y, X" if self.spatial_dims == 3 else "Y, X"
            raise ValueError(
                f"input of shape {tuple(image.shape)}; this network expects (B, {self.in_channels}, {axes})"
            )
        self.check_size(image.shape[2:])
        logits: Tensor = self.body(image)
        return logits


def needed(image_size: Sequence[int] | None, why: str) -> tuple[int, ...]:
    """The image size, or a ValueError that says why the network needs it."""
    if image_size is None:
        raise ValueError(f"image_size is missing: {why}; give the size of the patches, such as image_size=(96, 96, 96)")
    return tuple(int(length) for length in image_size)


def conv(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution of a dimensionality."""
    return nn.Conv3d if spatial_dims == 3 else nn.Conv2d


def transposed_conv(spatial_dims: int) -> type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]:
    """The transposed convolution of a dimensionality."""
    return nn.ConvTranspose3d if spatial_dims == 3 else nn.ConvTranspose2d


def linear_mode(spatial_dims: int) -> str:
    """The name that `torch.nn.functional.interpolate` has for linear interpolation."""
    return "trilinear" if spatial_dims == 3 else "bilinear"
