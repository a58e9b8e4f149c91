"""From logits on the network's grid to classes and probabilities on the image's own grid, slab by slab."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightm.errors import InputError
from lightm.files import atomic_file, disk_refusals
from lightm.images.io import file_suffix
from lightm.images.lazy import DiskArray
from lightm.images.volume import Volume, canonical_axes
from lightm.preparation.resample import linear_neighbours

# Upsampled logits held at once, in values: 8 MB of float32.
_CHUNK_VALUES = 2_000_000
# Voxels of a class that are encoded at once.
_BLOCK_VOXELS = 4 << 20


def label_map(
    scores: Tensor,
    values: np.ndarray | None = None,
    *,
    regions_class_order: Sequence[int] = (),
    probabilities: bool = False,
) -> np.ndarray:
    """Return the label map (*S) of logits or probabilities (K, *S): the one place where that is decided.

    Classes: the value of the largest, of equals the first. Regions, with regions_class_order: where a region is found,
    a probability above 1/2 (a logit above 0), the value of its place in the order; regions that come later replace
    earlier ones, as in nnU-Net.

    values: of the classes, in the dtype of the result; class indices, uint8, without. probabilities: whether the scores
    are probabilities, such as the mean of several models', instead of logits. Memory: the result, and nine bytes a
    voxel.

    >>> import torch
    >>> scores = torch.tensor([[3.0, 1.0, -1.0], [2.0, -1.0, 1.0]])
    >>> label_map(scores), label_map(scores, regions_class_order=[1, 2])
    (array([0, 0, 1], dtype=uint8), array([2, 1, 2], dtype=uint8))
    """
    if not regions_class_order:
        # Twenty times as fast as argmax here, which gives the same: the first of the largest.
        indices = scores.max(0).indices.to(torch.uint8).cpu().numpy()
        return indices if values is None else values[indices]
    dtype = np.uint8 if max(regions_class_order) <= 255 else np.int16
    result = np.zeros(scores.shape[1:], dtype)
    for score, value in zip(scores, regions_class_order, strict=True):
        np.copyto(result, value, where=(score > (0.5 if probabilities else 0.0)).cpu().numpy())
    return result


def to_probabilities(logits: Tensor, *, regions: bool) -> Tensor:
    """Return the probabilities of logits (K, *S): the softmax of classes, or the sigmoid of each region."""
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 0)


def class_indices(
    slabs: Iterable[Tensor],
    grid_shape: Sequence[int],
    shape: Sequence[int],
    **how: Any,
) -> np.ndarray:
    """Return the label map (*shape) uint8 of slabs of logits: `native_logits`, then `write_labels`, which takes `how`.

    Memory: the result unless `out`, and a few times 8 MB or one slice of all classes.
    """
    return write_labels(native_logits(slabs, grid_shape, shape), shape, **how)


def native_logits(slabs: Iterable[Tensor], grid_shape: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield logits (K, n, *rest) of the next n slices of `shape`, interpolated linearly from those of `grid_shape`.

    slabs: logits (K, depth, *rest), which joined along axis 1 have `grid_shape`; at most 256 classes. Both grids cover
    the same space and voxels are boxes, as in `lightm.preparation.resample`; beyond the outermost centres logits
    stay constant. Equal shapes are not interpolated. Between two classes this puts the border where their
    logits meet, finer than the voxels of the network's grid. How many slices come together depends on K and `shape`
    alone.
    """
    grid_shape, shape = tuple(grid_shape), tuple(shape)
    low, high, share = linear_neighbours(grid_shape[0], shape[0])
    held: Tensor | None = None  # the slices of the network's grid that are still needed, from `first` on
    first = done = 0
    for slab in slabs:
        held = slab if held is None or not held.shape[1] else torch.cat([held, slab], dim=1)
        step = _chunk_slices(held.shape[0], shape)
        while done < shape[0]:
            stop = min(done + step, shape[0])
            if high[stop - 1] >= first + held.shape[1]:
                break
            piece = slice(done, stop)
            logits = _blend(held, low[piece] - first, high[piece] - first, share[piece])
            if grid_shape[1:] != shape[1:]:
                mode = "bilinear" if len(shape) == 3 else "linear"
                logits = functional.interpolate(logits, shape[1:], mode=mode, align_corners=False)
            yield logits
            done = stop
        kept = min(int(low[done]), first + held.shape[1]) if done < len(low) else first + held.shape[1]
        held = held[:, kept - first :]
        first = kept


def mean_probabilities(models: Sequence[Iterator[Tensor]], *, regions: bool) -> Iterator[Tensor]:
    """Yield the mean of several models' probabilities (K, n, *rest), from the logits that each yields of one image."""
    for logits in zip(*models, strict=True):
        total = to_probabilities(logits[0], regions=regions)
        for more in logits[1:]:
            total += to_probabilities(more, regions=regions)
        yield total.div_(len(models))


def write_labels(
    scores: Iterable[Tensor],
    shape: Sequence[int],
    *,
    values: Sequence[int] | None = None,
    regions_class_order: Sequence[int] = (),
    probabilities: bool = False,
    out: np.ndarray | None = None,
    sink: Callable[[Tensor], None] | None = None,
) -> np.ndarray:
    """Return the label map (*shape) uint8 of scores (K, n, *rest), which come in the order of the slices.

    values, regions_class_order, probabilities: as in `label_map`. out: where to write, of `shape`, such as a view of a
    map in another orientation. sink: is given the scores after their labels were written.
    """
    result = np.empty(tuple(shape), dtype=np.uint8) if out is None else out
    written = None if values is None else np.asarray(values, result.dtype)
    done = 0
    for part in scores:
        piece = slice(done, done + part.shape[1])
        result[piece] = label_map(part, written, regions_class_order=regions_class_order, probabilities=probabilities)
        if sink is not None:
            sink(part)
        done = piece.stop
    return result


