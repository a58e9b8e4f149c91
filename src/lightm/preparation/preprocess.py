"""From files to what a network sees of a case: canonical orientation, the plan's spacing, normalised intensities."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np

from lightm.datasets.cases import Case, Dataset, read_case
from lightm.errors import InputError, LightMError
from lightm.images.lazy import Box, DiskArray, LazyVolume
from lightm.images.limits import MAX_VOXELS, check_bytes
from lightm.images.volume import Volume, geometry_difference
from lightm.labels import IGNORE_INDEX
from lightm.preparation import cache
from lightm.preparation.cache import PreprocessedCase
from lightm.preparation.plan import Plan
from lightm.preparation.resample import resample_image, resample_label, resampled_shape
from lightm.progress import Progress

# Voxels looked at together for mean and standard deviation; whatever is in memory, so that sums are the same.
_CHUNK_VOXELS = 1 << 20


def grid_shape(geometry: Volume, plan: Plan) -> tuple[int, ...]:
    """Return the shape of an image, in canonical orientation, at the plan's spacing.

    Raises InputError, with the sizes, for more voxels than any image may have.
    """
    shape = resampled_shape(geometry.shape, geometry.spacing_mm, plan.spacing_mm)
    if prod(shape) > MAX_VOXELS:
        steps, target = (
            " x ".join(f"{step:.4g}" for step in reversed(s)) for s in (geometry.spacing_mm, plan.spacing_mm)
        )
        raise InputError(
            f"an image of shape {geometry.shape} with voxels of {steps} mm (x, y, z) has {prod(shape):.3g} voxels at "
            f"the plan's spacing of {target} mm, shape {shape}; at most {MAX_VOXELS} can be handled; check the spacing "
            "in its header, or crop it"
        )
    return shape


class NetworkGrid:
    """The image (C, *shape) that the network sees, float32, of which `read` makes a box at a time.

    images: one per channel, as `check_fit` accepts. folder: where a resampled image goes, None for memory. Training and
    prediction both read their images here, and values are the same whatever is in memory: without resampling nothing
    is kept but the images' own voxels; with it, one float32 per voxel and channel.

    "ct" channels are clipped, minus mean, over std of the plan; "zscore" channels minus their own mean, over their own
    standard deviation (only the mean is taken off a constant channel), "none" channels as they are, "rescale_to_0_1"
    and "rgb_to_0_1" channels as their names say. Where the file's voxels and float32 differ (float64, large integers)
    they are rounded to float32 first. Cost: normalisation again for each window that a voxel lies in, some 1% of the
    network's time.
    """

    def __init__(self, images: Sequence[LazyVolume], plan: Plan, folder: Path | None = None) -> None:
        first = images[0].geometry.to_canonical()
        self.shape = grid_shape(first, plan)
        self.schemes = plan.normalization
        same = first.shape == self.shape
        self._images = list(images) if same else []
        self._resampled = [] if same else [self._resample(image, first.shape, folder) for image in images]
        self._scales = [self._scale(channel) for channel in range(len(self.schemes))]

    def read(self, box: Box) -> np.ndarray:
        """Return a box, one slice with both ends per axis, of all channels: (C, *box) float32."""
        result = np.empty((len(self.schemes), *(part.stop - part.start for part in box)), np.float32)
        for channel, (scheme, (mean, std)) in enumerate(zip(self.schemes, self._scales, strict=True)):
            # By the slice: float64 costs no second copy of a large scan.
            for slab, target in zip(self._voxels(channel, box), result[channel], strict=True):
                if scheme.scheme == "ct":
                    clipped = np.clip(slab, scheme.clip_low, scheme.clip_high)
                    target[...] = (clipped - np.float32(scheme.mean)) / np.float32(scheme.std)
                else:
                    target[...] = (slab - np.float64(mean)) / std
        return result

    def close(self) -> None:
        """Give temporary files and memory back."""
        for stored in self._resampled:
            stored.close()
        self._images, self._resampled = [], []

    def _resample(self, image: LazyVolume, shape: tuple[int, ...], folder: Path | None) -> DiskArray:
        rest = _whole(shape[1:])
        return resample_image(
            lambda start, stop: image.read_canonical((slice(start, stop), *rest)), shape, self.shape, folder
        )

    def _voxels(self, channel: int, box: Box) -> np.ndarray:
        """Voxels of one channel on the network's grid, before normalisation, float32."""
        if self._resampled:
            return self._resampled[channel].read(box)
        if not self._images:
            raise ValueError("the grid was closed")
        return np.ascontiguousarray(self._images[channel].read_canonical(box), dtype=np.float32)

    def _scale(self, channel: int) -> tuple[float, float]:
        """What is taken off a channel, and by what it is divided then."""
        scheme = self.schemes[channel].scheme
        if scheme == "zscore":
            return self._zscore(channel)
        if scheme == "rescale_to_0_1":
            boxes = [(slice(start, start + 1), *_whole(self.shape[1:])) for start in range(self.shape[0])]
            ends = [(float(part.min()), float(part.max())) for part in (self._voxels(channel, box) for box in boxes)]
            low, high = min(low for low, _ in ends), max(high for _, high in ends)
            return low, high - low or 1.0
        return 0.0, 255.0 if scheme == "rgb_to_0_1" else 1.0

    def _zscore(self, channel: int) -> tuple[float, float]:
        """Mean and standard deviation (1 for a constant) of a channel in float64; sums of slices are added in order.

        Constant is what differs by no more than the mean's own rounding in float32, whatever the unit.
        """
        length, *rest = self.shape
        step = max(1, _CHUNK_VOXELS // int(np.prod(rest)))
        boxes = [(slice(start, min(start + step, length)), *_whole(rest)) for start in range(0, length, step)]
        size = int(np.prod(self.shape))
        total = squares = 0.0
        for box in boxes:
            total += sum(float(part.sum(dtype=np.float64)) for part in self._voxels(channel, box))
        mean = total / size
        for box in boxes:
            squares += sum(float(np.square(part - np.float64(mean)).sum()) for part in self._voxels(channel, box))
        std = float((squares / size) ** 0.5)
        return mean, std if std > 1e-8 * abs(mean) else 1.0


def _whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, size) for size in shape)


