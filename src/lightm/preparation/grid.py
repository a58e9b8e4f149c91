"""What the network sees of a case, by the box: canonical orientation, the plan's spacing, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightm.images.lazy import Box, DiskArray, LazyVolume
from lightm.preparation.plan import ChannelNormalization, Plan
from lightm.preparation.resample import resample_image, resampled_shape

# Voxels looked at together for mean and standard deviation; whatever is held, so that sums are the same.
_VOXELS_AT_ONCE = 1 << 20


class NetworkGrid:
    """The image (C, *shape) that the network sees, float32, of which `read` makes a box at a time.

    images: one per channel, as `lightm.preparation.preprocess.check_fit` accepts. folder: where a resampled image goes,
    None for memory. Training and prediction both read their images here, and values are the same whatever is held:
    without resampling nothing is kept but the images' own voxels; with it, one float32 per voxel and channel.

    "ct" channels are clipped, minus mean, over std of the plan; "zscore" channels minus their own mean, over their own
    standard deviation (only the mean is taken off a constant channel). Where the file's voxels and float32 differ
    (float64, large integers) they are rounded to float32 first.
    Cost: normalisation again for each window that a voxel lies in, some 1% of the network's time.
    """

    def __init__(self, images: Sequence[LazyVolume], plan: Plan, folder: Path | None = None) -> None:
        first = images[0].geometry.to_canonical()
        self.shape = resampled_shape(first.shape, first.spacing_mm, plan.spacing_mm)
        self.schemes = plan.normalization
        self._channels = [_Channel(image, first.shape, self.shape, folder) for image in images]
        self._zscores = [
            (0.0, 1.0) if scheme.scheme == "ct" else _zscore(channel)
            for channel, scheme in zip(self._channels, self.schemes, strict=True)
        ]

    def read(self, box: Box) -> np.ndarray:
        """Return a box, one slice with both ends per axis, of all channels: (C, *box) float32."""
        size = [part.stop - part.start for part in box]
        result = np.empty((len(self._channels), *size), np.float32)
        for index, channel in enumerate(self._channels):
            for slab, part in zip(channel.read(box), result[index], strict=True):
                _normalize(slab, self.schemes[index], part, self._zscores[index])
        return result

    def close(self) -> None:
        """Give temporary files and memory back."""
        for channel in self._channels:
            channel.close()


class _Channel:
    """Voxels of one channel on the network's grid, not normalised, float32."""

    def __init__(self, image: LazyVolume, old: tuple[int, ...], shape: tuple[int, ...], folder: Path | None) -> None:
        self.shape = shape
        self._stored: DiskArray | None = None
        self._image: LazyVolume | None = None
        if old == shape:
            self._image = image
        else:
            rest = tuple(slice(0, size) for size in old[1:])
            self._stored = resample_image(
                lambda start, stop: image.read_canonical((slice(start, stop), *rest)), old, shape, folder
            )

    def read(self, box: Box) -> np.ndarray:
        if self._image is not None:
            return np.ascontiguousarray(self._image.read_canonical(box), dtype=np.float32)
        if self._stored is None:
            raise ValueError("the grid was closed")
        return self._stored.read(box)

    def close(self) -> None:
        self._image = None
        if self._stored is not None:
            self._stored.close()
            self._stored = None


def _normalize(slab: np.ndarray, scheme: ChannelNormalization, target: np.ndarray, zscore: tuple[float, float]) -> None:
    """Write a slice of a channel, float32, normalised to `target`: float64 costs no second copy of a large scan."""
    if scheme.scheme == "ct":
        clipped = np.clip(slab, scheme.clip_low, scheme.clip_high)
        target[...] = (clipped - np.float32(scheme.mean)) / np.float32(scheme.std)
    else:
        target[...] = (slab - np.float64(zscore[0])) / zscore[1]


def _zscore(channel: _Channel) -> tuple[float, float]:
    """Mean and standard deviation (1 for a constant) of a channel in float64; its slices' sums are added in order."""
    rest = tuple(slice(0, size) for size in channel.shape[1:])
    size = int(np.prod(channel.shape))
    step = max(1, _VOXELS_AT_ONCE // int(np.prod(channel.shape[1:])))
    total = squares = 0.0
    boxes = [(slice(start, min(start + step, channel.shape[0])), *rest) for start in range(0, channel.shape[0], step)]
    for box in boxes:
        total += sum(float(part.sum(dtype=np.float64)) for part in channel.read(box))
    mean = total / size
    for box in boxes:
        squares += sum(float(np.square(part - np.float64(mean)).sum()) for part in channel.read(box))
    std = float((squares / size) ** 0.5)
    return mean, std if std > 1e-8 * max(1.0, abs(mean)) else 1.0
