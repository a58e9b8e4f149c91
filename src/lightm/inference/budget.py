"""Memory of prediction: limits as text, what this process holds, what a case needs, and what can be in memory.

A limit is kept by choosing where three arrays lie that are not needed all at once: the image in the dtype of its
file, the image on the network's grid, and the sums of logits. Each is in memory, or in a temporary file of which a
block at a time is read. The choice changes no number, so a limit changes no label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from lightm import memory
from lightm.errors import InputError
from lightm.inference import native_space, sliding
from lightm.preparation.plan import Plan
from lightm.preparation.resample import resample_bytes, resampled_shape

# What allocators keep, and what is too small to be counted: with 64 MiB a real CT came out at 43 MB over its limit.
MARGIN = 160 << 20
# The most of the presets at 128^3: `lightm`, 807 MB; below 64^3 fixed costs take over, some 130 MB at most
# (docs/performance.md, docs/prediction.md). Used where no network can be measured.
_BYTES_PER_VOXEL = 385
_MIN_BYTES = 130_000_000
# Of any network: its input, eight features and two classes, in float32.
_LEAST_BYTES_PER_VOXEL = 44
# Removal of stray components: bytes per voxel beside the label map.
_RULES_BYTES = 6

_UNITS = {"": 1, "B": 1, **{u + "B": 1000**n for n, u in enumerate("KMGT", 1)}}
_UNITS |= {u + "IB": 1024**n for n, u in enumerate("KMGT", 1)}
_AMOUNT = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*")

_earlier_peak = 0


def parse_memory(text: str | int) -> int:
    """Return bytes for "2GB", "800 MB", "1.5GiB" or a number of bytes; kB, MB, GB, TB count by 1000, KiB ... by 1024.

    Raises InputError for anything else, and for less than one byte.
    """
    match = _AMOUNT.fullmatch(str(text))
    if match is None or match["unit"].upper() not in _UNITS:
        raise InputError(f"memory '{text}': expected a number with a unit, such as 2GB, 800MB or 1.5GiB")
    value = int(float(match["number"]) * _UNITS[match["unit"].upper()])
    if value < 1:
        raise InputError(f"memory '{text}': expected more than nothing, such as 2GB")
    return value


def peak_resident_bytes() -> int | None:
    """Return the most memory that this process has held so far, in bytes; None where the system does not say."""
    now = memory.high_water()
    return None if now is None else max(now, _earlier_peak)


def resident_bytes() -> int | None:
    """Return what this process holds now, after freed memory went back to the system; where only the peak is known
    (macOS) that, None where the system says nothing.
    """
    memory.give_back()
    now = memory.resident()
    return memory.high_water() if now is None else now


def call_bytes(call: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grows at most while `call` runs, once; None where it cannot be measured."""
    global _earlier_peak
    _earlier_peak = max(_earlier_peak, memory.high_water() or 0)  # the mark is reset for the measurement
    return memory.peak_of(call)


@dataclass(frozen=True)
class CaseSize:
    """What decides the memory of a case.

    shape: the image in canonical orientation. grid: the same at the plan's spacing. patch: one window. itemsize: bytes
    per voxel of all channels as they are held, 0 for images that the caller holds. rules: there is post-processing.
    models: of an ensemble, whose largest grid and patch are given.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    patch: tuple[int, ...]
    classes: int
    channels: int
    itemsize: int
    label_itemsize: int = 1
    rules: bool = False
    probabilities: bool = False
    models: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Which arrays are in memory (True) or in temporary files (False)."""

    sums: bool = True
    grid: bool = True
    voxels: bool = True