def preprocess_case(images: Sequence[Volume], label: Volume | None, plan: Plan) -> tuple[np.ndarray, np.ndarray | None]:
    """Return image (C, *spatial) float32 and label (*spatial) uint8 of class indices, 255 where ignored.

    Orientation is made canonical, then images are resampled with cubic splines and label maps by linear interpolation
    of each class, both to the plan's spacing; then each channel is normalised: what prediction sees, bit by bit.
    Raises InputError for other channels or axes than planned, geometries that disagree and unknown label values.
    Cost: about 1 s for 10 million voxels where resampling is needed.
    """
    check_fit(images, label, plan)
    native, channels = images[0].to_canonical(), len(images)
    shape = grid_shape(native, plan)
    copies = 1 + (shape != native.shape)  # where it is resampled: the grid, and what is read of it
    check_bytes(
        prod(shape) * (4 * channels * copies + 1), f"{channels} channel(s) of shape {shape} at the plan's spacing"
    )
    # Turned and converted here once, instead of in each of the grid's passes.
    turned = [image.to_canonical() for image in images]
    held = [image.with_data(np.ascontiguousarray(image.data, np.float32)) for image in turned]
    grid = NetworkGrid([LazyVolume.of(image) for image in held], plan)
    image = grid.read(_whole(grid.shape))
    if label is None:
        return image, None
    classes = to_class_indices(label.to_canonical().data, plan.values, plan.ignore_label)
    return image, resample_label(classes, grid.shape)


def check_fit(images: Sequence[Volume], label: Volume | None, plan: Plan) -> None:
    """Raise InputError for other channels or axes than planned and for geometries that disagree."""
    if len(images) != len(plan.channels):
        raise InputError(
            f"{len(images)} images, but the plan has {len(plan.channels)} channels ({', '.join(plan.channels)}); "
            "give one image per channel, in that order"
        )
    for volume in (*images, *([label] if label is not None else [])):
        if volume.data.ndim != plan.spatial_dims:
            raise InputError(
                f"a {volume.data.ndim}D image, shape {volume.shape}, where the plan is {plan.spatial_dims}D"
            )
        if difference := geometry_difference(volume, images[0]):
            raise InputError(f"images and label do not lie in one place: {difference}; resample them onto each other")


