"""One case of a run: read, predicted, written with all that was asked for, and described."""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from lightm.datasets.cases import Case
from lightm.errors import InputError, LightMError
from lightm.files import atomic_file
from lightm.images.io import place_remarks, read_volume, write_volume
from lightm.images.lazy import LazyVolume, open_volume
from lightm.images.volume import Volume
from lightm.inference.postprocess import Change
from lightm.inference.predictor import Predictor
from lightm.inference.record import (
    PREVIEWS,
    PROBABILITIES,
    CaseRecord,
    FailedCase,
    FileRecord,
    RecordedOptions,
    Seconds,
    file_record,
)
from lightm.inference.sliding import WindowProgress
from lightm.inference.statistics import ClassStatistics, class_statistics
from lightm.labels import Values

_log = logging.getLogger("lightm.inference")

# Asked before a case is predicted whether it can be served, then given its label map and the file that holds it.
CaseWriter = Callable[[Case], Callable[[Volume, Path], Path]]

Item = TypeVar("Item")
Result = TypeVar("Result")


class DiskError(LightMError):
    """The disk of the output refuses (full, no rights), so that no other case can be written either."""


class Reading(Generic[Result]):
    """One item being read, in a thread of its own or when it is asked for."""

    def __init__(self, read: Callable[[], Result], *, threaded: bool) -> None:
        self._read = read
        self._result: list[Result] = []
        self._error: BaseException | None = None
        # A daemon, so that an interrupted program need not wait for the end of a long read.
        self._thread = threading.Thread(target=self._run, name="lightm-read", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._read())
        except BaseException as error:  # handed to whom the item belongs
            self._error = error

    def wait(self) -> None:
        """Wait for the thread, if there is one; in steps, since Windows delivers no Ctrl-C within a wait."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)

    def take(self) -> Result:
        """Return what was read, once, and let go of it; raises what reading raised."""
        if self._thread is None:
            return self._read()
        self.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result.pop()


def each_read(
    items: Sequence[Item], read: Callable[[Item], Result], *, ahead: bool
) -> Iterator[tuple[Item, Reading[Result]]]:
    """Yield every item with its reading, whose `take()` returns `read(item)` or raises what that raised.

    ahead: read the next item in a thread as soon as the present one has been read, so while the caller works on it; one
    item at most is read ahead, and held beside the present one. Else an item is read when it is taken.
    """
    following: Reading[Result] | None = None
    for index, item in enumerate(items):
        present = following or Reading(lambda item=item: read(item), threaded=ahead)  # type: ignore[misc]
        following = None
        if ahead:
            present.wait()
            if index + 1 < len(items):
                following = Reading(lambda item=items[index + 1]: read(item), threaded=True)  # type: ignore[misc]
        yield item, present


@dataclass(frozen=True)
class Images:
    """What was read of a case. volumes: None where the predictor reads the files itself."""

    volumes: list[Volume] | None
    files: list[FileRecord]
    seconds: float


@dataclass(frozen=True)
class Job:
    """What all cases of a run share. targets: the label map of each case."""

    predictor: Predictor
    options: RecordedOptions
    targets: Mapping[str, Path]
    extra_writer: CaseWriter | None
    on_window: WindowProgress | None

    def read(self, case: Case) -> Images:
        """Read the images of a case, if they may be held as a whole, and take their checksums."""
        started = time.perf_counter()
        tilt = self.predictor.correct_gantry_tilt
        volumes = (
            None
            if self.options.max_memory is not None
            else [read_volume(path, correct_gantry_tilt=tilt) for path in case.images]
        )
        files = [file_record(path, str(path)) for path in case.images]
        return Images(volumes, files, time.perf_counter() - started)

    def _opened(self, case: Case, folder: Path) -> LazyVolume:
        return open_volume(case.images[0], folder, correct_gantry_tilt=self.predictor.correct_gantry_tilt)

    def predict(self, case: Case, reading: Reading[Images]) -> CaseRecord:
        """Predict a case and write its files; the label map comes last, so that it stands for all of them.

        Raises DiskError where the disk of the output refuses; whatever else is raised concerns this case alone.
        """
        try:
            return self._predict(case, reading)
        except LightMError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error, InputError):
                raise DiskError(str(error)) from error.__cause__
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)):
                raise DiskError(
                    f"{error.filename or tempfile.gettempdir()}: {error.strerror}; free some space"
                ) from error
            raise

    def _predict(self, case: Case, reading: Reading[Images]) -> CaseRecord:
        target = self.targets[case.id]
        out = target.parent
        write_extra = None if self.extra_writer is None else self.extra_writer(case)
        probabilities = out / PROBABILITIES / f"{case.id}.nii.gz" if self.options.save_probabilities else None
        images = reading.take()
        started = time.perf_counter()
        remarks: list[str] = []

        def remark(text: str) -> None:
            remarks.append(text)
            _log.warning("%s", text)

        for path in case.images:
            for message, cure in place_remarks(path):
                remark(f"{path}: {message}; {cure}")
        changes: dict[int, Change] = {}
        how: dict[str, Any] = {"progress": self.on_window, "probabilities": probabilities, "changes": changes}
        how["remark"] = lambda text: remark(f"{case.images[0]}: {text}")
        if images.volumes is None:
            labels = self.predictor.predict_files(case.images, **how)
        else:
            labels = self.predictor.predict_volumes(images.volumes, **how)
        predicted = time.perf_counter()
        written = [] if probabilities is None else [probabilities]
        statistics: list[ClassStatistics] | None = None
        if self.options.statistics or self.options.preview:
            # Opened once more where it is not held, so that its voxels are read by the slice.
            folder = Path(tempfile.gettempdir())
            image = LazyVolume.of(images.volumes[0]) if images.volumes else self._opened(case, folder)
            classes = self.predictor.plan.targets
            if self.options.statistics:
                statistics = class_statistics(labels, image, classes)
            if self.options.preview:
                written.append(out / PREVIEWS / f"{case.id}.png")
                picture = preview_png(image, labels, classes)
                with atomic_file(written[-1]) as stream:
                    stream.write(picture)
        if write_extra is not None:
            written.append(write_extra(labels, target))
        write_volume(target, labels, kind="label")
        finished = time.perf_counter()
        names = [path.relative_to(out).as_posix() for path in (target, *written)]
        return CaseRecord(
            case=case.id,
            file=target.name,
            more=names[1:],
            shape=list(labels.shape),
            spacing_mm=list(labels.spacing_mm),
            seconds=round(images.seconds + finished - started, 3),
            phases=Seconds(
                read=round(images.seconds, 3),
                predict=round(predicted - started, 3),
                write=round(finished - predicted, 3),
            ),
            images=images.files,
            outputs=[file_record(out / name, name) for name in names],
            statistics=statistics,
            postprocess=self._changes(changes),
            remarks=remarks,
        )

    def _changes(self, changes: dict[int, Change]) -> dict[str, Change] | None:
        names = {value: name for name, value in self.predictor.plan.labels.items()}
        named = {names.get(value, str(value)): change for value, change in sorted(changes.items())}
        return named if self.predictor.rules else None


def preview_png(image: Volume | LazyVolume, labels: Volume, classes: Mapping[str, Values]) -> bytes:
    """Return a PNG of axial, coronal and sagittal slices (2D: the image itself) with the contours of `labels`.

    image: first channel, labels: its label map, both as stored; they are shown in radiological convention, with
    letters for the patient's right, left, anterior, posterior, superior, inferior; a 2D image as stored, without. The
    slice of a plane is that of `best_slice`. classes: foreground name to value, or values of a region. Cost: about a
    second; memory: one byte per voxel, and the three slices.
    """
    from lightm.evaluation.figures import to_png
    from lightm.evaluation.pictures import PLANES, best_slice, overlay_prediction

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


def failed_case(case: Case, error: Exception) -> FailedCase:
    """Describe why a case failed, in one line for people; what was not foreseen goes to the log with its traceback."""
    text = str(error) if isinstance(error, LightMError) else " ".join(str(error).split())
    # PyTorch's words for a refused allocation, on the CPU or a GPU.
    refusals = ("can't allocate memory", "out of memory", "not enough memory")
    refused = isinstance(error, RuntimeError) and any(words in text.lower() for words in refusals)
    if isinstance(error, MemoryError) or refused:
        text = f"not enough memory ({text or 'MemoryError'}); set a limit (--max-memory), or use a larger machine"
    elif not isinstance(error, LightMError):
        _log.error("case '%s' failed unexpectedly", case.id, exc_info=error)
        text = f"{type(error).__name__}: {text}"
    if str(case.images[0].parent) not in text:
        text = f"{case.images[0]}: {text}"
    return FailedCase(case=case.id, error=text, kind=type(error).__name__)