def class_indices_bytes(
    classes: int, grid: Sequence[int], shape: Sequence[int], slab_values: int, resampled: bool
) -> int:
    """What `class_indices` needs at most beside its result, where slabs of so many values come."""
    slices = min(_chunk_slices(classes, shape), shape[0])
    held = classes * prod(grid[1:]) * (-(-slices * grid[0] // shape[0]) + 2) + slab_values
    return 8 * held + _chunk_bytes(classes, shape) * (4 if resampled else 2)


def probability_bytes(classes: int, shape: Sequence[int]) -> int:
    """What `ProbabilityFile.add` needs at most for an image of `shape`."""
    return 2 * _chunk_bytes(classes, shape) + 4 * _BLOCK_VOXELS


def _chunk_bytes(classes: int, shape: Sequence[int]) -> int:
    return 4 * classes * prod(shape[1:]) * min(_chunk_slices(classes, shape), shape[0])


def _chunk_slices(classes: int, shape: Sequence[int]) -> int:
    return max(1, _CHUNK_VALUES // (classes * prod(shape[1:])))


def _blend(held: Tensor, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> Tensor:
    if not share.any():
        return held if len(low) == held.shape[1] and low[0] == 0 else held[:, torch.from_numpy(low)]
    weight = torch.from_numpy(share).to(held.device, held.dtype).view(1, -1, *(1,) * (held.ndim - 2))
    return torch.lerp(held[:, torch.from_numpy(low)], held[:, torch.from_numpy(high)], weight)


class ProbabilityFile:
    """Probabilities of all classes or regions in the geometry of an image: a NIfTI file of axes (x, y, z, class).

    Stored as uint8 with a slope of 1/255, so that readers give 0 to 1 in steps of 0.004. A 2D image gives z = 1, a PNG
    image too: PNG holds no classes. Until all slabs are there they lie in a temporary file beside `path`, one byte per
    voxel and class, since NIfTI wants one class after the other. `path` appears complete or not at all.
    Raises InputError for a name that is not .nii or .nii.gz, LightMError when the disk refuses. Memory: some 10 MB.
    """

    def __init__(
        self, path: Path, native: Volume, classes: int, *, regions: bool = False, probabilities: bool = False
    ) -> None:
        check_path(path)
        if max(*native.shape, classes) > 32767:
            raise InputError(f"{path}: NIfTI-1 holds at most 32767 voxels along an axis, got shape {native.shape}")
        self.path, self.native, self.classes = path, native, classes
        self.regions, self.probabilities = regions, probabilities  # probabilities: whether `add` is given them
        first, *rest = native.to_canonical().shape
        with disk_refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._stored = DiskArray((first, classes, *rest), np.uint8, path.parent)
        self._done = 0

    def add(self, scores: Tensor) -> None:
        """Take the logits or probabilities (K, n, *rest) of the next n slices of the canonical image."""
        known = scores if self.probabilities else to_probabilities(scores, regions=self.regions)
        found = known.mul(255).round_().to(torch.uint8)
        parts = found.transpose(0, 1).contiguous().cpu().numpy()
        box = (slice(self._done, self._done + len(parts)), *(slice(0, size) for size in self._stored.shape[1:]))
        self._stored.write(box, parts)
        self._done += len(parts)

    def finish(self) -> None:
        """Write the file."""
        with atomic_file(self.path) as file:
            target: AbstractContextManager[object] = nullcontext(file)
            if file_suffix(self.path) == ".nii.gz":
                target = gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0)
            with target as stream:
                self._encode(cast(BinaryIO, stream))
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        self._stored.close()

    def _encode(self, stream: BinaryIO) -> None:
        shape = (*self.native.shape[::-1], 1)[:3]
        stub = np.broadcast_to(np.zeros((), np.uint8), (*shape, self.classes))
        image = nibabel.Nifti1Image(stub, self.native.affine, dtype=np.uint8)
        header = image.header
        sform, qform = self.native.form_codes
        header.set_xyzt_units("mm")
        image.set_sform(self.native.affine, code=max(sform, 1))
        image.set_qform(self.native.affine, code=qform)
        header.set_slope_inter(1 / 255, 0)
        header.set_data_offset(352)
        header["magic"] = b"n+1"
        stream.write(header.binaryblock + bytes(4))
        axes = canonical_axes(self.native)
        along = next(index for index, (axis, _) in enumerate(axes) if axis == 0)
        length = self.native.shape[0]
        flips = tuple(slice(None, None, -1 if flipped else 1) for _, flipped in axes)
        back = np.argsort([axis for axis, _ in axes])
        canonical = (self._stored.shape[0], *self._stored.shape[2:])
        step = max(1, _BLOCK_VOXELS * length // int(np.prod(canonical)))
        for index in range(self.classes):
            for start in range(0, length, step):
                stop = min(start + step, length)
                part = slice(length - stop, length - start) if axes[along][1] else slice(start, stop)
                box = [part if axis == along else slice(0, size) for axis, size in enumerate(canonical)]
                voxels = self._stored.read((box[0], slice(index, index + 1), *box[1:]))[:, 0]
                stream.write(np.ascontiguousarray(voxels[flips].transpose(back)).tobytes())


def check_path(path: Path) -> None:
    """Raise InputError for a name that is not that of a NIfTI file."""
    if file_suffix(path) not in (".nii", ".nii.gz"):
        raise InputError(f"{path}: probabilities are written as NIfTI; use a name that ends in .nii.gz or .nii")
