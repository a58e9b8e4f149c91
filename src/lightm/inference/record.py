"""The record of a run of predictions: what was done with which model, options and files, and what went wrong.

It lies in the output folder as prediction.json, written anew after every case, so that an unfinished run can resume.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lightm import __version__
from lightm.errors import InputError, LightMError
from lightm.files import file_hash, write_text
from lightm.images import dicom
from lightm.images.dicom_files import dicom_files
from lightm.images.io import split_path
from lightm.inference.budget import parse_memory
from lightm.inference.postprocess import Change
from lightm.inference.statistics import ClassStatistics
from lightm.nets.folder import read_description
from lightm.options import Names, Options, PathText

RECORD = "prediction.json"
PREVIEWS, PROBABILITIES = "previews", "probabilities"
TABLES = ("statistics.csv", "statistics.json")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRecord(_Part):
    """Which model. sha256: over network, plan, post-processing and weights, all that makes its label maps.

    models: those of an ensemble, each by itself; its own checksums are over theirs.
    """

    path: str
    name: str
    dataset: str
    sha256: str
    weights_sha256: str
    models: list[ModelRecord] = Field(default_factory=list)


def _bytes(given: Any) -> Any:
    return parse_memory(given) if isinstance(given, str) else given


class _Choices(Options):
    """How cases are predicted and what is written of each. max_memory: in bytes; it changes no label."""

    overlap: float = Field(0.5, ge=0, lt=1, description="Overlap of neighbouring windows, 0 to below 1.")
    tta: bool = Field(False, description="Average over flips along the axes that training mirrored (slower).")
    window: Literal["patch", "whole"] = Field("patch", description="patch: sliding windows; whole: the volume at once.")
    postprocess: bool = Field(True, description="Post-process the label maps as the model says.")
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, mps or gpu.")
    max_memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None, ge=1, description="Limit of the process, such as 2GB.", json_schema_extra={"text": True}
    )
    correct_gantry_tilt: bool = Field(False, description="Resample a tilted DICOM series onto a straight grid.")
    save_probabilities: bool = Field(False, description="Write probabilities/CASE.nii.gz too.")
    statistics: bool = Field(False, description="Write statistics.csv and .json: volumes, intensities, places.")
    preview: bool = Field(False, description="Write previews/CASE.png: slices with contours.")


class PredictOptions(_Choices):
    """The options of `lightm.predict`, of `lightm predict`, and of the calls in between.

    >>> lightm.PredictOptions(max_memory="2GB", tta=True).max_memory
    2000000000
    """

    dicom_seg: bool = Field(False, description="Write CASE.seg.dcm too (DICOM input).")
    overwrite: bool = Field(False, description="Replace label maps in OUT.")
    resume: bool = Field(
        False, description="Resume an unfinished run in OUT.", json_schema_extra={"flags": ["--continue"]}
    )
    report: PathText | None = Field(None, description="JSON file for times, checksums, versions and errors.")
    cases: Names | None = Field(None, description="Cases to predict, c1,c2; default: all.")


class RecordedOptions(_Choices):
    """The options of a run as its record keeps them. second_file: whether a second file of each case was written."""

    second_file: bool = False


class FileRecord(_Part):
    """A file, or the DICOM files of a folder together. path: of inputs as given, of outputs relative to the folder."""

    path: str
    bytes: int
    sha256: str


class Seconds(_Part):
    """Time of a case by phase. With a memory limit reading is part of predict, since it happens bit by bit."""

    read: float
    predict: float
    write: float


class CaseRecord(_Part):
    """A case that is done. file: its label map; more: what else was written; seconds: all phases together.

    postprocess: what the model's post-processing changed, by the name of the class; None where it has none. remarks:
    what is odd about its images.
    """

    case: str
    file: str
    more: list[str] = Field(default_factory=list)
    shape: list[int]
    spacing_mm: list[float]
    seconds: float
    phases: Seconds
    images: list[FileRecord]
    outputs: list[FileRecord]
    statistics: list[ClassStatistics] | None = None
    postprocess: dict[str, Change] | None = None
    remarks: list[str] = Field(default_factory=list)


class FailedCase(_Part):
    """A case that could not be predicted, and why. kind: the class of the error."""

    case: str
    error: str
    kind: str


class Record(_Part):
    """A whole run; the schema of prediction.json and of the report that `--report` writes."""

    schema_version: Literal[2] = 2
    model: ModelRecord
    inputs: list[str]
    out: str
    options: RecordedOptions
    device_name: str
    backend: str
    started: str
    finished: str | None = None
    peak_resident_bytes: int | None = None
    cases: list[CaseRecord] = Field(default_factory=list)
    failed: list[FailedCase] = Field(default_factory=list)
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the record as JSON, complete or not at all."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def new_record(model: ModelRecord, inputs: list[str], out: Path, options: RecordedOptions) -> Record:
    """Return the record of a run that begins now."""
    device = torch.device(options.device)
    name, backend = platform.processor() or platform.machine(), device.type
    if device.type == "cuda":
        name, backend = torch.cuda.get_device_name(device), f"cuda, CUDA {torch.version.cuda}"
    elif device.type == "cpu":
        backend = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    return Record(
        model=model,
        inputs=inputs,
        out=str(out),
        options=options,
        device_name=name,
        backend=backend,
        started=now(),
        versions={
            "lightm": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_model(model_dir: Path) -> ModelRecord:
    """Return name and checksums of a model folder or single-file model that loads, from its model.json."""
    info = read_description(model_dir)
    made_of = {key: info.get(key) for key in ("network", "plan", "postprocess", "weights_sha256")}
    return ModelRecord(
        path=str(model_dir),
        name=str(info["network"].get("name", "")),
        dataset=str(info["plan"].get("dataset", "")),
        sha256=hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest(),
        weights_sha256=str(info["weights_sha256"]),
    )


def describe_models(models: Sequence[Path]) -> ModelRecord:
    """Return `describe_model` of a model, or of several as one: an ensemble."""
    each = [describe_model(model) for model in models]
    if len(each) == 1:
        return each[0]
    sums = {
        key: hashlib.sha256(" ".join(getattr(one, key) for one in each).encode()).hexdigest()
        for key in ("sha256", "weights_sha256")
    }
    names = ", ".join(dict.fromkeys(one.name for one in each))
    path = ", ".join(one.path for one in each)
    return ModelRecord(path=path, name=f"mean of {len(each)}: {names}", dataset=each[0].dataset, models=each, **sums)


def file_record(path: Path, name: str) -> FileRecord:
    """Return size and SHA-256 of a file or archive, or of all DICOM files of a folder or `folder::UID`; read once.

    Raises InputError for a file that cannot be read.
    """
    folder, _ = dicom.split_source(path)
    if not folder.is_dir():
        size, digest = file_hash(folder if folder.is_file() else split_path(path)[0]).split(":")
        return FileRecord(path=name, bytes=int(size), sha256=digest)
    contents = {file.name: file_hash(file) for file in dicom_files(folder) if isinstance(file, Path)}
    whole = hashlib.sha256("".join(f"{file}\0{content}\n" for file, content in contents.items()).encode())
    total = sum(int(content.partition(":")[0]) for content in contents.values())
    return FileRecord(path=name, bytes=total, sha256=whole.hexdigest())


def _written_names(path: Path) -> list[str]:
    """Return the files that a record of any version says were written; none that would lie outside its folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for case in content["cases"] for name in (case["file"], *case.get("more", []))]
        names += TABLES if content.get("options", {}).get("statistics") else ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of predictions ({error}); empty the folder by hand") from error
    places = ("", f"{PREVIEWS}/", f"{PROBABILITIES}/")
    inside = [name for name in names if name in (place + Path(name).name for place in places)]
    return [name for name in inside if Path(name).name not in ("", ".", "..")]


def remove_written(out: Path) -> None:
    """Remove what an earlier run says that it wrote into `out`, so that its cases are not taken for new ones.

    Raises InputError for a record that cannot be read, LightMError when a file cannot be removed.
    """
    if not (out / RECORD).is_file():
        return
    names = _written_names(out / RECORD)
    try:
        for name in names:
            (out / name).unlink(missing_ok=True)
        for folder in (out / PREVIEWS, out / PROBABILITIES):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        (out / RECORD).unlink()
    except OSError as error:
        raise LightMError(
            f"{error.filename}: cannot be removed ({error.strerror}); check the folder's rights"
        ) from None
