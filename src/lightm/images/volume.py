"""An image or label map with its place in space.

Arrays are indexed (z, y, x) or (y, x); the affine maps a voxel index in the file's order, (x, y, z, 1),
to millimetres in the patient's right-anterior-superior frame, as NIfTI stores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from lightm.errors import InputError

# Headers store float32, and zooms and affine are rounded apart from each other.
_SPACING_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with their spacing and affine.

    data: (Z, Y, X) or (Y, X), any real dtype. spacing_mm: in the axis order of `data`. affine: (4, 4) float64,
    voxel (x, y, z, 1) to millimetres (right, anterior, superior); its column lengths are the spacing.
    form_codes: NIfTI's sform and qform codes, and qform: the qform where a file gives both, kept so that a file goes
    back as it came.
    Raises InputError when these do not fit together. Voxel values are not looked at.

    >>> import numpy as np
    >>> volume = lightm.Volume.from_spacing(np.zeros((4, 8, 8), np.float32), (2.0, 1.0, 1.0))
    >>> volume.shape, volume.spacing_mm
    ((4, 8, 8), (2.0, 1.0, 1.0))
    """

    data: np.ndarray
    spacing_mm: tuple[float, ...]
    affine: np.ndarray
    form_codes: tuple[int, int] = (1, 1)
    qform: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.data.ndim not in (2, 3):
            raise InputError(f"a volume has 2 or 3 axes, got shape {self.data.shape}; pass one channel of one scan")
        if self.data.size == 0:
            raise InputError(f"a volume needs at least one voxel on every axis, got shape {self.data.shape}")
        if self.data.dtype.kind not in "biuf":
            raise InputError(f"voxels must be real numbers, got {self.data.dtype}")
        spacing = tuple(float(step) for step in self.spacing_mm)
        if len(spacing) != self.data.ndim or not all(np.isfinite(spacing)) or min(spacing) <= 0:
            raise InputError(
                f"spacing {spacing} mm does not fit shape {self.data.shape}: one positive number per axis is needed"
            )
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError("the affine must be a 4x4 matrix of finite numbers; save the file with a valid geometry")
        steps = affine_spacing_mm(affine, self.data.ndim)
        if not np.allclose(steps, spacing, rtol=_SPACING_TOLERANCE, atol=1e-6):
            raise InputError(
                f"spacing {_numbers(spacing)} mm disagrees with the affine, whose steps are {_numbers(steps)} mm "
                "(axis order z, y, x); save the file with one geometry"
            )
        if self.data.ndim == 3 and abs(np.linalg.det(affine[:3, :3])) < 1e-6 * float(np.prod(steps)):
            raise InputError(
                "the affine has two axes that point the same way, so voxels have no place in space; "
                "save the file with a valid geometry"
            )
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "spacing_mm", spacing)

    @classmethod
    def from_spacing(cls, data: np.ndarray, spacing_mm: tuple[float, ...]) -> Volume:
        """Return a volume whose axes lie along the patient's, with voxel (0, 0, 0) at the origin."""
        steps = [*reversed([float(step) for step in spacing_mm]), 1.0, 1.0, 1.0][:3]
        return cls(data, tuple(float(step) for step in spacing_mm), np.diag([*steps, 1.0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis, (z, y, x) or (y, x)."""
        return tuple(int(size) for size in self.data.shape)

    def with_data(self, data: np.ndarray) -> Volume:
        """Return `data`, of the same shape, with this volume's geometry; raises InputError for another shape."""
        if data.shape != self.data.shape:
            raise InputError(f"shape {data.shape} does not fit the geometry of shape {self.data.shape}")
        return replace(self, data=data)

    def to_canonical(self) -> Volume:
        """Return the volume with axes permuted and flipped to point nearest to right, anterior, superior.

        Nothing is resampled: the same voxels at the same places. A view where numpy can give one. 2D unchanged.
        """
        if self.data.ndim == 2:
            return self
        orientation = _orientation(self.affine.tobytes())
        data = apply_orientation(self.data.T, orientation).T
        affine = self.affine @ inv_ornt_aff(orientation, self.data.T.shape)
        # Without codes NIfTI derives the place from the shape alone, which holds no longer once axes moved.
        if np.array_equal(affine, self.affine):
            return replace(self, data=data)
        return Volume(data, affine_spacing_mm(affine, 3), affine)


def canonical_axes(volume: Volume) -> tuple[tuple[int, bool], ...]:
    """Return for each axis of `volume.to_canonical()` which axis of `volume` it is, and whether it runs backwards."""
    dims = volume.data.ndim
    if dims == 2:
        return ((0, False), (1, False))
    orientation = _orientation(volume.affine.tobytes())
    # nibabel counts axes in the file's order, x, y, z.
    axes = {dims - 1 - int(to): (dims - 1 - axis, flip < 0) for axis, (to, flip) in enumerate(orientation)}
    return tuple((axes[axis][0], bool(axes[axis][1])) for axis in range(dims))


@lru_cache(1024)
def _orientation(affine: bytes) -> np.ndarray:
    """nibabel's orientation of an affine, whose search for the nearest axes costs as much as reading a small file."""
    return np.asarray(io_orientation(np.frombuffer(affine).reshape(4, 4)))


def affine_spacing_mm(affine: np.ndarray, ndim: int) -> tuple[float, ...]:
    """Return the voxel steps of a 4x4 affine in array axis order, (z, y, x) or (y, x), in millimetres."""
    lengths = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    return tuple(float(length) for length in lengths[:ndim][::-1])


def geometry_difference(first: Volume, second: Volume, *, tolerance_voxels: float = 0.05) -> str | None:
    """Return how two volumes differ in shape or place, or None where they cover the same voxels.

    Places agree when no corner of the grid lies further apart than `tolerance_voxels` of the smallest step: far above
    the rounding in headers, far below a shift that matters to a segmentation.
    """
    if first.shape != second.shape:
        return f"shape {first.shape} against {second.shape}"
    size = (*reversed(first.shape), 1, 1)[:3]
    corners = np.array([[*corner, 1.0] for corner in product(*((0, length - 1) for length in size))])
    gap_mm = float(np.linalg.norm(corners @ (first.affine - second.affine).T, axis=1).max())
    if gap_mm <= tolerance_voxels * min(first.spacing_mm):
        return None
    if not np.allclose(first.spacing_mm, second.spacing_mm, rtol=_SPACING_TOLERANCE):
        return f"spacing {_numbers(first.spacing_mm)} mm against {_numbers(second.spacing_mm)} mm"
    return f"same shape and spacing, but affines that place voxels up to {gap_mm:.3g} mm apart"


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
