"""Small DICOM series for tests: oblique CT slices, enhanced multi-frame MR, and single odd files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CT, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4.1"
STUDY, FRAME_OF_REFERENCE, SERIES = "1.2.826.0.1.3680043.2.1", "1.2.826.0.1.3680043.2.2", "1.2.826.0.1.3680043.2.3"

# Turned by 20 degrees about the left-right axis, so that no axis is the patient's but one.
ORIENTATION = [1.0, 0.0, 0.0, 0.0, float(np.cos(0.35)), float(np.sin(0.35))]
SPACING = (0.8, 0.7)  # between rows, between columns
STEP = 2.5
ORIGIN = np.array([-12.0, 8.0, 30.0])


def normal() -> np.ndarray:
    return np.cross(ORIENTATION[:3], ORIENTATION[3:])


def stored_pixels(shape: tuple[int, int, int] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    """Stored values (slices, rows, columns) in 12 bits; the first slice has the lowest place along the normal."""
    return np.random.default_rng(seed).integers(0, 4096, shape).astype(np.uint16)


def write_ct(
    folder: Path,
    pixels: np.ndarray,
    *,
    series: str = SERIES,
    change: Callable[[int, Any], None] | None = None,
    intercept: float = -1024,
    slope: float = 1,
    prefix: str = "im",
) -> list[Path]:
    """Write one file a slice, named against their order; change(slice, data set) may spoil each before it is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for z, plane in enumerate(pixels):
        data = base(CT, "CT", series, f"{series}.{z + 1}", plane)
        data.ImagePositionPatient = [round(float(v), 6) for v in ORIGIN + z * STEP * normal()]
        data.ImageOrientationPatient = ORIENTATION
        data.PixelSpacing = list(SPACING)
        data.SliceThickness = STEP
        data.InstanceNumber = 100 - z
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        if change is not None:
            change(z, data)
        file = folder / f"{prefix}{(z * 7 + 3) % 10}_{z}"
        data.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def write_enhanced_mr(
    folder: Path, pixels: np.ndarray, order: list[int], *, change: Callable[[Any], None] | None = None
) -> Path:
    """Write one multi-frame file whose frame i shows slice order[i]; slopes differ from frame to frame."""
    from pydicom.dataset import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    data = base(ENHANCED_MR, "MR", SERIES, f"{SERIES}.9", pixels[order])
    data.NumberOfFrames = len(order)
    data.ContentDate, data.ContentTime = "20260101", "120000"

    def item(**values: Any) -> Dataset:
        made = Dataset()
        for key, value in values.items():
            setattr(made, key, value)
        return made

    measures = item(PixelSpacing=list(SPACING), SliceThickness=STEP)
    shared = item(
        PixelMeasuresSequence=[measures], PlaneOrientationSequence=[item(ImageOrientationPatient=ORIENTATION)]
    )
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for z in order:
        position = item(ImagePositionPatient=[round(float(v), 6) for v in ORIGIN + z * STEP * normal()])
        scale = item(RescaleSlope=0.5 + z, RescaleIntercept=-3, RescaleType="US")
        frames.append(item(PlanePositionSequence=[position], PixelValueTransformationSequence=[scale]))
    data.PerFrameFunctionalGroupsSequence = frames
    if change is not None:
        change(data)
    data.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return folder / "enhanced.dcm"


def base(storage: str, modality: str, series: str, uid: str, pixels: np.ndarray) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = storage, uid
    data.SOPClassUID, data.SOPInstanceUID = storage, uid
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, series, FRAME_OF_REFERENCE
    data.Modality, data.SeriesNumber, data.SeriesDescription = modality, 4, "made"
    data.PatientID, data.PatientName = "P1", "Phantom^Made"
    data.Rows, data.Columns = (int(size) for size in pixels.shape[-2:])
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = pixels.astype("<u2").tobytes()
    return data
