"""DICOM-SEG: label maps as segmentation objects that name the source series, for viewers and archives.

Needs the extra `lightm-unet[dicom]` (highdicom, pydicom).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightm import __version__
from lightm.datasets.cases import Case
from lightm.errors import InputError, LightMError
from lightm.evaluation.figures import CLASS_COLOURS
from lightm.files import replacing
from lightm.images.dicom import Series, Stack, TiltError, find_series, is_dicom, stack_series
from lightm.images.dicom_files import MULTI_FRAME, PROJECTIONS, Header, pydicom_module, quietly, reason, text
from lightm.images.volume import Volume, geometry_difference
from lightm.inference.folder import CaseWriter
from lightm.inference.predictor import Predictor
from lightm.inference.record import describe_models
from lightm.interchange.segment_codes import segment_code
from lightm.labels import Values, each_value, mask_of

ENDING = ".seg.dcm"

_log = logging.getLogger("lightm.interchange")
# What a segmentation takes over from its source and an anonymised file may lack; DICOM lets these be empty.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def write_dicom_seg(
    path: Path | str,
    labels: Volume,
    source: Path | str | Series,
    classes: Mapping[str, Values],
    *,
    model: str = "segmentation network",
    colours: Sequence[str] = CLASS_COLOURS,
) -> Path:
    """Write a label map as one DICOM-SEG file that references its source series; return the file.

    labels: (Z, Y, X) whole numbers in the geometry that `read_series` gives `source`. source: a folder,
    `folder::SeriesInstanceUID`, an enhanced file or a `Series`. classes: name to label value; value 0 is the background
    and is left out, each other class is a segment, numbered from 1 in the order of values, also where no voxel has it.
    Regions, with several values each, are segments that overlap, numbered in the order in which they are given.
    model: the algorithm is named "LightM MODEL", of LightM's version, family Artificial Intelligence (DICOM CID 7162).
    colours: "#rrggbb" in the order of segments, repeated. Codes: `lightm.interchange.segment_codes`.

    The object is a binary segmentation (DICOM PS3.3 A.51): a frame for each segment and slice that has voxels of it,
    all frames of a map without any voxel. Patient and study are the source's; new UIDs each time. The file is written
    atomically.

    Raises InputError for another geometry, values that no class has, a source without the attributes that a reference
    needs, a projection, and where highdicom is missing; LightMError when writing fails. Memory: about twice the labels.
    """
    return _Writer(source, classes, model, colours).write(Path(path), labels)


def seg_writer(classes: Mapping[str, Values], *, model: str) -> CaseWriter:
    """Return what `predict_folder(extra_writer=...)` takes to write a DICOM-SEG beside each label map, CASE.seg.dcm.

    classes, model: as in `write_dicom_seg`. The source is the case's first image; a case that is no DICOM series, or
    one that cannot be referenced, is refused with an InputError before it is predicted.
    """

    def prepare(case: Case) -> Callable[[Volume, Path], Path]:
        if not is_dicom(case.images[0]):
            raise InputError(f"{case.images[0]}: not a DICOM series, which a DICOM-SEG must reference; leave it out")
        writer = _Writer(case.images[0], classes, model, CLASS_COLOURS)
        return lambda labels, target: writer.write(target.parent / (case.id + ENDING), labels)

    return prepare


def seg_writer_of_model(predictor: Predictor) -> CaseWriter:
    """Return `seg_writer` for the labels and the network's name of a model; InputError where highdicom is missing."""
    _highdicom()
    name = ""
    if sources := [one.source for one in predictor.models if one.source is not None]:
        found = describe_models(sources)
        name = " ".join(part for part in (found.name, found.dataset) if part)
    return seg_writer(predictor.plan.targets, model=name)