def case_bytes(case: CaseSize, window_bytes: int, held: MemoryPlan) -> int:
    """Return by how many bytes the process grows at most for a case; window_bytes: of one call of the network."""
    voxels, resampled = prod(case.shape), case.shape != case.grid
    raw = voxels * case.itemsize * held.voxels
    grid = 4 * prod(case.grid) * case.channels * held.grid * resampled
    # First the images are brought onto the grid.
    prepare = 48 << 20
    if resampled:
        across = 4 * case.shape[0] * prod(case.grid[1:]) * held.grid
        prepare = max(prepare, resample_bytes(case.shape, case.grid)) + across
    # Then windows are visited, in sums of patch depth, and classes found on the image's own grid.
    lengths = [max(pair) for pair in zip(case.grid, case.patch, strict=True)]
    sums = sliding.sums_bytes(case.classes, case.patch, lengths, held.sums)
    run = window_bytes + prod(case.patch) * (8 * case.channels + 24)
    slab = sliding.slab_values(case.classes, lengths)
    grid_shape = (case.grid[0], *lengths[1:])
    hand_on = native_space.class_indices_bytes(case.classes, grid_shape, case.shape, slab, resampled)
    hand_on += native_space.probability_bytes(case.classes, case.shape) * case.probabilities
    # The network's activations are gone when classes are found, and the sums of one band are written.
    predict = voxels * case.label_itemsize + grid + raw * (not resampled)
    if case.models == 1:
        predict += max(sums + run, sums * held.sums + hand_on)
    else:  # while one network runs, all others hold their sums and what is not handed on yet
        predict += (case.models - 1) * grid + raw * resampled + case.models * (sums + hand_on) + run
    clean = voxels * (case.label_itemsize + _RULES_BYTES) * case.rules
    return max(raw + grid + prepare, predict, clean)


def choose(case: CaseSize, window_bytes: int, limit: int, held: int) -> MemoryPlan | None:
    """Return what can be in memory where the process holds `held` bytes and may hold `limit`; None where nothing fits.

    Files are taken in the order in which they cost least time.
    """
    plans = (MemoryPlan(sums, grid, voxels) for voxels, grid, sums in product((True, False), repeat=3))
    return next((plan for plan in plans if held + MARGIN + case_bytes(case, window_bytes, plan) <= limit), None)


def check_sizes(case: CaseSize, network_spacing_mm: Sequence[float]) -> None:
    """Raise InputError, with the sizes, for a case whose arrays alone are more than the machine can give now.

    A lower bound, as the network is counted with the least that any has: what it lets through may still be too much.
    """
    there = memory.available_bytes()
    needed = case_bytes(case, _LEAST_BYTES_PER_VOXEL * prod(case.patch), MemoryPlan())
    if there is not None and needed > there:
        at = " x ".join(f"{step:.4g}" for step in reversed(network_spacing_mm))
        raise InputError(
            f"an image of shape {case.shape}, {case.grid} at the model's spacing of {at} mm (x, y, z), needs at least "
            f"{needed / 1e9:.3g} GB of memory for {case.classes} classes in windows of {case.patch}, and "
            f"{there / 1e9:.3g} GB are there; set a limit (--max-memory), which keeps arrays on disk, or crop the image"
        )


def min_bytes(case: CaseSize, window_bytes: int) -> int:
    """Return what a case needs at least, with the margin, beside what the process holds."""
    return MARGIN + case_bytes(case, window_bytes, MemoryPlan(False, False, False))


def estimate_memory(
    shape: Sequence[int],
    plan: Plan,
    *,
    spacing_mm: Sequence[float] | None = None,
    itemsize: int = 2,
    window_bytes: int | None = None,
    rules: bool = False,
    probabilities: bool = False,
) -> int:
    """Return the bytes that a prediction without limit adds to those of the process, its images included.

    shape, spacing_mm: of the image, in canonical orientation; spacing_mm=None: that of the plan. itemsize: bytes per
    voxel of one channel in its file. window_bytes: of one call of the network on a patch (`Predictor.window_bytes`); by
    default 385 per voxel, the most that was measured of the presets at 128^3, and at least 130 MB. Baselines can need
    several times as much.
    """
    grid = tuple(shape) if spacing_mm is None else resampled_shape(shape, spacing_mm, plan.spacing_mm)
    channels, label_itemsize = len(plan.channels), 1 if max(plan.values) <= 255 else 2
    sizes = (tuple(shape), grid, tuple(plan.patch_size))
    case = CaseSize(*sizes, len(plan.outputs), channels, itemsize * channels, label_itemsize, rules, probabilities)
    if window_bytes is None:
        window_bytes = max(_MIN_BYTES, _BYTES_PER_VOXEL * prod(case.patch))
    return case_bytes(case, window_bytes, MemoryPlan())


def megabytes(count: int) -> str:
    """Return bytes in megabytes, rounded up."""
    return f"{-(-count // 10**6)} MB"
