"""What is odd about an image for a model: what its training images, as its fingerprint has them, were never like."""

from __future__ import annotations

from collections.abc import Sequence

from lightm.datasets.intensities import image_ends, unusual
from lightm.images.lazy import LazyVolume
from lightm.preparation.plan import Plan

_FACTOR = 2.0  # by which a step or a length may lie outside of those of the training images


def suspicions(images: Sequence[LazyVolume], plan: Plan) -> list[str]:
    """Return what is odd about the images of a case, one per channel; nothing for models that hold too little to tell.

    Intensities are looked at where their scale reaches the network: a z-score and a range of 0 to 1 take it off. Cost:
    48 slices of each such channel are read.
    """
    known, found = plan.fingerprint, []
    # An imported plan may know no intensities.
    for image, name, scheme, seen in zip(images, plan.channels, plan.normalization, known.intensities, strict=False):
        if scheme.scheme in ("zscore", "rescale_to_0_1") or seen.image_low is None or seen.image_high is None:
            continue
        if told := unusual(image_ends(image), seen.image_low, seen.image_high):
            found.append(
                f"channel '{name}': intensities {told} in the training images; check unit, offset and padding, since "
                "the labels are wrong where the scale is"
            )
    if known.extent_mm_min is None or known.extent_mm_max is None:
        return found
    place = images[0].geometry.to_canonical()
    extent = [size * step for size, step in zip(place.shape, place.spacing_mm, strict=True)]
    for what, values, low, high in (
        ("voxels of", place.spacing_mm, known.spacing_mm_min, known.spacing_mm_max),
        ("a field of view of", extent, known.extent_mm_min, known.extent_mm_max),
    ):
        if any(v > _FACTOR * b or v < a / _FACTOR for v, a, b in zip(values, low, high, strict=True)):
            ends = _numbers(low) if list(low) == list(high) else f"{_numbers(low)} to {_numbers(high)}"
            found.append(
                f"{what} {_numbers(values)} mm (x, y, z), against {ends} mm in the training images; the model was not "
                "trained for such scans, look at the labels"
            )
    return found


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in reversed(values))
