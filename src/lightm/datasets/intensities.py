"""What the intensities of a channel say of it: values that cannot be scaled, that look like CT, or that stand out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightm.datasets.cases import Dataset, Problem, error, warning
from lightm.images.lazy import LazyVolume, spread_voxels
from lightm.images.volume import Volume

_SAMPLES = 10_000  # foreground voxels of a case that the intensities are taken from
_SHARE = 0.25  # of the usual range, by which an end of an image's range may lie outside of what is known
_CT_LOW, _CT_PADDING = -500, -1100  # lungs and air lie below the one, and nothing but padding below the other
_LEAST_PADDING = -5000  # -1024, -2000, -2048, -3024 and -4096 are in use
KEPT = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")
"""Names of channels, in lower case, that choose their normalization, as in nnU-Net; CT does so too."""


@dataclass(frozen=True, eq=False)
class Intensities:
    """One channel of one case. ends: percentiles 1 and 99 of the whole image; samples: (10000,) of its foreground.

    from_foreground: False where the case has no foreground, and the samples are from anywhere.
    """

    ends: tuple[float, float]
    samples: np.ndarray
    from_foreground: bool


def image_ends(image: LazyVolume) -> tuple[float, float]:
    """Return percentiles 1 and 99 of an image, of some hundred thousand voxels spread over it."""
    low, high = np.percentile(spread_voxels(image), [1, 99])
    return float(low), float(high)


def case_intensities(
    case_id: str, images: Sequence[Volume], label: Volume | None, ignore_label: int | None
) -> list[Intensities]:
    """Return what the images of a case hold; the voxels that are looked at depend on its id alone."""
    inside = np.zeros(0, dtype=np.int64)
    if label is not None:
        ignored = -1 if ignore_label is None else ignore_label
        inside = np.flatnonzero((label.data != 0) & (label.data != ignored))
    rng = np.random.default_rng(zlib.crc32(case_id.encode()))
    found = inside.size > 0
    chosen = rng.choice(inside, _SAMPLES) if found else rng.integers(images[0].data.size, size=_SAMPLES)
    return [
        Intensities(image_ends(LazyVolume.of(volume)), volume.data.ravel()[chosen].astype(np.float64), found)
        for volume in images
    ]


def pooled(cases: Sequence[Intensities]) -> np.ndarray:
    """Return the samples of all cases with foreground together, or of all cases where none has any."""
    return np.concatenate([found.samples for found in [one for one in cases if one.from_foreground] or cases])


def is_flat(samples: np.ndarray) -> bool:
    """Return whether all but a few of the samples are one value, which no range can be taken from."""
    low, high = np.percentile(samples, [0.5, 99.5])
    return bool(low >= high)


def intensity_problems(dataset: Dataset, found: Sequence[Sequence[Intensities]]) -> list[Problem]:
    """Return what is wrong or odd with the intensities of a dataset's channels; `found`: by case, then by channel."""
    problems = []
    for index, name in enumerate(dataset.channels):
        cases = [one[index] for one in found]
        files = [case.images[index] for case in dataset.cases]
        kind = name.strip().lower()
        if kind == "ct" and is_flat(pooled(cases)):
            at = next((i for i, one in enumerate(cases) if is_flat(one.samples)), 0)
            value = float(np.median(cases[at].samples))
            message = f"channel '{name}': the foreground has one value only, {value:g}, so it cannot be scaled as CT"
            cure = (
                "if it is no CT but a mask, call the channel noNorm, which keeps its values (channel_names in "
                "dataset.json, or --channels)"
            )
            problems.append(error(dataset.cases[at].id, files[at], message, cure))
        lows = np.array([one.ends[0] for one in cases])
        if kind not in ("ct", *KEPT) and _LEAST_PADDING <= float(np.median(lows)) <= _CT_LOW:
            padded = [file for file, low in zip(files, lows, strict=True) if low < _CT_PADDING]
            message = f"channel '{name}' holds values that look like CT, from {lows.min():g} on"
            if padded:
                message += f" ({len(padded)} of {len(files)} are padded with less than air, as {padded[0].name})"
            cure = "if it is CT, call it so, so that its values are clipped and scaled alike: --channels CT"
            problems.append(warning(None, dataset.root, message, f"{cure}, or channel_names in dataset.json"))
        if kind in ("ct", "nonorm") and len(cases) > 2:
            known = tuple(np.median([one.ends for one in cases], axis=0))
            for case, file, one in zip(dataset.cases, files, cases, strict=True):
                if told := unusual(one.ends, [known[0]] * 2, [known[1]] * 2, share=2 * _SHARE):
                    message = f"channel '{name}': intensities {told} in the middle of all cases"
                    problems.append(warning(case.id, file, message, "check its unit, offset and padding"))
    return problems


def unusual(
    ends: tuple[float, float], low: Sequence[float], high: Sequence[float], *, share: float = _SHARE
) -> str | None:
    """Return how an image's range differs from those that are known, or None where it does not.

    ends: percentiles 1 and 99 of the image. low, high: smallest and largest value of each among what is known. An end
    may lie outside by `share` of the usual range: HU + 1024, 0 to 255 and 0 to 1 do not pass for HU then, and a scan
    with less air or more contrast does.
    """
    allowed = share * (float(np.mean(high)) - float(np.mean(low)))
    inside = [a - allowed <= end <= b + allowed for end, (a, b) in zip(ends, (low, high), strict=True)]
    if all(inside):
        return None
    return f"from {ends[0]:.4g} to {ends[1]:.4g} (percentiles 1 and 99), against {_span(low)} to {_span(high)}"


def _span(ends: Sequence[float]) -> str:
    low, high = (f"{end:.4g}" for end in ends)
    return low if low == high else f"{low}..{high}"