class _Writer:
    """One source series, checked, ready to be referenced by label maps."""

    def __init__(self, source: Path | str | Series, classes: Mapping[str, Values], model: str, colours: Sequence[str]):
        self.highdicom = _highdicom()
        series = source if isinstance(source, Series) else find_series(source)
        if series.headers[0].storage in PROJECTIONS:
            raise InputError(f"{series.folder}: a projection, not slices; DICOM-SEG is written for CT, MR and PET")
        self.regions = any(not isinstance(value, int) for value in classes.values())
        ordered = classes.items() if self.regions else sorted(classes.items(), key=lambda item: each_value(item[1]))
        self.classes = {name: value for name, value in ordered if value != 0}
        if not self.classes:
            raise InputError("a DICOM-SEG needs at least one class beside the background")
        try:
            self.stack = stack_series(series)
        except TiltError:
            raise InputError(
                f"{series.folder}: the slices are sheared (gantry tilt), and a label map lies on a straight grid, "
                "so that no DICOM-SEG can refer to them; predict without --dicom-seg"
            ) from None
        self.datasets, self.order = _referenced(series, self.stack)
        self.where, self.model, self.colours = series.folder, model, colours
        blank = np.broadcast_to(np.uint8(0), self.stack.shape)
        self.grid = Volume(blank, self.stack.spacing_mm, self.stack.affine)

    def write(self, path: Path, labels: Volume) -> Path:
        difference = geometry_difference(self.grid, labels)
        if difference is not None:
            raise InputError(f"{self.where}: the label map does not lie on this series: {difference}")
        if self.regions:  # they overlap: a mask for each along the last axis
            _check_values(labels.data, [one for value in self.classes.values() for one in each_value(value)])
            masks = [mask_of(labels.data, value) for value in self.classes.values()]
            numbers = np.stack(masks, axis=-1)[self.order].astype(np.uint8)
        else:
            values = [value for value in self.classes.values() if isinstance(value, int)]
            numbers = _segment_numbers(labels.data, values)[self.order]
        hd, frame, thickness = self.highdicom, self.stack.frames[0], self.grid.spacing_mm[0]
        name, number = f"LightM {self.model}"[:64], text(self.datasets[0], "SeriesNumber")
        try:
            with quietly():
                segmentation = hd.seg.Segmentation(
                    source_images=self.datasets,
                    pixel_array=numbers,
                    segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                    segment_descriptions=self._descriptions(),
                    series_instance_uid=hd.UID(),
                    series_number=1000 + int(number) if number is not None and number.isdigit() else 1000,
                    sop_instance_uid=hd.UID(),
                    instance_number=1,
                    manufacturer="LightM",
                    manufacturer_model_name="LightM",
                    software_versions=__version__,
                    device_serial_number="0",
                    content_label="SEGMENTATION",
                    content_description=name,
                    series_description=name,
                    pixel_measures=hd.PixelMeasuresSequence(frame.spacing_mm, thickness, thickness),
                    omit_empty_frames=bool(numbers.any()),
                )
                with replacing(path) as temporary:
                    segmentation.save_as(temporary)
        except LightMError:
            raise
        except Exception as error:  # attributes of the source that highdicom refuses
            raise InputError(
                f"{self.where}: no DICOM-SEG can refer to this series ({reason(error)}); mend its attributes"
            ) from error
        return path

    def _descriptions(self) -> list[Any]:
        hd = self.highdicom
        codes = pydicom_module().sr.codedict.codes
        algorithm = hd.AlgorithmIdentificationSequence(
            name=f"LightM {self.model}"[:64], family=codes.cid7162.ArtificialIntelligence, version=__version__
        )
        made = []
        for number, name in enumerate(self.classes, start=1):
            code = segment_code(name)
            red, green, blue = (int(self.colours[(number - 1) % len(self.colours)][i : i + 2], 16) for i in (1, 3, 5))
            one = hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=self._code(code.category),
                segmented_property_type=self._code(code.kind),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                anatomic_regions=[self._code(code.region)] if code.region else None,
            )
            one.RecommendedDisplayCIELabValue = cielab((red, green, blue))
            if code.side is not None:
                one.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
                    self._code(code.side)
                ]
            made.append(one)
        return made

    def _code(self, code: tuple[str, str]) -> Any:
        return self.highdicom.sr.CodedConcept(code[0], "SCT", code[1])


