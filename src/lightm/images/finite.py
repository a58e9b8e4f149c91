"""The check that voxels are numbers that float32 holds, on a whole image or slab by slab."""

from __future__ import annotations

import numpy as np

from lightm.errors import InputError

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class FiniteCheck:
    """Counts the voxels that are NaN, infinite or beyond float32 in the slabs of one image, in order."""

    def __init__(self) -> None:
        self._slices = self._count = 0
        self._first: tuple[int, ...] = ()

    def see(self, slab: np.ndarray) -> None:
        """Look at the next slices of the first axis; integers cost nothing."""
        start, self._slices = self._slices, self._slices + len(slab)
        if slab.dtype.kind != "f":
            return
        with np.errstate(invalid="ignore"):
            low, high = float(slab.min()), float(slab.max())  # NaN where a voxel is
        if max(-low, high) <= _FLOAT32_MAX and low == low:
            return
        for index, part in enumerate(slab, start):
            bad = ~(np.abs(part) <= _FLOAT32_MAX)
            if bad.any():
                self._first = self._first or (index, *map(int, np.unravel_index(int(bad.argmax()), bad.shape)))
                self._count += int(bad.sum())

    def check(self) -> None:
        """Raise InputError, with number and first place, where there were any."""
        if self._count:
            axes = "z, y, x"[-3 * len(self._first) + 2 :]
            raise InputError(
                f"{self._count} voxels are NaN or infinite, the first at ({axes}) = {self._first}; "
                "replace them, for example with numpy.nan_to_num, and save the file again"
            )


def check_finite(data: np.ndarray) -> None:
    """Raise InputError where an image, (Z, Y, X) or (Y, X), holds such voxels."""
    check = FiniteCheck()
    check.see(data)
    check.check()
