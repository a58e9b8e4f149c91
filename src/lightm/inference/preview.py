"""A picture of a case: the slices that show most of its segmentation, with the contours of the classes."""

from __future__ import annotations

import numpy as np

from lightm.evaluation.figures import to_png
from lightm.evaluation.pictures import PLANES, best_slice, overlay_prediction
from lightm.images.lazy import LazyVolume
from lightm.images.volume import Volume


def preview_png(image: Volume | LazyVolume, labels: Volume, classes: dict[str, int]) -> bytes:
    """Return a PNG of axial, coronal and sagittal slices (2D: the image itself) with the contours of `labels`.

    image: first channel, labels: its label map, both as stored; they are shown in radiological convention, with
    letters for the patient's right, left, anterior, posterior, superior, inferior. classes: foreground name to value.
    A 2D image is drawn as stored, without letters. The slice of a plane is that of `best_slice`. Cost: about a second;
    memory: one byte per voxel, and the three slices.
    """
    source = LazyVolume.of(image) if isinstance(image, Volume) else image
    if labels.data.ndim == 2:
        whole = tuple(slice(0, size) for size in labels.shape)
        rows, columns = labels.spacing_mm
        return to_png(overlay_prediction([("image", source.read(whole), labels.data, (rows, columns))], classes))
    upright = labels.to_canonical()
    slices = []
    for plane, axis, _ in PLANES:
        index = best_slice(upright.data, upright.data, list(classes.values()), axis)
        box = tuple(slice(index, index + 1) if i == axis else slice(0, n) for i, n in enumerate(upright.shape))
        rows, columns = (step for i, step in enumerate(upright.spacing_mm) if i != axis)
        cut = np.squeeze(source.read_canonical(box), axis=axis)
        title = f"{plane}, slice {index + 1} of {upright.shape[axis]}"
        slices.append((title, cut, np.take(upright.data, index, axis=axis), (rows, columns)))
    return to_png(overlay_prediction(slices, classes))