def cielab(rgb: tuple[int, int, int]) -> list[int]:
    """Return an sRGB colour as DICOM stores CIELab (PS3.3 C.10.7.1.1): three 16-bit numbers, white point D50."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255])
    # sRGB primaries adapted to D50 (Bradford), as in ICC profiles.
    to_xyz = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    )
    share = to_xyz @ linear / np.array([0.96422, 1.0, 0.82521])
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    lightness, a, b = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    stored = (lightness * 65535 / 100, (a + 128) * 65535 / 255, (b + 128) * 65535 / 255)
    return [int(np.clip(round(float(value)), 0, 65535)) for value in stored]


def _highdicom() -> Any:
    pydicom_module()
    try:
        import highdicom
        import pydicom.sr.codedict  # noqa: F401
    except ImportError:
        raise InputError(
            "writing DICOM-SEG needs highdicom, which is not installed; pip install 'lightm-unet[dicom]'"
        ) from None
    return highdicom


def _check_values(data: np.ndarray, values: list[int]) -> None:
    found = {int(value) for value in np.unique(data)}
    unknown = sorted(found - {0, *values})
    if unknown:
        raise InputError(f"the label map holds values {unknown[:5]} that no class has; the classes have {values}")


def _segment_numbers(data: np.ndarray, values: list[int]) -> np.ndarray:
    """Return label values as segment numbers, 1 for the first class; 0 stays the background."""
    _check_values(data, values)
    numbers = np.zeros(data.shape, dtype=np.uint8 if len(values) < 256 else np.uint16)
    for number, value in enumerate(values, start=1):
        numbers[data == value] = number
    return numbers


def _referenced(series: Series, stack: Stack) -> tuple[list[Any], np.ndarray]:
    """Return the source images in the order that highdicom wants, and the slice of the stack that each frame shows."""
    headers = list(dict.fromkeys(frame.header for frame in stack.frames))
    if headers[0].storage not in MULTI_FRAME:
        return [_complete(header, series) for header in headers], np.arange(len(headers))
    if len(headers) > 1:
        raise InputError(
            f"{series.folder}: {len(headers)} enhanced files make up one stack; a DICOM-SEG can reference one such "
            "file. Convert the series to single-frame images"
        )
    shown = {frame.index: place for place, frame in enumerate(stack.frames)}
    shown |= {frame.index: place for frame, place in stack.dropped}
    return [_complete(headers[0], series)], np.array([shown[i] for i in range(len(shown))])


def _complete(header: Header, series: Series) -> Any:
    """Return a source image with the identifiers that a reference needs.

    Anonymisers blank them at times. The instance's own stands in the file's preamble too; study and series get UIDs
    made from the frame of reference and the first instance, so that all objects made from one series agree.
    """
    data = header.data
    if not header.uid or text(data, "FrameOfReferenceUID") is None:
        missing = "FrameOfReferenceUID" if header.uid else "SOPInstanceUID"
        raise InputError(
            f"{header.file}: {missing} is missing, so that no DICOM-SEG can refer to the image; restore it"
        )
    data = copy.copy(data)
    data.SOPInstanceUID, data.SOPClassUID = header.uid, header.storage
    made = []
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if text(data, keyword) is None:
            first = min(one.uid for one in series.headers)
            seeds = [keyword, str(data.FrameOfReferenceUID), first]
            setattr(data, keyword, pydicom_module().uid.generate_uid(entropy_srcs=seeds))
            made.append(keyword)
    if made and header is series.headers[0]:
        _log.warning("%s: %s missing; the DICOM-SEG names made ones", series.folder, " and ".join(made))
    for keyword in _MAY_BE_EMPTY:
        if keyword not in data:
            setattr(data, keyword, None)
    return data
