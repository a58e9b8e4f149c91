"""Post-processing of label maps: stray components, components that are too small, holes.

The rules are plain data, kept with the model (`postprocess` in model.json) as one ordered list. Most models have none:
`lightm.inference.postprocess_choice` takes a step where it is safe and helps beyond chance. Components are joined over
faces (edges in 2D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from lightm.config_io import validated
from lightm.errors import InputError

_Value = Annotated[int, Field(ge=1, le=32767)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
Box = tuple[slice, ...]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    gain: dict[int, _Number] = {}
    """Rise of the mean DSC on the validation cases, for each label value."""


class KeepLargest(_Step):
    """Of the voxels that hold one of `values` only the largest component (the first of equals) stays; the rest is 0."""

    rule: Literal["keep_largest"] = "keep_largest"
    values: Annotated[tuple[_Value, ...], Field(min_length=1, max_length=1000)]


class DropSmall(_Step):
    """Components of `value` smaller than `below` become 0.

    unit: "ml" for label maps of 3 axes, "mm2" for 2. Files without a spacing, such as PNG, count pixels.
    """

    rule: Literal["drop_small"] = "drop_small"
    value: _Value
    below: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    unit: Literal["ml", "mm2"]


class FillHoles(_Step):
    """Background that `value` encloses becomes `value`; other classes in there are left alone.

    Enclosed is a component of all other values that does not reach the border of the image.
    """

    rule: Literal["fill_holes"] = "fill_holes"
    value: _Value


Step = KeepLargest | DropSmall | FillHoles


class Trial(BaseModel):
    """A step that was tried on the validation cases, upon those taken before, and what came of it.

    what: the step in words. why: what speaks against it, or for it. gain: rise of the mean DSC for each label value.
    better, worse: cases in which the mean DSC over the step's classes rises and falls; p: of the one-sided sign test.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Annotated[Step, Field(discriminator="rule")]
    what: str
    taken: bool
    why: str
    gain: dict[int, _Number] = {}
    better: int = 0
    worse: int = 0
    p: _Number = 1.0


