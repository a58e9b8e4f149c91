"""Sliding windows over a volume: where they lie, how they are weighted, and their logits slab by slab.

MONAI's `sliding_window_inference` keeps the logits of all classes for the whole volume, with a weight map of the
same size; a CT of 512 x 512 x 600 voxels and 5 classes would need 3 GB for the first alone. Here windows are visited in
order of the first axis, and a slab is handed on as soon as no later window reaches it, so that memory is classes x
patch depth x one slice, whatever the length of the scan. Where that is too much, the sums lie in a temporary file, and
only the rows of one row of windows (patch depth x patch height x the width) are in memory: the same windows, added in
the same order, so the same bits. The Gaussian is separable and windows form a regular grid, so that the weights are
normalised per axis beforehand: they sum to one at every voxel, without a weight map.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import combinations, product
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm.device import default_precision
from lightm.errors import InputError, LightMError
from lightm.images.lazy import Box, DiskArray
from lightm.preparation.preprocess import NetworkGrid

# The Gaussian's standard deviation as a share of the window, and the least weight relative to its centre: a voxel seen
# only in a window's corner must still have a weight that arithmetic can divide by.
_SIGMA = 1 / 8
_MIN_WEIGHT = 1e-3

# Values of a slab that is handed on: 16 MB of float32.
_CHUNK_VALUES = 4_000_000

GPU_BATCH = 4  # windows at once on a CUDA device, whose refusals of memory are known by their type

_log = logging.getLogger("lightm.inference")

WindowProgress = Callable[[int, int], None]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return where windows start along an axis: evenly spread, covering it, overlapping by at least `overlap`.

    `length` voxels, at least `window`; `overlap` in [0, 1) as a share of the window.
    """
    step = max(1, int(window * (1 - overlap)))
    gaps = -(-(length - window) // step)
    return [round(index * (length - window) / gaps) for index in range(gaps + 1)] if gaps else [0]


def axis_weights(length: int, window: int, starts: Sequence[int]) -> list[Tensor]:
    """Return for every start a Gaussian of `window` float32 weights; at each of `length` voxels they sum to one."""
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    gaussian = torch.exp(-0.5 * (offsets / (window * _SIGMA)) ** 2).clamp(min=_MIN_WEIGHT)
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += gaussian
    return [(gaussian / total[start : start + window]).float() for start in starts]


def sums_bytes(classes: int, patch: Sequence[int], lengths: Sequence[int], in_memory: bool) -> int:
    """What the sums of logits take in memory, where they are there or in a file; lengths: of the padded image."""
    rest = lengths[1:] if in_memory or len(patch) == 2 else [patch[1], lengths[2]]
    return 4 * classes * patch[0] * prod(rest)


def slab_values(classes: int, lengths: Sequence[int]) -> int:
    """The most values of a slab that is handed on."""
    return max(classes * prod(lengths[1:]), _CHUNK_VALUES)


def logit_slabs(
    network: nn.Module,
    image: NetworkGrid,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
    progress: WindowProgress | None = None,
    folder: Path | None = None,
    batch: int | None = None,
) -> Iterator[Tensor]:
    """Yield the logits of a volume in slabs along its first axis, in order: each (K, depth, *rest) float32.

    image: an axis shorter than its patch is padded with zeros on both sides, as in training. patch_size: voxels per
    axis; the network gets exactly this size. overlap: share of a window in [0, 1). mirror_axes: spatial axes over whose
    2^n flips the logits are averaged. progress(done, total) is called after every window. folder: where the sums of
    logits go, None for memory; the result is the same. batch: windows that the network is given at once, by default 4
    on a CUDA device, fewer where its memory is too small, and 1 elsewhere. Sums and slabs stay on a CUDA device.

    Windows are blended with Gaussian weights. Joined along axis 1 the slabs have the shape of the image. Raises
    InputError for sizes that do not fit, LightMError when the network returns another shape or values not finite.
    Memory: one slab of patch depth for all classes (with `folder`, of it only as many rows as a patch has), 16 MB or
    one slice of all classes that is handed on, and one window's activations.
    """
    shape, dims = image.shape, len(image.shape)
    patch = tuple(int(size) for size in patch_size)
    if len(patch) != dims or min(patch) < 1:
        raise InputError(f"patch size {patch}: expected {dims} positive numbers for an image of {dims} axes")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap={overlap}: expected a share of the window of at least 0 and below 1, such as 0.5")
    if any(not 0 <= axis < dims for axis in mirror_axes):
        raise InputError(f"mirror axes {tuple(mirror_axes)}: expected axes from 0 to {dims - 1}")
    missing = [max(size - length, 0) for size, length in zip(patch, shape, strict=True)]
    lengths = tuple(length + count for length, count in zip(shape, missing, strict=True))
    pads = [pad for count in reversed(missing) for pad in (count // 2, count - count // 2)]
    # The image within the padded one. Only a first axis shorter than its patch is padded, and then there is one row.
    inside = [slice(count // 2, count // 2 + length) for count, length in zip(missing, shape, strict=True)]
    starts = [window_starts(n, size, overlap) for n, size in zip(lengths, patch, strict=True)]
    weights = [axis_weights(n, size, s) for n, size, s in zip(lengths, patch, starts, strict=True)]
    total = prod(len(s) for s in starts)
    done = 0
    run = _Runner(network, tuple(mirror_axes), torch.device(device), batch)
    sums: _Sums | _DeviceSums | None = None
    try:
        for row, start in enumerate(starts[0]):
            left = list(product([row], *(range(len(s)) for s in starts[1:])))
            while left:
                group, left = left[: run.batch], left[run.batch :]
                corners = [tuple(starts[axis][index] for axis, index in enumerate(indices)) for indices in group]
                windows = []
                for corner in corners:
                    # A padded axis has one window, from its start, and all of the image is in it.
                    box = tuple(
                        slice(n, n + min(size, length)) for n, size, length in zip(corner, patch, shape, strict=True)
                    )
                    window = torch.from_numpy(image.read(box))
                    windows.append(functional.pad(window, pads) if any(pads) else window)
                given = torch.stack(windows) if len(windows) > 1 else windows[0].unsqueeze(0)
                del windows, window
                several = run(given)
                del given
                for logits, indices, corner in zip(several, group, corners, strict=True):
                    if sums is None:
                        sums = _sums_on(logits.device, logits.shape[0], patch, lengths, folder)
                    for axis, index in enumerate(indices):
                        weight = weights[axis][index].to(logits.device)
                        logits *= weight.view([-1 if axis == other else 1 for other in range(dims)])
                    sums.add(logits, corner)
                    done += 1
                    if progress is not None:
                        progress(done, total)
                del several, logits
            finished = starts[0][row + 1] if row + 1 < len(starts[0]) else lengths[0]
            if sums is not None:
                yield from sums.take(max(start, inside[0].start), min(finished, inside[0].stop), inside[1:])
                sums.clear(start, finished)
    finally:
        if sums is not None:
            sums.close()


class _Runner:
    """Runs the network on windows (n, C, *patch), at most `batch` at once: four on a CUDA device, one elsewhere.

    Where a GPU's memory is too small the windows are run in halves, and later ones are as many from the start.
    """

    def __init__(
        self, network: nn.Module, mirror_axes: tuple[int, ...], device: torch.device, batch: int | None
    ) -> None:
        self.network, self.mirror_axes, self.device = network, mirror_axes, device
        self.batch = batch or (GPU_BATCH if device.type == "cuda" else 1)

    def __call__(self, windows: Tensor) -> Tensor:
        try:
            return batch_logits(self.network, windows, self.mirror_axes, self.device)
        except torch.OutOfMemoryError as error:
            if len(windows) == 1:
                raise LightMError(
                    f"{self.device}: out of memory for one window of {tuple(windows.shape[2:])}; use --device cpu, or "
                    "a GPU that nothing else uses"
                ) from error
        # outside of the handler, whose traceback holds the tensors
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch = len(windows) // 2
        _log.info("%s: out of memory for %d windows at once; %d are run", self.device, len(windows), self.batch)
        return torch.cat([self(part) for part in windows.split(self.batch)])


def _sums_on(
    device: torch.device, classes: int, patch: tuple[int, ...], lengths: tuple[int, ...], folder: Path | None
) -> _Sums | _DeviceSums:
    """The sums on a CUDA device that has room for them; else on the CPU."""
    if device.type == "cuda":
        with suppress(torch.OutOfMemoryError):
            return _DeviceSums(device, classes, patch, lengths)
        _log.info("%s: no memory for the sums of logits, which are kept on the CPU", device)
    return _Sums(classes, patch, lengths, folder)


class _DeviceSums:
    """`_Sums` as one tensor on a device, which the slabs stay on."""

    def __init__(self, device: torch.device, classes: int, patch: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.patch = patch
        self._sums = torch.zeros((classes, patch[0], *lengths[1:]), device=device)

    def add(self, logits: Tensor, corner: tuple[int, ...]) -> None:
        rest = tuple(slice(n, n + size) for n, size in zip(corner[1:], self.patch[1:], strict=True))
        turn = corner[0] % self.patch[0]
        self._sums[(slice(None), slice(turn, None), *rest)] += logits[:, : self.patch[0] - turn]
        if turn:
            self._sums[(slice(None), slice(0, turn), *rest)] += logits[:, self.patch[0] - turn :]

    def take(self, start: int, stop: int, inside: Sequence[slice]) -> Iterator[Tensor]:
        size = self._sums[:, 0].numel()
        while start < stop:
            place = start % self.patch[0]
            count = min(stop - start, self.patch[0] - place, max(1, _CHUNK_VALUES // size))
            yield self._sums[(slice(None), slice(place, place + count), *inside)].clone()
            start += count

    def clear(self, start: int, stop: int) -> None:
        for place in (n % self.patch[0] for n in range(start, stop)):
            self._sums[:, place] = 0

    def close(self) -> None:
        self._sums = self._sums[:0]


class _Sums:
    """Sums of weighted logits of the slices that windows reach, as many as a patch is deep: slice z in place z % depth.

    In memory as one tensor; with a folder in a file, of which the rows of one row of windows are in memory.
    """

    def __init__(self, classes: int, patch: tuple[int, ...], lengths: tuple[int, ...], folder: Path | None) -> None:
        self.patch = patch
        self._stored = DiskArray((classes, patch[0], *lengths[1:]), np.float32, folder)
        self._band: np.ndarray | None = None
        self._rows = slice(0, 0)

    def add(self, logits: Tensor, corner: tuple[int, ...]) -> None:
        """Add the logits (K, *patch) of the window that starts at `corner`."""
        logits = logits.cpu()
        depth, planar = self.patch[0], len(self.patch) == 2
        # The band is whole along the last axis, so that it lies in the file in long runs.
        rows = slice(0, self._stored.shape[2]) if planar else slice(corner[1], corner[1] + self.patch[1])
        if self._band is None or rows != self._rows:
            self._flush()
            self._rows = rows
            self._band = self._stored.read(self._box(slice(0, depth), rows))
        band = torch.from_numpy(self._band)
        columns = slice(corner[-1], corner[-1] + self.patch[-1])
        inside = (columns,) if planar else (slice(None), columns)
        turn = corner[0] % depth
        band[(slice(None), slice(turn, None), *inside)] += logits[:, : depth - turn]
        if turn:
            band[(slice(None), slice(0, turn), *inside)] += logits[:, depth - turn :]

    def take(self, start: int, stop: int, inside: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the sums of slices from start to stop, in chunks of one slice or 16 MB, cut to `inside`; copies."""
        self._flush()
        size = self._stored.shape[0] * prod(self._stored.shape[2:])
        while start < stop:
            place = start % self.patch[0]
            count = min(stop - start, self.patch[0] - place, max(1, _CHUNK_VALUES // size))
            chunk = self._stored.read((slice(0, self._stored.shape[0]), slice(place, place + count), *inside))
            yield torch.from_numpy(chunk.copy() if self._stored.held else chunk)
            start += count

    def clear(self, start: int, stop: int) -> None:
        """Set the sums of slices from start to stop to zero, for those that come after."""
        zeros = np.zeros((self._stored.shape[0], 1, *self._stored.shape[2:]), np.float32)
        for place in (n % self.patch[0] for n in range(start, stop)):
            self._stored.write(self._box(slice(place, place + 1), slice(0, self._stored.shape[2])), zeros)

    def close(self) -> None:
        self._stored.close()

    def _flush(self) -> None:
        if self._band is not None:
            self._stored.write(self._box(slice(0, self.patch[0]), self._rows), self._band)
            self._band = None

    def _box(self, depth: slice, rows: slice) -> Box:
        return (slice(0, self._stored.shape[0]), depth, rows, *(slice(0, size) for size in self._stored.shape[3:]))


def window_logits(network: nn.Module, window: Tensor, mirror_axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the float32 logits (K, *patch) of one window on the CPU, averaged over the flips of `mirror_axes`."""
    return batch_logits(network, window.unsqueeze(0), mirror_axes, device)[0].cpu()


@torch.no_grad()
def batch_logits(network: nn.Module, windows: Tensor, mirror_axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the float32 logits (n, K, *patch) of windows (n, C, *patch) on the device, averaged over the flips.

    On a GPU with bfloat16 the network runs under autocast. Raises LightMError for another shape or values not finite.
    """
    windows = windows.to(device)
    flips = [axes for count in range(len(mirror_axes) + 1) for axes in combinations(mirror_axes, count)]
    half = default_precision(device) == "bf16-mixed"
    total: Tensor | None = None
    for axes in flips:
        dims = [axis + 2 for axis in axes]
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            logits = network(windows.flip(dims)) if dims else network(windows)
        if not isinstance(logits, Tensor) or logits.shape[0] != len(windows) or logits.shape[2:] != windows.shape[2:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise LightMError(
                f"the network returned {got} for a window of {tuple(windows.shape)}; "
                "expected logits (1, classes, *window)"
            )
        logits = logits.float().flip(dims) if dims else logits.float()
        total = logits if total is None else total + logits
    if total is None or not bool(torch.isfinite(total).all()):
        raise LightMError(
            "the network returned values that are NaN or infinite; its weights are damaged, or training diverged"
        )
    # A copy of its own: a network may hand its input back, and blending works in place.
    return total / len(flips)
