"""Class probabilities of a case as one NIfTI file, made slab by slab."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import nibabel
import numpy as np
import torch
from torch import Tensor

from lightm.errors import InputError
from lightm.files import atomic_file, disk_refusals
from lightm.images.io import file_suffix
from lightm.images.lazy import DiskArray
from lightm.images.volume import Volume, canonical_axes
from lightm.inference.to_native_space import piece_bytes

_BLOCK_VOXELS = 4 << 20


class ProbabilityFile:
    """Softmax probabilities of all classes in the geometry of an image: a NIfTI file of axes (x, y, z, class).

    Stored as uint8 with a slope of 1/255, so that readers give 0 to 1 in steps of 0.004. A 2D image gives z = 1, a PNG
    image too: PNG holds no classes. Until all slabs are there they lie in a temporary file beside `path`, one byte a
    voxel and class, since NIfTI wants one class after the other. `path` appears complete or not at all.
    Raises InputError for a name that is not .nii or .nii.gz, LightMError when the disk refuses. Memory: some 10 MB.
    """

    def __init__(self, path: Path, native: Volume, classes: int) -> None:
        check_path(path)
        if max(*native.shape, classes) > 32767:
            raise InputError(f"{path}: NIfTI-1 holds at most 32767 voxels along an axis, got shape {native.shape}")
        self.path = path
        self.native = native
        self.classes = classes
        first, *rest = native.to_canonical().shape
        with disk_refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._stored = DiskArray((first, classes, *rest), np.uint8, path.parent)
        self._done = 0

    def add(self, logits: Tensor) -> None:
        """Take the logits (K, n, *rest) of the next n slices of the canonical image."""
        parts = torch.softmax(logits, 0).mul_(255).round_().to(torch.uint8).transpose(0, 1).contiguous().numpy()
        box = (slice(self._done, self._done + len(parts)), *(slice(0, size) for size in self._stored.shape[1:]))
        self._stored.write(box, parts)
        self._done += len(parts)

    def finish(self) -> None:
        """Write the file."""
        with atomic_file(self.path) as stream:
            if file_suffix(self.path) == ".nii":
                self._encode(stream)
            else:
                with gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=1, mtime=0) as packed:
                    self._encode(cast(BinaryIO, packed))
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


def probability_bytes(classes: int, shape: Sequence[int]) -> int:
    """What adding the logits of an image of `shape`, piece by piece, needs at most."""
    return 2 * piece_bytes(classes, shape) + 4 * _BLOCK_VOXELS


def check_path(path: Path) -> None:
    """Raise InputError for a name that is not that of a NIfTI file."""
    if file_suffix(path) not in (".nii", ".nii.gz"):
        raise InputError(f"{path}: probabilities are written as NIfTI; use a name that ends in .nii.gz or .nii")
