"""Patches for training: which case, where, and how it is changed follow from a seed and an index alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from lightm.errors import InputError
from lightm.labels import IGNORE_INDEX
from lightm.preparation.augment import Augment, AugmentConfig
from lightm.preparation.cache import PreprocessedCase

_ORDER = 0x0D3  # sets the draw of the order apart from the draws of the patches


class PatchDataset(TorchDataset[dict[str, Any]]):
    """Random patches of preprocessed cases, balanced between their classes.

    patch_size: voxels along each axis. foreground_fraction: the share of patches that are placed to hold a voxel of
    a class drawn evenly among those present in the case; the others lie anywhere. With label_regions, the class indices
    of each region, a region is drawn evenly, and in it a class as often as it has voxels. Every len(self) consecutive
    indices, counted from 0, visit each case once, in an order drawn anew each time. A case smaller than the patch
    lies anywhere inside it; the rest is 0 in the image and 255 (ignored) in the label.

    An item is {"image": float32 (C, *patch), "label": int64 (*patch), "case": id} and depends on (seed, index) alone,
    whatever came before. Indices have no upper end. Voxels are mapped from the cache's files, so that all workers of a
    machine share one copy, which the system drops where memory is short.
    Raises InputError for no cases, cases without labels, and a patch of the wrong number of axes.
    """

    def __init__(
        self,
        cases: Sequence[PreprocessedCase],
        *,
        patch_size: Sequence[int],
        seed: int,
        augment: AugmentConfig | None = None,
        foreground_fraction: float = 0.5,
        label_regions: Sequence[Sequence[int]] = (),
    ) -> None:
        if not cases:
            raise InputError("no cases to draw patches from; the split must leave at least one")
        for case in cases:
            if case.label_path is None:
                raise InputError(f"case {case.id} has no label map; give its label, or leave it out")
            if len(case.meta["shape"]) != len(patch_size):
                raise InputError(
                    f"patch size {tuple(patch_size)} does not fit case {case.id}, shape {case.meta['shape']}"
                )
        if min(patch_size) < 1:
            raise InputError(f"patch size {tuple(patch_size)}: at least one voxel is needed on every axis")
        if not 0 <= foreground_fraction <= 1:
            raise InputError(f"foreground_fraction {foreground_fraction}: a number from 0 to 1 is needed")
        if seed < 0:
            raise InputError(f"seed {seed}: a number from 0 on is needed")
        self.cases = tuple(cases)
        self.patch_size = tuple(int(size) for size in patch_size)
        self.seed = int(seed)
        self.foreground_fraction = float(foreground_fraction)
        self.label_regions = tuple(tuple(region) for region in label_regions)
        self._augment: Augment | None = None
        if augment is not None and augment.enabled:
            self._augment = Augment(augment, len(self.patch_size), cases[0].meta.get("spacing_mm"))
        # Image, label and foreground of the cases that were asked for.
        self._opened: dict[int, tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]] = {}

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the first len(self) items; without this, iterating would never end."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(f"index {index}: patches are numbered from 0")
        rng = np.random.default_rng((self.seed, int(index)))
        chosen = self._case_of(int(index))
        case = self.cases[chosen]
        if chosen not in self._opened:
            self._opened[chosen] = (case.image(), case.label(), case.foreground())
        image, label, foreground = self._opened[chosen]
        start = self._place(foreground, label.shape, rng, case.meta.get("class_voxels", {}))
        sample = {
            "image": torch.from_numpy(cut(image, start, self.patch_size, 0)),
            "label": torch.from_numpy(cut(label, start, self.patch_size, IGNORE_INDEX).astype(np.int64)),
            "case": case.id,
        }
        seed = int(rng.integers(2**63))
        return sample if self._augment is None else self._augment(sample, seed)

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the files themselves instead of being sent every voxel."""
        return {**self.__dict__, "_opened": {}}

    def _case_of(self, index: int) -> int:
        turn, place = divmod(index, len(self.cases))
        return int(np.random.default_rng((self.seed, turn, _ORDER)).permutation(len(self.cases))[place])

    def _place(
        self,
        places: dict[int, np.ndarray],
        shape: tuple[int, ...],
        rng: np.random.Generator,
        class_voxels: Mapping[str, int],
    ) -> tuple[int, ...]:
        # Drawn always, so that the draws after it do not depend on what the case holds.
        wanted = rng.random() < self.foreground_fraction
        voxel: np.ndarray | None = None
        if wanted and places:
            if self.label_regions:
                present = [[k for k in region if k in places] for region in self.label_regions]
                present = [region for region in present if region]
                region = present[int(rng.integers(len(present)))]
                counts = np.array([class_voxels.get(str(k), len(places[k])) for k in region], np.float64)
                voxels = places[region[int(rng.choice(len(region), p=counts / counts.sum()))]]
            else:
                voxels = places[sorted(places)[int(rng.integers(len(places)))]]
            voxel = voxels[int(rng.integers(len(voxels)))]
        start = []
        for axis, (size, length) in enumerate(zip(shape, self.patch_size, strict=True)):
            first, last = min(0, size - length), max(0, size - length)
            if voxel is not None:
                first, last = max(first, int(voxel[axis]) - length + 1), min(last, int(voxel[axis]))
            start.append(int(rng.integers(first, last + 1)))
        return tuple(start)


def cut(array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float) -> np.ndarray:
    """Return the box of the last len(start) axes from `start` on, with `fill` where it reaches beyond the array."""
    lead = array.ndim - len(start)
    result = np.full((*array.shape[:lead], *size), fill, dtype=array.dtype)
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for begin, length, limit in zip(start, size, array.shape[lead:], strict=True):
        low, high = max(0, begin), min(limit, begin + length)
        source.append(slice(low, high))
        target.append(slice(low - begin, high - begin))
    result[tuple(target)] = array[tuple(source)]
    return result


class EpochSampler(Sampler[int]):
    """Indices epoch*length ... epoch*length + length - 1, so that every epoch draws patches of its own."""

    def __init__(self, length: int, start_epoch: int = 0) -> None:
        if length < 1:
            raise InputError(f"length {length}: at least one patch per epoch is needed")
        self.length = int(length)
        self.epoch = int(start_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose indices come next."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))