class Postprocess(BaseModel):
    """The post-processing of a model: its steps in order, and what they were chosen by.

    dsc_before, dsc_after: the mean DSC over the validation `cases` for each label value, 1 where it is absent in both.
    tried: every step that was tried. why: the reason, where none could be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[tuple[Annotated[Step, Field(discriminator="rule")], ...], Field(max_length=1000)] = ()
    cases: Annotated[int, Field(ge=0)] = 0
    dsc_before: dict[int, _Number] = {}
    dsc_after: dict[int, _Number] = {}
    tried: Annotated[tuple[Trial, ...], Field(max_length=4000)] = ()
    why: str = ""


class Change(BaseModel):
    """What post-processing changed of one class in one label map.

    removed_components: that became background; one that holds several classes counts for each of them. filled_holes:
    that became this class.
    """

    model_config = ConfigDict(extra="forbid")

    removed_voxels: Annotated[int, Field(ge=0)] = 0
    removed_components: Annotated[int, Field(ge=0)] = 0
    filled_voxels: Annotated[int, Field(ge=0)] = 0
    filled_holes: Annotated[int, Field(ge=0)] = 0

    def __str__(self) -> str:
        parts = []
        if self.removed_components:
            parts.append(f"{counted(self.removed_components, 'component')} ({self.removed_voxels} voxels) removed")
        if self.filled_holes:
            parts.append(f"{counted(self.filled_holes, 'hole')} ({self.filled_voxels} voxels) filled")
        return " and ".join(parts) or "nothing changed"


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it is not 1."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_postprocess(info: Mapping[str, Any], where: str) -> Postprocess:
    """Return the post-processing that a model's description holds; that of a model without one has no steps.

    info: the content of model.json. `{"keep_largest": [[1, 2], [1]]}`, which older models hold, is read as steps.
    Raises InputError, which begins with `where` (the file), for anything else that does not fit the schema.
    """
    content = info.get("postprocess", {})
    if isinstance(content, dict) and content.keys() == {"keep_largest"} and isinstance(content["keep_largest"], list):
        content = {"steps": [{"rule": "keep_largest", "values": values} for values in content["keep_largest"]]}
    if not isinstance(content, dict):
        raise InputError(f"{where}: postprocess: expected keys and values, got {type(content).__name__}")
    return validated(Postprocess, content, f"{where}: postprocess")


def describe(step: Step, names: Mapping[int, str]) -> str:
    """One line for a reader: what a step does to which classes. names: of the label values."""
    if isinstance(step, KeepLargest):
        classes = " and ".join(names.get(value, str(value)) for value in step.values)
        return f"keep the largest component of {classes}"
    name = names.get(step.value, str(step.value))
    if isinstance(step, DropSmall):
        return f"drop components of {name} below {step.below:g} {step.unit}"
    return f"fill holes in {name}"


def apply_rules(
    labels: np.ndarray,
    rules: Sequence[Step | Sequence[int]],
    spacing_mm: Sequence[float] | None = None,
    *,
    in_place: bool = False,
    changes: dict[int, Change] | None = None,
) -> np.ndarray:
    """Apply one step after the other and return the label map; `labels` itself where nothing changes.

    labels: integers, (Z, Y, X) or (Y, X), background 0. rules: steps; label values alone stand for `KeepLargest`.
    spacing_mm: one spacing per axis, which `DropSmall` needs. in_place: write to `labels` instead of to a copy.
    changes: is given, for each label value that a step changes, how much of it.

    Raises InputError for a DropSmall without spacing or in another unit than the number of axes asks for.
    Time: linear in the voxels of the classes' bounding boxes, and one pass over the image to find these. Memory: 5
    bytes per voxel of the box at work and 10 per component (and without `in_place` the copy).
    """
    if not rules:
        return labels
    steps = [rule if isinstance(rule, BaseModel) else KeepLargest(values=tuple(rule)) for rule in rules]
    for step in steps:
        if isinstance(step, DropSmall):
            _check_unit(step, labels.ndim, spacing_mm)
    highest = max(max(step.values) if isinstance(step, KeepLargest) else step.value for step in steps)
    voxel = 1.0 if spacing_mm is None else voxel_size(spacing_mm)
    work = _Work(labels, highest, in_place, changes)
    for step in steps:
        if isinstance(step, FillHoles):
            _fill_holes(work, step.value)
        elif isinstance(step, KeepLargest):
            _remove(work, step.values, None)
        else:
            _remove(work, (step.value,), step.below / voxel)
    return work.labels


def unit_of(dims: int) -> Literal["ml", "mm2"]:
    """The unit of sizes in label maps with that many axes."""
    return "ml" if dims == 3 else "mm2"


def voxel_size(spacing_mm: Sequence[float]) -> float:
    """Size of one voxel: in ml for three steps, in mm2 for two."""
    return math.prod(spacing_mm) / (1000 if len(spacing_mm) == 3 else 1)


def component_sizes(mask: np.ndarray) -> np.ndarray:
    """Voxels of each component of a mask, in raster order of their first voxels. Time and memory as `apply_rules`."""
    return _sizes(*_components(mask))[1:]


def _check_unit(step: DropSmall, dims: int, spacing_mm: Sequence[float] | None) -> None:
    if spacing_mm is None or len(spacing_mm) != dims:
        raise InputError(f"drop_small needs the voxel spacing, {dims} numbers, got {spacing_mm}; pass spacing_mm")
    if step.unit != unit_of(dims):
        raise InputError(
            f"drop_small below {step.below:g} {step.unit} does not fit a label map with {dims} axes, which is measured "
            f"in {unit_of(dims)}; correct the model's postprocess in model.json"
        )


class _Work:
    """A label map at work: copied before the first change unless it may be written to."""

    def __init__(self, labels: np.ndarray, highest: int, in_place: bool, changes: dict[int, Change] | None) -> None:
        self.labels, self._changes = labels, changes
        self._own = in_place
        self._boxes: list[Box | None] = ndimage.find_objects(labels, highest)  # no step makes any of them larger

    def box(self, values: Sequence[int]) -> Box | None:
        """The bounding box of the values in the map as it came; None without a voxel of them."""
        boxes = [box for value in values if (box := self._boxes[value - 1]) is not None]
        if not boxes:
            return None
        return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))

    def remove(self, box: Box, components: np.ndarray, chosen: np.ndarray, values: Sequence[int]) -> None:
        """Set the chosen of the numbered components, which hold `values`, to 0."""
        for value in values if self._changes is not None else ():
            voxels, parts = self._count(box, components, chosen, value)
            self._note(value, removed_voxels=voxels, removed_components=parts)
        self._write(box, components, chosen, None, 0)

    def fill(self, box: Box, components: np.ndarray, chosen: np.ndarray, value: int) -> None:
        """Set what is background in the chosen of the numbered components to `value`."""
        if self._changes is not None:
            voxels, parts = self._count(box, components, chosen, 0)
            self._note(value, filled_voxels=voxels, filled_holes=parts)
        self._write(box, components, chosen, 0, value)

    def _write(self, box: Box, components: np.ndarray, chosen: np.ndarray, old: int | None, value: int) -> None:
        """Set the chosen components, where they are `old` (None: whatever they are), to a value."""
        for part in _parts(components) if chosen.any() else ():
            where = chosen[components[part]]
            if old is not None:
                where &= self.labels[box][part] == old
            if where.any():
                if not self._own:
                    self.labels, self._own = self.labels.copy(), True
                self.labels[box][part][where] = value

    def _count(self, box: Box, components: np.ndarray, chosen: np.ndarray, value: int) -> tuple[int, int]:
        """How many voxels of the chosen components hold a value, and how many of these components do."""
        voxels, touched = 0, np.zeros(chosen.size if chosen.any() else 0, bool)
        for part in _parts(components) if touched.size else ():
            numbers = components[part][chosen[components[part]] & (self.labels[box][part] == value)]
            voxels += numbers.size
            touched[numbers] = True
        return voxels, int(np.count_nonzero(touched))

    def _note(self, value: int, **more: int) -> None:
        if self._changes is not None and any(more.values()):
            change = self._changes.setdefault(value, Change())
            for name, count in more.items():
                setattr(change, name, getattr(change, name) + count)


def _remove(work: _Work, values: Sequence[int], below: float | None) -> None:
    """Set components of fewer than `below` voxels to 0; without it all but the largest."""
    box = work.box(values)
    if box is None:
        return
    mask = work.labels[box] == values[0]
    for value in values[1:]:
        mask |= work.labels[box] == value
    components, count = _components(mask)
    del mask
    sizes = _sizes(components, count)
    sizes[0] = 0
    gone = np.arange(count + 1) != sizes.argmax() if below is None else sizes < below
    gone[0] = False
    work.remove(box, components, gone, values)


def _fill_holes(work: _Work, value: int) -> None:
    box = work.box((value,))
    if box is None:
        return
    components, count = _components(work.labels[box] != value)
    # what reaches the border of the class's box reaches that of the image
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False
    for axis in range(components.ndim):
        for end in (0, -1):
            enclosed[np.take(components, end, axis)] = False
    work.fill(box, components, enclosed, value)


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers of the components from 1 on, in raster order, 0 elsewhere; and how many there are."""
    components = np.empty(mask.shape, np.int32)
    return components, int(ndimage.label(mask, output=components))


def _sizes(components: np.ndarray, count: int) -> np.ndarray:
    """Voxels of each number from 0 to `count`."""
    sizes = np.zeros(count + 1, np.int64)
    for part in _parts(components):
        numbers = components[part].ravel()
        if count < numbers.size:
            sizes += np.bincount(numbers, minlength=count + 1)
        else:  # as many components as voxels in a part: a table a part would not be linear
            np.add.at(sizes, numbers, 1)
    return sizes


def _parts(array: np.ndarray) -> Iterator[slice]:
    """Slices along the first axis of about 2^18 voxels: indexing by an array takes 8 bytes per voxel."""
    step = max(1, (1 << 18) * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        yield slice(start, start + step)