def to_class_indices(label: np.ndarray, values: Sequence[int], ignore_label: int | None) -> np.ndarray:
    """Return uint8 class indices for label values, 255 for the ignore label; raises InputError for other values."""
    result = np.full(label.shape, IGNORE_INDEX, dtype=np.uint8)
    known = np.zeros(label.shape, dtype=bool) if ignore_label is None else label == ignore_label
    for index, value in enumerate(values):
        here = label == value
        result[here] = index
        known |= here
    if not known.all():
        raise InputError(
            f"label value {int(label[~known][0])} is not among the plan's {list(values)}; "
            "correct the label map, or add the value to dataset.json and plan again"
        )
    return result


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    cache_dir: Path | str | None = None,
    *,
    case_ids: Sequence[str] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[PreprocessedCase]:
    """Preprocess cases into a folder, or find them there, and return them in the order of the ids.

    A case is done again only when its files' contents, what the plan says of it, or this code changed; results for
    other plans stay beside it. Each case appears complete or not at all, so a run may be killed at any time.
    cache_dir: by default `cache.default_cache_dir()`. case_ids: by default all training cases. workers: threads.

    Raises InputError, naming the case, for faulty files; LightMError when the disk refuses. Cost: reading, and
    cubic resampling where spacings differ; 5 bytes per voxel on disk for one channel; memory of one case per worker.
    """
    folder = cache_folder(dataset, cache_dir)
    cases = dataset.cases if case_ids is None else [dataset.case(case_id) for case_id in case_ids]
    cache.remove_leftovers(folder)
    hashes = cache.FileHashes(folder / cache.HASHES)

    def one(case: Case) -> PreprocessedCase:
        key = cache.case_key(case, plan, hashes, trust_image_geometry=dataset.trust_image_geometry)
        place = folder / f"{_folder_name(case.id)}-{key[:16]}"
        return cache.find(place, case.id) or _make(case, plan, place, key, dataset.trust_image_geometry)

    done: list[PreprocessedCase] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for finished in pool.map(one, cases) if workers > 0 else map(one, cases):
                done.append(finished)
                if progress is not None:
                    progress("preprocessing", len(done), len(cases))
        finally:
            pool.shutdown(cancel_futures=True)
            hashes.save()
    return done


def cache_folder(dataset: Dataset, cache_dir: Path | str | None = None) -> Path:
    """The folder of a data set's preprocessed cases, and of the hashes of its files."""
    return Path(cache_dir or cache.default_cache_dir()) / _folder_name(dataset.name)


def _make(case: Case, plan: Plan, place: Path, key: str, trust_image_geometry: bool) -> PreprocessedCase:
    images, label = read_case(case, trust_image_geometry=trust_image_geometry)
    try:
        _check_disk(case, prod(grid_shape(images[0].to_canonical(), plan)) * (4 * len(images) + 1), place.parent)
        image, classes = preprocess_case(images, label, plan)
    except InputError as error:
        raise InputError(f"{case.label or case.images[0]}: case {case.id}: {error}") from None
    geometry = hashlib.sha256(repr((images[0].shape, images[0].affine.tolist())).encode()).hexdigest()
    meta = {"key": key, "native_geometry": geometry, "spacing_mm": plan.spacing_mm}
    return cache.store(place, case.id, image, classes, meta)


def _check_disk(case: Case, needed: int, folder: Path) -> None:
    """Raise LightMError where the cache's disk has no room for a case."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise LightMError(
            f"{folder}: case {case.id} needs {needed / 1e9:.3g} GB there once it is preprocessed, and {free / 1e9:.3g} "
            "GB are free; make space, or set LIGHTM_CACHE to another folder"
        )


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
