"""Sliding windows over a volume: where they lie, how they are weighed, and their logits slab by slab.

MONAI's `sliding_window_inference` keeps the logits of all classes for the whole volume, with a weight map of the
same size; a CT of 512 x 512 x 600 voxels and 5 classes would need 3 GB for the first alone. Here windows are visited in
order of the first axis, and a slab is handed on as soon as no later window reaches it, so that memory is classes x
patch depth x one slice, whatever the length of the scan. The Gaussian is separable and windows form a regular grid,
so that the weights are normalised per axis beforehand: they sum to one at every voxel, without a weight map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightm.errors import InputError, LightMError

# The Gaussian's deviation as a share of the window, and the least weight relative to its centre: a voxel seen only
# in a window's corner must still have a weight that arithmetic can divide by.
_SIGMA = 1 / 8
_FLOOR = 1e-3

WindowProgress = Callable[[int, int], None]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return where windows start along an axis: evenly spread, covering it, overlapping by at least `overlap`.

    `length` voxels, at least `window`; `overlap` in [0, 1) as a share of the window.
    """
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    if count == 1:
        return [0]
    return [round(index * (length - window) / (count - 1)) for index in range(count)]


def axis_weights(length: int, window: int, starts: Sequence[int]) -> list[Tensor]:
    """Return for every start a Gaussian of `window` float32 weights; at each of `length` voxels they sum to one."""
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    gaussian = torch.exp(-0.5 * (offsets / (window * _SIGMA)) ** 2).clamp(min=_FLOOR)
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += gaussian
    return [(gaussian / total[start : start + window]).float() for start in starts]


def logit_slabs(
    network: nn.Module,
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
    progress: WindowProgress | None = None,
) -> Iterator[Tensor]:
    """Yield the logits of a volume in slabs along its first axis, in order: each (K, depth, *rest) float32 on the CPU.

    image: (C, *spatial) float32 on the CPU; an axis shorter than its patch is padded with zeros on both sides, as
    in training. patch_size: voxels an axis; the network gets exactly this size. overlap: share of a window in
    [0, 1). mirror_axes: spatial axes over whose 2^n flips the logits are averaged. progress(done, total) is
    called after every window.

    Windows are blended with Gaussian weights. Joined along axis 1 the slabs have the shape of the image. Raises
    InputError for sizes that do not fit, LightMError when the network returns another shape or values not finite.
    Memory: one slab of patch depth for all classes, and one window's activations.
    """
    dims = image.ndim - 1
    patch = tuple(int(size) for size in patch_size)
    if len(patch) != dims or min(patch) < 1:
        raise InputError(f"patch size {patch}: expected {dims} positive numbers for an image of {dims} axes")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap={overlap}: expected a share of the window of at least 0 and below 1, such as 0.5")
    if any(not 0 <= axis < dims for axis in mirror_axes):
        raise InputError(f"mirror axes {tuple(mirror_axes)}: expected axes from 0 to {dims - 1}")
    return _slabs(network, image, patch, overlap, tuple(mirror_axes), torch.device(device), progress)


def sliding_logits(network: nn.Module, image: Tensor, **options: object) -> Tensor:
    """Return the logits (K, *spatial) of a whole volume: the slabs of `logit_slabs`, whose options it takes, joined."""
    return torch.cat(list(logit_slabs(network, image, **options)), dim=1)  # type: ignore[arg-type]


def _slabs(
    network: nn.Module,
    image: Tensor,
    patch: tuple[int, ...],
    overlap: float,
    mirror_axes: tuple[int, ...],
    device: torch.device,
    progress: WindowProgress | None,
) -> Iterator[Tensor]:
    shape = image.shape[1:]
    before = [max(size - length, 0) // 2 for size, length in zip(patch, shape, strict=True)]
    after = [max(size - length, 0) - low for size, length, low in zip(patch, shape, before, strict=True)]
    if any(before) or any(after):
        pads = [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]
        image = functional.pad(image, pads)
    lengths = tuple(image.shape[1:])
    starts = [window_starts(n, size, overlap) for n, size in zip(lengths, patch, strict=True)]
    weights = [axis_weights(n, size, s) for n, size, s in zip(lengths, patch, starts, strict=True)]
    inside = [slice(low, low + length) for low, length in zip(before, shape, strict=True)]
    total = prod(len(s) for s in starts)
    done = 0
    buffer = torch.zeros(0)
    for row, start in enumerate(starts[0]):
        for indices in product(*(range(len(s)) for s in starts[1:])):
            corner = (start, *(starts[axis][index] for axis, index in enumerate(indices, start=1)))
            box = tuple(slice(low, low + size) for low, size in zip(corner, patch, strict=True))
            logits = _window_logits(network, image[(slice(None), *box)], mirror_axes, device)
            if not done:
                buffer = torch.zeros((logits.shape[0], patch[0], *lengths[1:]))
            for axis, index in enumerate((row, *indices)):
                logits *= weights[axis][index].view([-1 if axis == other else 1 for other in range(len(patch))])
            buffer[(slice(None), slice(None), *box[1:])] += logits
            done += 1
            if progress is not None:
                progress(done, total)
        finished = starts[0][row + 1] - start if row + 1 < len(starts[0]) else patch[0]
        # Only a first axis shorter than its patch is padded, and then there is but one row.
        slab = slice(before[0], before[0] + min(finished, shape[0]))
        yield buffer[(slice(None), slab, *inside[1:])].clone()
        buffer = torch.cat([buffer[:, finished:], torch.zeros_like(buffer[:, :finished])], dim=1)


@torch.no_grad()
def _window_logits(network: nn.Module, window: Tensor, mirror_axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the float32 logits (K, *patch) of one window on the CPU, averaged over the flips of `mirror_axes`."""
    window = window.unsqueeze(0).to(device)
    flips = [axes for count in range(len(mirror_axes) + 1) for axes in combinations(mirror_axes, count)]
    total: Tensor | None = None
    for axes in flips:
        dims = [axis + 2 for axis in axes]
        logits = network(window.flip(dims)) if dims else network(window)
        if not isinstance(logits, Tensor) or logits.shape[0] != 1 or logits.shape[2:] != window.shape[2:]:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise LightMError(
                f"the network returned {got} for a window of {tuple(window.shape)}; "
                "expected logits (1, classes, *window)"
            )
        logits = logits.float().flip(dims) if dims else logits.float()
        total = logits if total is None else total + logits
    if total is None or not bool(torch.isfinite(total).all()):
        raise LightMError(
            "the network returned values that are NaN or infinite; its weights are damaged, or training diverged"
        )
    # A copy of its own: a network may hand its input back, and blending works in place.
    return (total[0] / len(flips)).cpu()
